"""Timing for the benches: runs that take turns, ratios between them with their spread, a table, a JSON file.

A machine's speed drifts, so a figure is a ratio of times that were taken beside each other, and the median of several.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from lib.errors import UserError
from lib.log import progress
from lib.runtime import device_name, keep_freed_memory

Clock = Callable[[], float]  # seconds
TimedRun = Callable[[], float]  # does its work, gives the seconds that it took


def add_options(parser: argparse.ArgumentParser, out: str, rounds: int, threads: int = 2) -> None:
    parser.add_argument("--rounds", type=int, default=rounds, help=f"in which all take a turn (default: {rounds})")
    parser.add_argument("--threads", type=int, default=threads, help=f"default: {threads}")
    parser.add_argument("--out", type=Path, default=Path(out), help=f"default: {out}")
    parser.add_argument(
        "--cpu-time", action="store_true", help="instead of the clock's: for a busy machine, with --threads 1"
    )


def begin(args: argparse.Namespace) -> Clock:
    """Sets the process up as the scripts do, with the threads that were asked for; the clock to time with."""
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    return time.process_time if args.cpu_time else time.perf_counter


def timed(run: Callable[[], object], clock: Clock) -> TimedRun:
    def call() -> float:
        start = clock()
        run()
        return clock() - start

    return call


def take_turns(runs: Mapping[str, TimedRun], rounds: int, warm_up: int = 1) -> dict[str, np.ndarray]:
    """Seconds (rounds,) of each run. All take a turn in each round, in an order of its own.

    `warm_up` rounds go before.
    """
    rng, names = random.Random(0), list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    bar = progress(None, "measure", total=(warm_up + rounds) * len(names))
    for i in range(warm_up + rounds):
        rng.shuffle(names)
        for name in names:
            took = runs[name]()
            bar.update()
            if i >= warm_up:
                seconds[name].append(took)
    bar.close()
    return {name: np.array(values) for name, values in seconds.items()}


def spread(values: np.ndarray) -> dict[str, float]:
    """Median, and the values that a tenth are below and above."""
    low, median, high = np.percentile(values, (10, 50, 90)).tolist()
    return {"median": median, "p10": low, "p90": high}


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> dict[str, float]:
    """`spread` of the ratios of times that were taken in the same round."""
    return spread(numerator / denominator)


def show(value: Mapping[str, float], digits: int = 2) -> str:
    """A `spread` for a table: the median, and 10% to 90% in brackets."""
    return f"{value['median']:.{digits}f} ({value['p10']:.{digits}f} to {value['p90']:.{digits}f})"


def print_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    for row in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(map(str, row))} |")


def check_equal(what: str, ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> float:
    """The largest difference, in units of the largest value. Raises UserError if it is above `tolerance`."""
    gap = float((ours - theirs).abs().max() / theirs.abs().max())
    if ours.shape != theirs.shape or not gap <= tolerance:
        raise UserError(f"{what}: the two sides differ by {gap:.1e} of the largest value, at most {tolerance} expected")
    return gap


def write(path: Path, content: dict) -> None:
    """Write a bench's figures as JSON, with the machine and its threads."""
    machine = {"processor": device_name(torch.device("cpu")), "threads": torch.get_num_threads()}
    path.write_text(json.dumps({"machine": machine, **content}, indent=1) + "\n")
    print(f"wrote {path}")
