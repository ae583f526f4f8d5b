"""What a training step is worth: uniform, spread, with distillation, at equal forward passes.

    python bench/ablation.py --cfg configs/lite0.yaml --data /path/to/cards

Each row trains a supernet with about as many forward passes as the first one, its phases stretched or shortened in
proportion, and scores the smallest, a middle and the largest sub-network on the test set, with BatchNorm re-estimated
on training pictures. Prints a table and writes OUT/ablation.json. A second call reuses finished trainings.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import common

from lib.config import Config
from lib.config_io import read_config
from lib.datasets import load_annotations, split_indices
from lib.detector import load_supernet
from lib.runtime import run
from lib.shrinking import space_at
from supernet_train import step_genotypes

SPREAD = ["supernet.sampling=spread"]
DISTILL = ["supernet.distill.weight={boundary: [1], value: [0.1]}"]
SHORTEST = 6  # epochs


def main() -> None:
    parser = common.bench_parser(__doc__, "runs/ablation/ablation.json")
    parser.add_argument("--cfg", type=Path, required=True)
    parser.add_argument("--data", required=True, help="folder of the data set")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key in every row")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, which share the cores (default: 2)")
    args = parser.parse_args()
    base = [*args.set, f"data.root={args.data}"]
    config = read_config(args.cfg, base)
    annotations = load_annotations(config.data, "train")
    train_rows, _ = split_indices(annotations, config.data.data_portion, config.seed)
    batches = max(len(train_rows) // config.supernet.batch_size, 1)
    budget = passes(config, batches)

    changes = {"uniform": base, "spread": [*base, *SPREAD], "uniform, distillation": [*base, *DISTILL]}
    changes = {name: fit_epochs(args.cfg, row, batches, budget) for name, row in changes.items()}
    with ThreadPoolExecutor(args.jobs) as pool:
        found = dict(zip(changes, pool.map(lambda name: train(name, changes[name], args), changes), strict=True))

    rows = []
    for name, scores in found.items():
        aps = {size: f"{metrics['AP']:.3f} ({metrics['AP50']:.3f})" for size, metrics in scores.items()}
        rows.append({"training step": name, "passes": passes(read_config(args.cfg, changes[name]), batches), **aps})
    common.report(args, rows)


def passes(config: Config, batches: int) -> int:
    """Forward passes with a gradient of a whole training; the rows' teachers add none."""
    total = 0
    for epoch in range(1, config.supernet.epochs + 1):
        space = space_at(config, epoch)
        for step in range((epoch - 1) * batches, epoch * batches):
            total += len(step_genotypes(space, config.supernet, config.seed, step))
    return total


def fit_epochs(cfg: Path, overrides: list[str], batches: int, budget: int) -> list[str]:
    """`overrides`, with the number of epochs whose forward passes come nearest to `budget`."""
    longest = read_config(cfg, overrides).supernet.epochs
    options = [with_epochs(cfg, overrides, epochs) for epochs in range(SHORTEST, longest + 1)]
    return min(options, key=lambda option: abs(passes(read_config(cfg, option), batches) - budget))


def with_epochs(cfg: Path, overrides: list[str], epochs: int) -> list[str]:
    """`overrides`, and those that make a training `epochs` long with its phases in proportion."""
    config = read_config(cfg, overrides)
    factor = epochs / config.supernet.epochs
    scaled = [f"supernet.epochs={epochs}"]
    for name, choice in vars(config.search_space.schedule_cfg).items():
        boundary = [max(round(1 + (b - 1) * factor), i + 1) for i, b in enumerate(choice.boundary)]
        scaled.append(f"search_space.schedule_cfg.{name}.boundary={boundary}")
    return [*overrides, *scaled]


def train(name: str, overrides: list[str], args: argparse.Namespace) -> dict[str, dict]:
    """Train one supernet, or resume it; metrics of three sub-networks on the test set."""
    folder = args.out.parent / name.replace(", ", "_")
    flags = ["--cfg", args.cfg, *(part for override in overrides for part in ("--set", override))]
    common.run_stage("supernet_train.py", folder, flags, args.jobs)
    supernet = load_supernet(folder / "last.pt")
    _, on_test = common.run_scorers(supernet, folder)
    genotypes = common.genotypes_by_cost(supernet.detector, supernet.space, 3)
    names = ("smallest", "middle", "largest")
    return {n: on_test(supernet.detector, g)["metrics"] for n, g in zip(names, genotypes, strict=True)}


if __name__ == "__main__":
    run(main)
