"""What a search's report counts: the best so far, what random search would have found, how busy the workers were."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

PAUSE_SECONDS = 60.0  # no worker is without a job for so long: such a gap lies between two runs of the script
TAIL = 0.1  # on either side of the range of what random search would have found


class BestOf(NamedTuple):
    """The best of `draws` random evaluations: its expected value, and the range that holds it 8 times in 10."""

    draws: int
    low: float
    mean: float
    high: float


def best_so_far(values: Sequence[float]) -> list[float]:
    """The largest of the first 1, 2, 3, ... values."""
    return list(itertools.accumulate(values, max))


def best_of_random(values: Sequence[float], most: int, points: int = 200) -> list[BestOf]:
    """The best of n of these m values, drawn without replacement, for n = 1 to m or `most` (at `points` n at most).

    Exact: of the C(m, n) equally likely draws, C(i, n) hold none but the i smallest values. Expected-best curves are
    how Dodge et al. (EMNLP 2019) compare searches of different length; theirs draw with replacement.
    """
    ordered = np.sort(np.asarray(values, dtype=float))
    m = len(ordered)
    ranks = np.arange(m, 1, -1)  # C(i - 1, n) / C(i, n) = (i - n) / i, from i = m down
    found = []
    last = min(m, most)
    for n in sorted({round(n) for n in np.linspace(1, last, min(last, points))}):
        cdf = np.ones(m)  # cdf[i - 1]: the best is among the i smallest
        cdf[:-1] = np.cumprod(np.maximum(ranks - n, 0) / ranks)[::-1]
        low, high = (ordered[np.searchsorted(cdf, share - 1e-9)] for share in (TAIL, 1 - TAIL))
        found.append(BestOf(n, float(low), float(np.diff(cdf, prepend=0.0) @ ordered), float(high)))
    return found


@dataclass
class Worker:
    """One worker of a search: its `jobs` as (start, end) in seconds of the search, and how many of them failed."""

    name: str
    jobs: list[tuple[float, float]] = field(default_factory=list)
    failed: int = 0

    @property
    def busy(self) -> float:
        """Seconds spent on jobs."""
        return sum(end - start for start, end in self.jobs)


class Use(NamedTuple):
    """How a search used its workers over `seconds`, the `pauses` between runs of the script left out."""

    workers: list[Worker]
    seconds: float
    pauses: int


def worker_use(records: Sequence[Mapping]) -> Use:
    """The workers of a search by name, from the "worker", "time" (of the end) and "seconds" of its records."""
    workers: dict[str, Worker] = {}
    end = skipped = None
    pauses = 0
    for record in sorted(records, key=lambda r: r["time"] - r["seconds"]):
        start = record["time"] - record["seconds"]
        if end is None:
            end = skipped = start
        elif start - end > PAUSE_SECONDS:
            skipped += start - end
            pauses += 1
        end = max(end, record["time"])
        worker = workers.setdefault(record["worker"], Worker(record["worker"]))
        worker.jobs.append((start - skipped, record["time"] - skipped))
        worker.failed += record["status"] != "ok"
    return Use([workers[name] for name in sorted(workers)], end - skipped if workers else 0.0, pauses)
