"""What a second worker is worth: evaluations per hour of real candidates, with one CPU worker and with two.

    python bench/workers.py --supernet runs/bccd/supernet

Each worker has one thread. One worker and two take turns, so that whatever else the machine does falls on both; the
candidates are the same. The clock starts when all workers are ready and supplied. Run it on an otherwise idle machine
of two cores or more. Prints a table, writes JSON, and exits with 1 if two give less than 1.8 times one's evaluations.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.saturated import Window, saturate, wake_all
from lib.cli import supernet_checkpoint
from lib.config_io import to_dict
from lib.datasets import load_annotations, load_split
from lib.detector import Supernet, load_supernet
from lib.dispatcher import Dispatcher
from lib.scoring import prepare_scoring_data, save_scoring_data, scoring_worker

LEAST_GAIN = 1.8


def prepare(supernet: Supernet, path: Path, images: Path) -> tuple[str, str, dict]:
    """What a scoring worker is set up with; the pictures go to the file `images`."""
    config = supernet.config
    config.data.classes = list(supernet.classes)
    annotations = load_annotations(config.data, "train")
    split = load_split(path.parent / "split.json", annotations)
    save_scoring_data(prepare_scoring_data(annotations, *split, config), images)
    return str(path.resolve()), str(images), to_dict(config)


def take_turns(setup: tuple, candidates: list[dict], rounds: int, seconds: float) -> dict[int, list[Window]]:
    """The windows of one worker and of two, in turns."""
    windows: dict[int, list[Window]] = {1: [], 2: []}
    with contextlib.ExitStack() as stack:
        pools = {n: Dispatcher(scoring_worker, setup, ["cpu"] * n, threads_per_worker=1) for n in windows}
        for count, pool in pools.items():
            wake_all(stack.enter_context(pool), candidates[0], count)
        for number in range(rounds):
            for count in (1, 2) if number % 2 == 0 else (2, 1):
                window = saturate(pools[count], itertools.cycle(candidates), count, seconds)
                windows[count].append(window)
                per_hour = 3600 * window.done / window.seconds
                print(f"| {number + 1} | {count} | {per_hour:.0f} | {window.utilisation:.1%} |", flush=True)
    return windows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--supernet", type=Path, required=True, help="folder of a supernet run")
    parser.add_argument("--data", help="folder of the data set, if it is not where the supernet was trained")
    parser.add_argument("--rounds", type=int, default=4, help="each with one worker and with two (default: 4)")
    parser.add_argument("--seconds", type=float, default=20, help="of each measurement (default: 20)")
    parser.add_argument("--candidates", type=int, default=16, help="random sub-networks, in turns (default: 16)")
    parser.add_argument("--out", type=Path, default=Path("workers.json"), help="default: workers.json")
    args = parser.parse_args()
    path = supernet_checkpoint(args.supernet)
    supernet = load_supernet(path)
    supernet.config.data.root = args.data or supernet.config.data.root
    rng = random.Random(0)
    samples = (supernet.space.sample(rng).to_dict() for _ in range(args.candidates))
    candidates = [{"genotype": sample, "rivals": []} for sample in samples]
    with tempfile.TemporaryDirectory() as folder:
        setup = prepare(supernet, path, Path(folder) / "images.pt")
        print("| round | workers | evaluations per hour | busy |")
        print("|---|---|---|---|")
        windows = take_turns(setup, candidates, args.rounds, args.seconds)
    rates = {n: 3600 * sum(w.done for w in ws) / sum(w.seconds for w in ws) for n, ws in windows.items()}
    gain = rates[2] / rates[1]
    print(f"one worker {rates[1]:.0f}, two {rates[2]:.0f} evaluations per hour: {gain:.2f} times as many")
    rows = {str(n): [w._asdict() for w in ws] for n, ws in windows.items()}
    result = {"per_hour": rates, "gain": gain, "windows": rows}
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    if gain < LEAST_GAIN:
        sys.exit(f"missed: at least {LEAST_GAIN} times as many")


if __name__ == "__main__":
    main()
