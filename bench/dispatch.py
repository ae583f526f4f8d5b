"""Do workers ever wait for the parent? Real worker processes whose jobs sleep for 20 to 200 ms.

    python bench/dispatch.py                 # 64 processes
    python bench/dispatch.py --ray           # and 8 actors of a local Ray cluster

The clock starts when every worker is ready and supplied. "busy" is the share of worker time spent on jobs, by the
workers' own clocks, which on a machine with fewer cores than workers holds the wait for a core after a sleep;
"asleep" counts the sleeps alone as they were asked for, and so bounds it from below. "parent" is the parent's CPU time
for each result. Prints a table, writes JSON, and exits with 1 if busy is below 97% or the parent over 2 ms.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.saturated import Window, saturate, wake_all
from lib.dispatcher import Dispatcher, WorkerPool

LEAST_BUSY, MOST_PARENT_MS = 0.97, 2.0


def sleeper(device: str):
    """A worker whose job is to sleep for so many seconds."""

    def sleep(seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    return sleep


def naps() -> Iterator[float]:
    rng = random.Random(0)
    while True:
        yield rng.uniform(0.02, 0.2)


def measure(kind: str, pool: WorkerPool, workers: int, seconds: float) -> dict:
    with pool:
        wake_all(pool, 0.2, workers)
        window = saturate(pool, naps(), workers, seconds)
    row = describe(kind, window)
    print(
        f"| {kind} | {workers} | {row['results']} | {row['busy']:.1%} | {row['asleep']:.1%} "
        f"| {row['parent_ms']:.2f} ms |",
        flush=True,
    )
    return row


def describe(kind: str, window: Window) -> dict:
    asleep = window.done * 0.11 / (window.seconds * window.workers)  # 0.11 s: the mean of the naps
    numbers = {"busy": window.utilisation, "asleep": asleep, "parent_ms": window.parent_ms_per_job}
    return {"kind": kind, "workers": window.workers, "seconds": window.seconds, "results": window.count, **numbers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=64, help="processes (default: 64)")
    parser.add_argument("--seconds", type=float, default=20, help="length of the measurement (default: 20)")
    parser.add_argument("--ray", action="store_true", help="measure Ray as well (pip install ray)")
    parser.add_argument("--ray-workers", type=int, default=8, help="actors (default: 8)")
    parser.add_argument("--out", type=Path, default=Path("dispatch.json"), help="default: dispatch.json")
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
    if any(row["busy"] < LEAST_BUSY or row["parent_ms"] > MOST_PARENT_MS for row in rows):
        sys.exit(f"missed: at least {LEAST_BUSY:.0%} busy, at most {MOST_PARENT_MS:g} ms of the parent")


if __name__ == "__main__":
    main()
