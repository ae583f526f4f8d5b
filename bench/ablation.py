"""What a training step is worth: uniform, sandwich, with distillation, without sorting, at equal forward passes.

    python bench/ablation.py --cfg configs/lite0.yaml --data /path/to/cards

Each row trains a supernet with about as many forward passes as the first one, its phases stretched or shortened in
proportion, and scores the smallest, a middle and the largest sub-network on the test set, BatchNorm re-estimated on
training pictures. Prints a table and writes OUT/ablation.json. What is done already is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.inherited import scorers, spread
from lib import checkpoint, config_io
from lib.config import Config
from lib.datasets import load_annotations, split_indices
from lib.detector import load_supernet
from lib.shrinking import space_at
from supernet_train import step_genotypes

ROOT = Path(__file__).resolve().parent.parent

SANDWICH = ["supernet.sampling=sandwich"]
DISTILL = [*SANDWICH, "supernet.distill.weight={boundary: [1], value: [0.1]}"]
UNSORTED = ["supernet.sort_channels=false"]


def passes(settings: Config, batches: int) -> int:
    """Forward passes with a gradient of a whole training; a teacher costs none in these rows."""
    epochs, stage = range(1, settings.supernet.epochs + 1), settings.supernet
    steps = ((space_at(settings, e), (e - 1) * batches + b) for e in epochs for b in range(batches))
    return sum(len(step_genotypes(space, stage, settings.seed, step)) for space, step in steps)


def with_epochs(cfg: Path, overrides: list[str], epochs: int) -> list[str]:
    """`overrides`, and those that make a training `epochs` long with its phases in proportion."""
    settings = config_io.read_config(cfg, overrides)
    ratio = epochs / settings.supernet.epochs
    scaled = [f"supernet.epochs={epochs}"]
    for name, choice in vars(settings.search_space.schedule_cfg).items():
        boundary = [max(round(1 + (b - 1) * ratio), i + 1) for i, b in enumerate(choice.boundary)]
        scaled.append(f"search_space.schedule_cfg.{name}.boundary={boundary}")
    return [*overrides, *scaled]


def fit_epochs(cfg: Path, overrides: list[str], batches: int, budget: int) -> list[str]:
    """The number of epochs whose forward passes come nearest to `budget`."""
    longest = config_io.read_config(cfg, overrides).supernet.epochs
    options = [with_epochs(cfg, overrides, epochs) for epochs in range(6, longest + 1)]
    return min(options, key=lambda o: abs(passes(config_io.read_config(cfg, o), batches) - budget))


def train(name: str, overrides: list[str], args: argparse.Namespace) -> float:
    """One supernet; the seconds it took, as far as this call went."""
    flags = ["--cfg", args.cfg, "--train-dir", args.out / name, "--resume"]
    flags += [part for override in overrides for part in ("--set", override)]
    env = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs))}
    (args.out / name).mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with (args.out / name / "stdout.txt").open("a") as file:
        command = list(map(str, [sys.executable, ROOT / "supernet_train.py", *flags]))
        subprocess.run(command, check=True, stdout=file, stderr=file, env=env)
    return time.perf_counter() - start


def scores(folder: Path) -> dict[str, dict]:
    path = folder / "last.pt"
    supernet = load_supernet(path)
    _, on_test = scorers(supernet, path, supernet.config)
    names = ("smallest", "middle", "largest")
    return {
        n: on_test(supernet.detector, g)
        for n, g in zip(names, spread(supernet.detector, supernet.space, 3), strict=True)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", type=Path, required=True)
    parser.add_argument("--data", required=True, help="folder of the data set")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key in every row")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, which share the cores")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    args = parser.parse_args()
    base = [*args.set, f"data.root={args.data}"]
    settings = config_io.read_config(args.cfg, base)
    annotations = load_annotations(settings.data, "train")
    train_rows, _ = split_indices(annotations, settings.data.data_portion, settings.seed)
    batches = max(len(train_rows) // settings.supernet.batch_size, 1)
    budget = passes(settings, batches)
    rows = {"uniform": base, "sandwich": [*base, *SANDWICH], "sandwich, distillation": [*base, *DISTILL]}
    rows = {name: fit_epochs(args.cfg, row, batches, budget) for name, row in rows.items()}
    results: dict[str, dict] = {}

    def run(names: list[str]) -> None:
        with ThreadPoolExecutor(args.jobs) as pool:
            times = list(pool.map(lambda name: train(_slug(name), rows[name], args), names))
        for name, seconds in zip(names, times, strict=True):
            count = passes(config_io.read_config(args.cfg, rows[name]), batches)
            results[name] = {"passes": count, "seconds": seconds, "scores": scores(args.out / _slug(name))}

    run(list(rows))
    best = max(results, key=lambda name: sum(m["AP"] for m in results[name]["scores"].values()))
    rows[f"{best}, unsorted"] = [*rows[best], *UNSORTED]
    run([f"{best}, unsorted"])
    print(
        "| training step | forward passes | seconds | smallest AP (AP50) | middle | largest |\n"
        "|---|---|---|---|---|---|"
    )
    for name, result in results.items():
        cells = (f"{m['AP']:.3f} ({m['AP50']:.3f})" for m in result["scores"].values())
        print(f"| {name} | {result['passes']} | {result['seconds']:.0f} | {' | '.join(cells)} |")
    checkpoint.write_text(args.out / "ablation.json", json.dumps(results, indent=1) + "\n")
    print(f"wrote {args.out / 'ablation.json'}")


def _slug(name: str) -> str:
    return name.replace(", ", "_")


if __name__ == "__main__":
    main()
