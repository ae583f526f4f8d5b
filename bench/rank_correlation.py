"""Whether inherited AP predicts final AP: sub-networks of a supernet, each trained alone as well.

    python bench/rank_correlation.py --supernet runs/wide/supernet --epochs 4

`--count` sub-networks cover the range of multiply-adds, `--band` more have a quarter of the largest one's. Each is
scored with the supernet's weights on the search split, as the search does. Then final_train.py trains each by one short
recipe, `--seeds` times, and evaluates it on the test set. `--also` scores the same sub-networks with the weights of
further supernets: what another way to train the supernet is worth. `--vary` scores them with other settings.

Prints two tables: the sub-networks, and Kendall's tau-b of each predictor and the mean final AP. "given the cost" is
the partial tau without what multiply-adds explain; "in the band" is that of sub-networks of one cost. Intervals (95%)
are bootstrapped over sub-networks and seeds. The tau between two seeds is the most that any predictor of one training
could reach. Writes OUT/rank_correlation.json. A second call reuses finished trainings.
"""

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import common
import numpy as np

from lib.cli import supernet_checkpoint
from lib.detector import load_supernet
from lib.latency import kendall_tau
from lib.runtime import run
from lib.scoring import Scorer

DRAWS = 2000  # of the bootstrap


def main() -> None:
    parser = common.trainings_parser(__doc__)
    parser.add_argument("--also", type=Path, nargs="*", default=[], help="supernets of the same space and split")
    parser.add_argument("--vary", nargs="*", default=[], metavar="KEY=N", help="e.g. bn_images=256 images=100")
    parser.add_argument("--count", type=int, default=8, help="sub-networks over the range, both ends among them")
    parser.add_argument("--band", type=int, default=6, help="sub-networks of nearly the same multiply-adds")
    args = parser.parse_args()
    args.out = args.out or args.supernet.parent / "rank_correlation"
    supernet = load_supernet(supernet_checkpoint(args.supernet))
    spread = common.genotypes_by_cost(supernet.detector, supernet.space, args.count)
    chosen = [*spread, *common.random_of_cost(supernet, 0.25, args.band)]

    with ThreadPoolExecutor(args.jobs) as pool:
        trainings = [(genotype, supernet, seed) for seed in range(args.seeds) for genotype in chosen]
        jobs = [pool.submit(common.train_alone, args, *training) for training in trainings]
        aps = [job.result()["AP"] for job in jobs]
    final = np.array(aps).reshape(args.seeds, len(chosen)).T  # (networks, seeds)

    flops = np.array([supernet.detector.cost(genotype).flops / 1e6 for genotype in chosen])
    predictors = {"multiply-adds": flops}
    settings = supernet.config.search
    scored = [(folder, "") for folder in (args.supernet, *args.also)] + [(args.supernet, each) for each in args.vary]
    for folder, changed in scored:
        key, _, number = changed.partition("=")
        supernet.config.search = replace(settings, **{key: int(number)}) if changed else settings
        scorer = Scorer(common.search_split_data(supernet, args.supernet), supernet.config, common.CPU)
        detector = load_supernet(supernet_checkpoint(folder)).detector
        scores = [scorer(detector, genotype)["metrics"]["AP"] for genotype in chosen]
        predictors[f"inherited AP, {changed or folder.parent.name}"] = np.array(scores)
    in_band = np.arange(len(chosen)) >= args.count
    rows = [
        {
            "sub-network": f"{i}{' (band)' * bool(in_band[i])}, {genotype.image_size} px",
            "M multiply-adds": flops[i],
            **{name: values[i] for name, values in predictors.items() if name != "multiply-adds"},
            "final AP": ", ".join(f"{ap:.3f}" for ap in final[i]),
        }
        for i, genotype in enumerate(chosen)
    ]
    taus = [{"predictor": name, **correlations(values, flops, final, in_band)} for name, values in predictors.items()]
    if args.seeds > 1:
        taus.append({"predictor": "another seed", **ceiling(final, flops, in_band)})
    args.out /= "rank_correlation.json"
    common.report(args, rows, taus=taus, genotypes=[genotype.to_dict() for genotype in chosen], final=final.tolist())
    common.print_table(taus)


def correlations(values: np.ndarray, flops: np.ndarray, final: np.ndarray, in_band: np.ndarray) -> dict[str, str]:
    """The three taus of one predictor and the mean over the seeds of `final` (networks, seeds), as text."""
    return {
        "tau": with_interval(kendall_tau, values, final),
        "given the cost": "" if values is flops else with_interval(partial_tau, values, final, flops),
        "in the band": with_interval(kendall_tau, values[in_band], final[in_band]),
    }


def ceiling(final: np.ndarray, flops: np.ndarray, in_band: np.ndarray) -> dict[str, str]:
    """The same between the final APs of two seeds, averaged over the pairs of seeds."""
    pairs = list(itertools.combinations(final.T, 2))
    return {
        "tau": f"{np.mean([kendall_tau(a, b) for a, b in pairs]):.2f}",
        "given the cost": f"{np.mean([partial_tau(a, b, flops) for a, b in pairs]):.2f}",
        "in the band": f"{np.mean([kendall_tau(a[in_band], b[in_band]) for a, b in pairs]):.2f}",
    }


def with_interval(tau, values: np.ndarray, final: np.ndarray, *given: np.ndarray) -> str:
    """tau(values, mean final AP, *given), with the interval over resampled networks and, of each, resampled seeds."""
    rng = np.random.default_rng(0)
    networks, seeds = final.shape
    drawn = []
    for rows in rng.integers(networks, size=(DRAWS, networks)):
        means = np.take_along_axis(final[rows], rng.integers(seeds, size=(networks, seeds)), axis=1).mean(1)
        drawn.append(tau(values[rows], means, *(each[rows] for each in given)))
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return f"{tau(values, final.mean(1), *given):.2f} ({low:.2f} to {high:.2f})"


def partial_tau(a: np.ndarray, b: np.ndarray, given: np.ndarray) -> float:
    """Kendall's partial rank correlation of `a` and `b` without what `given` explains (Kendall, 1942)."""
    ab, ag, bg = kendall_tau(a, b), kendall_tau(a, given), kendall_tau(b, given)
    unexplained = np.sqrt((1 - ag**2) * (1 - bg**2))
    return (ab - ag * bg) / unexplained if unexplained else float("nan")


if __name__ == "__main__":
    run(main)
