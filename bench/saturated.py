"""Workers that are kept supplied for a while: how busy they were, what the parent spent on it, how much got done."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from lib.dispatcher import Result, WorkerPool


class Window(NamedTuple):
    """What `count` results, and parts of those at the edges, say of `seconds` with `workers` workers."""

    workers: int
    seconds: float
    count: int  # results that came within the window
    busy: float  # worker seconds spent on jobs
    done: float  # jobs, those at the edges by the share that lies within
    parent_cpu: float  # seconds of this process

    @property
    def utilisation(self) -> float:
        return self.busy / (self.seconds * self.workers)

    @property
    def parent_ms_per_job(self) -> float:
        return 1000 * self.parent_cpu / self.count


def wake_all(pool: WorkerPool, payload: Any, workers: int) -> None:
    """Return once every worker has answered, and none has a job."""
    awake: set[str] = set()
    number = 0
    while len(awake) < workers or pool.pending:
        while len(awake) < workers and pool.free_slots():
            pool.submit(("wake", number), payload)
            number += 1
        awake |= {accepted(result).worker for result in pool.results(timeout=1)}


def saturate(pool: WorkerPool, payloads: Iterator[Any], workers: int, seconds: float) -> Window:
    """Keep `workers` workers supplied with `payloads` for so long; then let them finish."""
    supply = enumerate(payloads)
    keep_supplied(pool, supply, time.monotonic() + seconds / 10)  # until the queues are full
    start, cpu = time.monotonic(), time.process_time()
    jobs = keep_supplied(pool, supply, start + seconds)
    end, cpu, count = time.monotonic(), time.process_time() - cpu, len(jobs)
    while pool.pending:
        jobs += spans(pool.results())
    inside = [(max(0.0, min(b, end) - max(a, start)), b - a) for a, b in jobs]
    return Window(workers, end - start, count, sum(i for i, _ in inside), sum(i / whole for i, whole in inside), cpu)


def keep_supplied(pool: WorkerPool, supply: Iterator[tuple[int, Any]], until: float) -> list[tuple[float, float]]:
    """Start and end of each job that ended before the time `until`."""
    ended = []
    while (left := until - time.monotonic()) > 0:
        for _ in range(pool.free_slots()):
            pool.submit(*next(supply))
        ended += spans(pool.results(timeout=left))
    return ended


def spans(results: list[Result]) -> list[tuple[float, float]]:
    now = time.monotonic()
    return [(now - accepted(result).seconds, now) for result in results]


def accepted(result: Result) -> Result:
    if result.error:
        raise RuntimeError(f"a job failed: {result.error}")
    return result
