"""Stand-ins for a search's scoring worker, with made-up scores: no torch, so that they start fast."""

from __future__ import annotations

import os
import signal
import time
import zlib
from collections.abc import Callable


def score_of(genotype: dict) -> dict:
    """A number that depends on the genotype alone, in the place of each metric."""
    share = zlib.crc32(repr(sorted(genotype.items())).encode()) / 2**32
    return {"AP": share, "AP50": share, "mAP": share}


def fate(genotype: dict) -> int:
    """0, 1 or 2, which is the candidate's for good."""
    return int(score_of(genotype)["AP"] * 2**32) % 3


def quick(device: str, *args) -> Callable[[dict], dict]:
    return score_of


def slow(device: str, *args) -> Callable[[dict], dict]:
    """A second a job, so that there is time to interfere."""

    def score(genotype: dict) -> dict:
        time.sleep(1)
        return score_of(genotype)

    return score


def hanging(device: str, *args) -> Callable[[dict], dict]:
    """A third of the candidates never ends."""

    def score(genotype: dict) -> dict:
        if fate(genotype) == 0:
            time.sleep(600)
        return score_of(genotype)

    return score


def short_of_memory(device: str, *args) -> Callable[[dict], dict]:
    """A third of the candidates finds no memory, another third is killed for it."""

    def score(genotype: dict) -> dict:
        if fate(genotype) == 0:
            raise MemoryError
        if fate(genotype) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return score_of(genotype)

    return score
