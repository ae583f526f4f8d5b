"""Whether workers wait for the parent: real worker processes whose jobs sleep for 20 to 200 ms.

    python bench/dispatch.py                 # 64 processes
    python bench/dispatch.py --ray           # and 8 actors of a local Ray cluster

The clock starts when every worker is ready and supplied. "busy" is the share of the workers' time spent on jobs, by
their own clocks; on a machine with fewer cores than workers it includes the wait for a core after a sleep. "asleep"
counts only the sleeps that were asked for, a lower bound of it. "parent" is the parent's CPU time for each result.
"""

# The workers import this file, so it imports nothing large.
import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.dispatcher import Dispatcher, Result, WorkerPool

NAP = (0.02, 0.2)  # seconds, shortest and longest


class Window(NamedTuple):
    """What was seen within `seconds` of a pool of `workers`."""

    workers: int
    seconds: float
    count: int  # results that arrived
    busy: float  # worker seconds spent on jobs
    done: float  # jobs; one that crosses an edge counts by its share within
    parent_cpu: float  # seconds of this process

    @property
    def utilisation(self) -> float:
        return self.busy / (self.seconds * self.workers)


def wake_all(pool: WorkerPool, workers: int) -> None:
    """Return once every worker has answered, and none has a job."""
    awake: set[str] = set()
    number = 0
    while len(awake) < workers or pool.pending:
        while len(awake) < workers and pool.free_slots():
            pool.submit(("wake", number), NAP[1])
            number += 1
        awake |= {checked(result).worker for result in pool.results(timeout=1)}


def saturate(pool: WorkerPool, workers: int, seconds: float) -> Window:
    """Keep the workers supplied with naps for so long; then let them finish."""
    supply = enumerate(naps())
    keep_supplied(pool, supply, time.monotonic() + seconds / 10)  # until the queues are full
    start, cpu = time.monotonic(), time.process_time()
    jobs = keep_supplied(pool, supply, start + seconds)
    end, cpu = time.monotonic(), time.process_time() - cpu
    count = len(jobs)
    while pool.pending:
        jobs += spans(pool.results())
    inside = [max(0.0, min(b, end) - max(a, start)) for a, b in jobs]
    done = sum(within / (b - a) for within, (a, b) in zip(inside, jobs, strict=True))
    return Window(workers, seconds=end - start, count=count, busy=sum(inside), done=done, parent_cpu=cpu)


def keep_supplied(pool: WorkerPool, supply: Iterator[tuple[int, float]], until: float) -> list[tuple[float, float]]:
    """Start and end of each job that ended before the time `until`."""
    ended = []
    while (left := until - time.monotonic()) > 0:
        for _ in range(pool.free_slots()):
            pool.submit(*next(supply))
        ended += spans(pool.results(timeout=left))
    return ended


def spans(results: list[Result]) -> list[tuple[float, float]]:
    now = time.monotonic()
    return [(now - checked(result).seconds, now) for result in results]


def checked(result: Result) -> Result:
    if result.error:
        raise RuntimeError(f"a job failed: {result.error}")
    return result


def sleeper(device: str):
    """A worker whose job is to sleep for so many seconds."""
    return time.sleep


def naps() -> Iterator[float]:
    rng = random.Random(0)
    while True:
        yield rng.uniform(*NAP)


def measure(kind: str, pool: WorkerPool, workers: int, seconds: float) -> dict:
    with pool:
        wake_all(pool, workers)
        window = saturate(pool, workers, seconds)
    asleep = window.done * sum(NAP) / 2 / (window.seconds * workers)
    parent_ms = 1000 * window.parent_cpu / window.count
    cells = f"{window.count} | {window.utilisation:.1%} | {asleep:.1%} | {parent_ms:.2f} ms"
    print(f"| {kind} | {workers} | {cells} |", flush=True)
    figures = {"busy": window.utilisation, "asleep": asleep, "parent_ms": parent_ms}
    return {"kind": kind, "workers": workers, "seconds": window.seconds, "results": window.count, **figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=64, help="processes (default: 64)")
    parser.add_argument("--seconds", type=float, default=20, help="length of the measurement (default: 20)")
    parser.add_argument("--ray", action="store_true", help="measure Ray as well (pip install ray)")
    parser.add_argument("--ray-workers", type=int, default=8, help="actors (default: 8)")
    parser.add_argument("--out", type=Path, default=Path("dispatch.json"), help="JSON file (default: dispatch.json)")
    args = parser.parse_args()
    print("| workers are | how many | results | busy | asleep | parent, a result |")
    print("|---|---|---|---|---|---|")
    processes = Dispatcher(sleeper, (), ["cpu"] * args.workers, threads_per_worker=1)
    rows = [measure("processes", processes, args.workers, args.seconds)]
    if args.ray:
        from lib import ray_dispatcher

        ray_dispatcher.connect(None, cpus=args.ray_workers)
        actors = ray_dispatcher.RayDispatcher(sleeper, (), ["cpu"] * args.ray_workers)
        rows.append(measure("Ray actors", actors, args.ray_workers, args.seconds))
    args.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
