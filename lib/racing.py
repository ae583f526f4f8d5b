"""Racing: a candidate is scored on ever more of the images, and stopped once it clearly loses to its rivals.

After each rung its scores on the resamples of the images so far are compared with those that each rival got there, the
same resamples of the same images (Maron & Moore, NeurIPS 1993, with a paired bootstrap interval for their bound).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lib.bootstrap import clearly_below, unpack

SHARES = (0.25, 0.5)  # of the images, at which a candidate may be stopped
LEAST_IMAGES = 12  # resamples of fewer say little, and a batch of few takes longer than the few stopped there save

Scores = Mapping[str, str]  # packed scores on the resamples, by the number of images


def rungs(num_images: int) -> list[int]:
    """Numbers of images, ascending, after which a candidate is compared; the last one is all of them."""
    early = {round(share * num_images) for share in SHARES}
    return [*sorted(n for n in early if LEAST_IMAGES <= n < num_images), num_images]


def has_lost(scores: np.ndarray, num_images: int, rivals: Sequence[Scores]) -> bool:
    """Whether `scores` (R,) on resamples of the first `num_images` are clearly below those of every rival."""
    theirs = [rival.get(str(num_images)) for rival in rivals]
    return bool(theirs) and all(packed is not None and clearly_below(scores, unpack(packed)) for packed in theirs)
