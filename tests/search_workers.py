"""Stand-ins for a search's scoring worker. All but `gated` make up the scores: no torch, so that they start fast."""

from __future__ import annotations

import os
import signal
import time
import zlib
from collections.abc import Callable
from pathlib import Path

from tests.dispatch_helpers import wait_for


def share_of(genotype: dict) -> float:
    """A number from 0 to 1 that depends on the genotype alone."""
    return zlib.crc32(repr(sorted(genotype.items())).encode()) / 2**32


def fate(genotype: dict) -> int:
    """0, 1 or 2, which is the candidate's for good."""
    return int(share_of(genotype) * 2**32) % 3


def score_of(job: dict) -> dict:
    """That number in the place of each metric."""
    metrics = dict.fromkeys(("AP", "AP50", "mAP"), share_of(job["genotype"]))
    blocks = [block for stage in job["genotype"]["backbone"]["stages"] for block in stage]
    metrics["flops"] = metrics["params"] = sum(block["expand"] * block["kernel"] for block in blocks)
    return {"metrics": metrics, "images": 1}


def quick(device: str, *args) -> Callable[[dict], dict]:
    return score_of


def slow(device: str, *args) -> Callable[[dict], dict]:
    """A second a job, so that there is time to interfere."""

    def score(job: dict) -> dict:
        time.sleep(1)
        return score_of(job)

    return score


def gated(device: str, *args) -> Callable[[dict], dict]:
    """The real worker, but after its first job it waits for a file `go`: no search ends before there is one."""
    from lib.scoring import scoring_worker

    real, done = scoring_worker(device, *args), []

    def score(job: dict) -> dict:
        if done:
            wait_for(Path("go").exists)
        done.append(real(job))
        return done[-1]

    return score


def slow_to_start(device: str, *args) -> Callable[[dict], dict]:
    """The first set-up hangs, the second one fails."""
    for number in (1, 2):
        try:
            Path(f"set-up-{number}").touch(exist_ok=False)
        except FileExistsError:
            continue
        if number == 1:
            time.sleep(600)
        raise RuntimeError("CUDA error: out of memory\nwith a second line")
    return score_of


def broken(device: str, *args) -> Callable[[dict], dict]:
    raise RuntimeError("CUDA error: out of memory\nwith a second line")


def hanging(device: str, *args) -> Callable[[dict], dict]:
    """A third of the candidates never ends."""

    def score(job: dict) -> dict:
        if fate(job["genotype"]) == 0:
            time.sleep(600)
        return score_of(job)

    return score


def short_of_memory(device: str, *args) -> Callable[[dict], dict]:
    """A third of the candidates finds no memory, another third is killed for it."""

    def score(job: dict) -> dict:
        if fate(job["genotype"]) == 0:
            raise MemoryError
        if fate(job["genotype"]) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return score_of(job)

    return score
