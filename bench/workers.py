"""What a second worker is worth: evaluations an hour of real candidates, with one worker of a device and with two.

    python bench/workers.py --supernet runs/bccd/supernet

Each worker has one thread. One worker and two take turns on the same candidates; the clock starts when all workers are
ready and supplied. Run it on an otherwise idle machine of two cores or more. The gain would be 2 if nothing were lost.
"""

import contextlib
import itertools
import random
import tempfile
from pathlib import Path

import common
from dispatch import Window, saturate, wake_all

from lib.checkpoint import sha256
from lib.cli import supernet_checkpoint
from lib.config_io import to_dict
from lib.detector import load_supernet
from lib.dispatcher import Dispatcher
from lib.runtime import run
from lib.scoring import save_scoring_data, scoring_worker


def main() -> None:
    parser = common.bench_parser(__doc__, "workers.json", device=True)
    parser.add_argument("--supernet", type=Path, required=True, help="folder of a supernet run")
    parser.add_argument("--data", help="folder of the data set, if it is not where the supernet was trained")
    parser.add_argument("--rounds", type=int, default=4, help="each with one worker and with two (default: 4)")
    parser.add_argument("--seconds", type=float, default=20, help="of each measurement (default: 20)")
    parser.add_argument("--candidates", type=int, default=16, help="random sub-networks (default: 16)")
    args = parser.parse_args()
    path = supernet_checkpoint(args.supernet)
    supernet = load_supernet(path)
    supernet.config.data.root = args.data or supernet.config.data.root
    rng = random.Random(0)
    candidates = [{"genotype": supernet.space.sample(rng).to_dict()} for _ in range(args.candidates)]
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images.pt"
        save_scoring_data(common.search_split_data(supernet, path.parent), images)
        setup = (str(path.resolve()), sha256(path), str(images), to_dict(supernet.config))
        windows = measure(setup, args.device, candidates, args.rounds, args.seconds)
    rates = {n: 3600 * sum(w.done for w in found) / sum(w.seconds for w in found) for n, found in windows.items()}
    gain = rates[2] / rates[1]
    print(f"one worker {rates[1]:.0f}, two {rates[2]:.0f} evaluations an hour: {gain:.2f} times as many")
    rows = [
        {"workers": n, "evaluations an hour": rates[n], "busy": sum(w.utilisation for w in found) / len(found)}
        for n, found in windows.items()
    ]
    common.report(args, rows, gain=gain)


def measure(setup: tuple, device: str, candidates: list[dict], rounds: int, seconds: float) -> dict[int, list[Window]]:
    """The windows of one worker and of two, in turns."""
    windows: dict[int, list[Window]] = {1: [], 2: []}
    with contextlib.ExitStack() as stack:
        pools = {n: Dispatcher(scoring_worker, setup, [device] * n, threads_per_worker=1) for n in windows}
        for count, pool in pools.items():
            wake_all(stack.enter_context(pool), candidates[0], count)
        for number in range(rounds):
            for count in (1, 2) if number % 2 == 0 else (2, 1):
                windows[count].append(saturate(pools[count], itertools.cycle(candidates), count, seconds))
    return windows


if __name__ == "__main__":
    run(main)
