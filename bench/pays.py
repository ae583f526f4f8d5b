"""Does the search pay? The found network against random ones of its cost and the largest scaled down, trained alike.

    python bench/pays.py --supernet runs/wide/supernet --epochs 4

A budget is a share of the largest sub-network's multiply-adds. For each, async_search.py finds a network under it;
with `--finalists` K, short trainings choose it ("finalist"), beside the one that is best with inherited weights.
`--random` random ones have its multiply-adds to 2.5%; "scaled" is the pretrained network (or, without one, the largest)
scaled down by a simple rule: at each image size the widest blocks that fit, of these what uses most of the budget.
final_train.py trains each by one short recipe, `--seeds` times, and evaluates it on the test set.

Prints a table with the AP of each, and the mean gain of found over random with its 95% interval, bootstrapped over the
random networks and the seeds. Writes OUT/pays.json and pays.svg. A second call reuses finished trainings, also those of
bench/rank_correlation.py with the same --out.
"""

import argparse
import itertools
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import common
import numpy as np

from lib.cli import supernet_checkpoint
from lib.detector import Supernet, load_supernet
from lib.genotype import Genotype, read_genotype_file
from lib.runtime import run

DRAWS = 2000  # of the bootstrap


def main() -> None:
    parser = common.trainings_parser(__doc__)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.25, 0.5, 0.75], help="shares of the largest")
    parser.add_argument("--random", type=int, default=5, help="random sub-networks at each budget (default: 5)")
    parser.add_argument("--finalists", type=int, default=0, help="candidates that short trainings choose among")
    args = parser.parse_args()
    args.out = args.out or args.supernet.parent / "rank_correlation"
    supernet = load_supernet(supernet_checkpoint(args.supernet))
    groups = {share: contestants(share, supernet, args) for share in args.budgets}
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = {
            (share, name, seed): pool.submit(common.train_alone, args, genotype, supernet, seed)
            for seed in range(args.seeds)
            for share, group in groups.items()
            for name, genotype in group.items()
        }
        ap = {key: job.result()["AP"] for key, job in jobs.items()}

    rows, gains, points = [], [], []
    for share, group in groups.items():
        final = {name: np.array([ap[share, name, seed] for seed in range(args.seeds)]) for name in group}
        others = np.array([values for name, values in final.items() if name.startswith("random")])
        cost = {name: supernet.detector.cost(genotype).flops / 1e6 for name, genotype in group.items()}
        points += [(cost[name], values.mean(), name.split()[0]) for name, values in final.items()]
        searched = [name for name in final if name in ("found", "finalist")]
        gains.append(gain(final[searched[-1]], others))
        rows.append(
            {
                "budget": f"{share:.0%} of the largest",
                "random": f"{others.mean():.3f} ({others.mean(1).min():.3f} to {others.mean(1).max():.3f})",
                **{f"{name}, M": f"{final[name].mean():.3f}, {cost[name]:.1f}" for name in (*searched, "scaled")},
                **{f"{name} - random": interval(gain(final[name], others)) for name in searched},
            }
        )
    draw(points, args.out / "pays.svg")
    args.out /= "pays.json"
    common.report(args, rows, points=points)
    print(f"mean gain over random: {interval(np.mean(gains, axis=0))}")


def contestants(share: float, supernet: Supernet, args: argparse.Namespace) -> dict[str, Genotype]:
    """The networks of one budget by name: found, random 1, ..., scaled."""
    budget = share * supernet.detector.cost(supernet.space.largest()).flops
    folder = args.out / f"search-{share:g}"
    flags = ["--load", args.supernet, "--max-flops", f"{budget:.0f}", "--gpus", ",".join(["cpu"] * args.jobs)]
    common.run_stage("async_search.py", folder, flags, args.jobs)
    networks = {"found": Genotype.from_dict(read_genotype_file(folder / "best.json"))}
    if args.finalists:
        again = args.out / f"finalists-{share:g}"
        if not again.exists():
            shutil.copytree(folder, again)
        common.run_stage("async_search.py", again, [*flags, "--finalists", args.finalists], args.jobs)
        networks["finalist"] = Genotype.from_dict(read_genotype_file(again / "best.json"))
    for i, genotype in enumerate(common.random_of_cost(supernet, share, args.random)):
        networks[f"random {i + 1}"] = genotype
    own = args.supernet / "pretrained_genotype.json"
    shape = Genotype.from_dict(read_genotype_file(own)) if own.exists() else supernet.space.largest()
    return {**networks, "scaled": scaled(shape, supernet, budget)}


def scaled(shape: Genotype, supernet: Supernet, budget: float) -> Genotype:
    """`shape` at the image size, and with the widest blocks, that use most of the budget."""
    widths = sorted({width for stage in supernet.space.stages for width in stage.block.expand})
    fitting = {}
    for size, width in itertools.product(supernet.space.image_size, widths):
        stages = [tuple(block._replace(expand=min(block.expand, width)) for block in stage) for stage in shape.stages]
        genotype = replace(shape, image_size=size, stages=tuple(stages))
        cost = supernet.detector.cost(genotype).flops
        if cost <= budget * 1.005:
            fitting[genotype] = cost
    return max(fitting, key=fitting.get, default=supernet.space.smallest())


def gain(found: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Found minus the mean of the others: the value, then DRAWS bootstrap values over the networks and the seeds."""
    rng = np.random.default_rng(0)
    networks, seeds = others.shape
    values = [found.mean() - others.mean()]
    for _ in range(DRAWS):
        rows = others[rng.integers(networks, size=networks)]
        drawn = np.take_along_axis(rows, rng.integers(seeds, size=rows.shape), axis=1)
        values.append(found[rng.integers(seeds, size=seeds)].mean() - drawn.mean())
    return np.array(values)


def interval(values: np.ndarray) -> str:
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return f"{values[0]:+.3f} ({low:+.3f} to {high:+.3f})"


def draw(points: Sequence[tuple[float, float, str]], path: Path) -> None:
    """Final AP against multiply-adds."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for name, mark in (("random", "o"), ("scaled", "s"), ("found", "D"), ("finalist", "*")):
        if chosen := sorted((cost, ap) for cost, ap, kind in points if kind == name):
            axes.plot(*zip(*chosen, strict=True), mark, label=name, linestyle="" if name == "random" else "-")
    axes.set(xlabel="million multiply-adds", ylabel="AP on the test set, trained alone")
    axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    run(main)
