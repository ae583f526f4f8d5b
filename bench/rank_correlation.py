"""Whether inherited AP predicts final AP: sub-networks over the whole range of multiply-adds, each trained alone too.

    python bench/rank_correlation.py --supernet runs/lite0/supernet --count 8 --epochs 8

Each is scored with the supernet's weights, on the search split (as the search does) and on the test set. Then
final_train.py trains each by the same short recipe and evaluates it on the test set. Prints a table and Kendall's tau
with a 95% bootstrap interval over the sub-networks: 1 is the same order, 0 none. Writes OUT/rank_correlation.json. A
second call reuses finished trainings.
"""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import common
import numpy as np

from lib import checkpoint
from lib.cli import supernet_checkpoint
from lib.config_io import to_dict
from lib.detector import Supernet, load_supernet
from lib.genotype import Genotype
from lib.runtime import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--supernet", type=Path, required=True, help="folder of a supernet run")
    parser.add_argument("--count", type=int, default=8, help="sub-networks, smallest and largest among them")
    parser.add_argument("--epochs", type=int, default=8, help="of each final training (default: 8)")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, which share the cores (default: 2)")
    parser.add_argument("--out", type=Path, help="folder (default: SUPERNET/../rank_correlation)")
    args = parser.parse_args()
    args.out = args.out or args.supernet.parent / "rank_correlation"
    path = supernet_checkpoint(args.supernet)
    supernet = load_supernet(path)
    detector = supernet.detector
    chosen = common.genotypes_by_cost(detector, supernet.space, args.count)
    on_search, on_test = common.run_scorers(supernet, path.parent)
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(train, f"{i}", genotype, supernet, path, args) for i, genotype in enumerate(chosen)]
        final = [job.result() for job in jobs]
    values = {
        "flops": [detector.cost(genotype).flops / 1e6 for genotype in chosen],
        "search": [on_search(detector, genotype)["metrics"]["AP"] for genotype in chosen],
        "test": [on_test(detector, genotype)["metrics"]["AP"] for genotype in chosen],
        "final": [metrics["AP"] for metrics in final],
    }
    taus = {}
    for name in ("search", "test", "flops"):
        pair = np.array(values[name]), np.array(values["final"])
        low, high = bootstrap(*pair)
        taus[name] = {"tau": kendall_tau(*pair), "low": low, "high": high}
    heads = ("M multiply-adds", "inherited AP (search split)", "inherited AP (test)", "final AP (test)")
    rows = [dict(zip(heads, row, strict=True)) for row in zip(*values.values(), strict=True)]
    args.out /= "rank_correlation.json"
    common.report(args, rows, tau=taus, genotypes=[genotype.to_dict() for genotype in chosen])
    for name, found in taus.items():
        print("tau of {0} and final AP: {tau:.2f}, 95% interval {low:.2f} to {high:.2f}".format(name, **found))


def train(name: str, genotype: Genotype, supernet: Supernet, path: Path, args: argparse.Namespace) -> dict:
    """final_train.py on one genotype; the metrics of its last epoch on the test set."""
    folder = args.out / name
    folder.mkdir(parents=True, exist_ok=True)
    source = {"supernet": {"path": str(path), "sha256": checkpoint.sha256(path)}, "config": to_dict(supernet.config)}
    (folder / "genotype.json").write_text(json.dumps({**genotype.to_dict(), **source}))
    epochs = ["--set", f"final.epochs={args.epochs}", "--set", f"final.eval_every={args.epochs}"]
    common.run_stage("final_train.py", folder, ["--genotype", folder / "genotype.json", *epochs], args.jobs)
    return json.loads((folder / "metrics.json").read_text())


def kendall_tau(a: np.ndarray, b: np.ndarray) -> float:
    """Kendall's tau-b: agreeing pairs minus disagreeing ones, over the pairs that are no tie. NaN if all are ties."""
    x, y = (np.sign(np.subtract.outer(values, values)) for values in (a, b))
    untied = np.sqrt((x != 0).sum() * (y != 0).sum())
    return float((x * y).sum() / untied) if untied else float("nan")


def bootstrap(a: np.ndarray, b: np.ndarray, draws: int = 5000) -> tuple[float, float]:
    """The 95% percentile interval of tau over resampled sub-networks; resamples that are all ties are left out."""
    rng = np.random.default_rng(0)
    taus = [kendall_tau(a[rows], b[rows]) for rows in rng.integers(len(a), size=(draws, len(a)))]
    return tuple(np.nanquantile(taus, [0.025, 0.975]).tolist())


if __name__ == "__main__":
    run(main)
