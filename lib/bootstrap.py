"""Paired bootstrap over images: what a difference of two scores is worth on so few pictures (Efron, 1979).

Every candidate is scored on the same resamples of the same images, so the differences of two candidates' scores are
free of what makes a picture hard for both of them.
"""

from __future__ import annotations

import base64
import functools
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95
_SCALE = 65534  # scores are in [0, 1], kept to 1.5e-5; the number above stands for nan


class Interval(NamedTuple):
    """Where `CONFIDENCE` of the resamples lie, equal shares left out on both sides."""

    low: float
    high: float


@functools.lru_cache(maxsize=3)  # the rungs of a race
def image_weights(num_images: int, resamples: int) -> np.ndarray:
    """(R, N) how often each image stands in each resample. Always the same for the same two numbers; read only."""
    rng = np.random.default_rng([num_images, resamples])
    weights = rng.multinomial(num_images, np.full(num_images, 1 / num_images), size=resamples)
    weights.flags.writeable = False
    return weights


def interval(scores: np.ndarray) -> Interval:
    """Of the scores, or of the differences of two candidates' scores, on all resamples (R,); nan is left out."""
    outside = (1 - CONFIDENCE) / 2
    if np.isnan(scores).all():
        return Interval(float("nan"), float("nan"))
    return Interval(*(float(q) for q in np.nanquantile(scores, [outside, 1 - outside])))


def clearly_below(scores: np.ndarray, others: np.ndarray) -> bool:
    """Whether the whole interval of the paired difference lies below zero."""
    return interval(scores - others).high < 0


def pack(scores: np.ndarray) -> str:
    """Scores in [0, 1] or nan as text for a ledger, 2.7 characters each, to 1.5e-5."""
    whole = np.where(np.isnan(scores), _SCALE + 1, np.rint(np.nan_to_num(scores) * _SCALE))
    return base64.b64encode(whole.astype("<u2").tobytes()).decode()


def unpack(text: str) -> np.ndarray:
    """What `pack` was given."""
    whole = np.frombuffer(base64.b64decode(text), "<u2")
    return np.where(whole > _SCALE, np.nan, whole / _SCALE)
