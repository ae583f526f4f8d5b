"""Does inherited AP foretell final AP? Sub-networks spread over the range of multiply-adds, each trained alone as well.

    python bench/rank_correlation.py --supernet runs/lite0/supernet --count 8 --epochs 8

Each is scored with the supernet's weights, on the search split (as the search sees it) and on the test set. Then
final_train.py trains each, all by the same short recipe, and evaluates it on the test set. Prints a table and Kendall's
tau with a bootstrap interval over the sub-networks, and writes OUT/rank_correlation.json. What is done already is not
done again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.inherited import scorers, spread
from lib import checkpoint
from lib.cli import supernet_checkpoint
from lib.config_io import to_dict
from lib.detector import Supernet, load_supernet
from lib.genotype import Genotype

ROOT = Path(__file__).resolve().parent.parent


def kendall_tau(a: Sequence[float], b: Sequence[float]) -> float:
    """Kendall's tau-b: agreeing pairs less disagreeing ones, over pairs that neither side ties. NaN if all tie."""

    def sign(x: float) -> int:
        return (x > 0) - (x < 0)

    pairs = [(sign(a[i] - a[j]), sign(b[i] - b[j])) for i, j in itertools.combinations(range(len(a)), 2)]
    untied = sum(x != 0 for x, _ in pairs) * sum(y != 0 for _, y in pairs)
    return sum(x * y for x, y in pairs) / untied**0.5 if untied else float("nan")


def bootstrap(a: Sequence[float], b: Sequence[float], draws: int = 5000) -> tuple[float, float]:
    """The 95% percentile interval of tau over resampled sub-networks."""
    rng, taus = random.Random(0), []
    while len(taus) < draws:
        rows = [rng.randrange(len(a)) for _ in a]
        tau = kendall_tau([a[i] for i in rows], [b[i] for i in rows])
        if tau == tau:
            taus.append(tau)
    taus.sort()
    return taus[int(0.025 * draws)], taus[int(0.975 * draws)]


def train(name: str, genotype: Genotype, supernet: Supernet, path: Path, args: argparse.Namespace) -> dict:
    """final_train.py on one genotype; the metrics of its last epoch on the test set."""
    folder = args.out / name
    folder.mkdir(parents=True, exist_ok=True)
    source = {"supernet": {"path": str(path), "sha256": checkpoint.sha256(path)}, "config": to_dict(supernet.config)}
    (folder / "genotype.json").write_text(json.dumps({**genotype.to_dict(), **source}))
    flags = ["--genotype", folder / "genotype.json", "--train-dir", folder, "--resume"]
    flags += ["--set", f"final.epochs={args.epochs}", "--set", f"final.eval_every={args.epochs}"]
    env = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs))}
    with (folder / "stdout.txt").open("a") as file:
        command = list(map(str, [sys.executable, ROOT / "final_train.py", *flags]))
        subprocess.run(command, check=True, stdout=file, stderr=file, env=env)
    return json.loads((folder / "metrics.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--supernet", type=Path, required=True, help="folder of a supernet run")
    parser.add_argument("--count", type=int, default=8, help="sub-networks, the smallest and the largest among them")
    parser.add_argument("--epochs", type=int, default=8, help="of each final training")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, which share the cores")
    parser.add_argument("--out", type=Path, help="default: SUPERNET/../rank_correlation")
    args = parser.parse_args()
    args.out = args.out or args.supernet.parent / "rank_correlation"
    path = supernet_checkpoint(args.supernet)
    supernet = load_supernet(path)
    chosen = spread(supernet.detector, supernet.space, args.count)
    on_search, on_test = scorers(supernet, path, supernet.config)
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(train, f"{i}", g, supernet, path, args) for i, g in enumerate(chosen)]
        final = [job.result() for job in jobs]
    search, test = ([scorer(supernet.detector, g) for g in chosen] for scorer in (on_search, on_test))
    print(
        "| M multiply-adds | inherited AP (search split) | inherited AP (test) | final AP (test) | final AP50 (test) |"
    )
    print("|---|---|---|---|---|")
    for s, t, f in zip(search, test, final, strict=True):
        cells = (f"{v:.3f}" for v in (s["AP"], t["AP"], f["AP"], f["AP50"]))
        print(f"| {s['flops'] / 1e6:.1f} | {' | '.join(cells)} |")
    columns = {"flops": search, "search": search, "test": test, "final": final}
    values = {name: [row["flops" if name == "flops" else "AP"] for row in rows] for name, rows in columns.items()}
    taus = {}
    for name in ("search", "test", "flops"):
        low, high = bootstrap(values[name], values["final"])
        taus[name] = {"tau": kendall_tau(values[name], values["final"]), "low": low, "high": high}
        print(f"tau of {name} and final AP: {taus[name]['tau']:.2f}, 95% interval {low:.2f} to {high:.2f}")
    result = {"epochs": args.epochs, "values": values, "tau": taus, "genotypes": [g.to_dict() for g in chosen]}
    checkpoint.write_text(args.out / "rank_correlation.json", json.dumps(result, indent=1) + "\n")
    print(f"wrote {args.out / 'rank_correlation.json'}")


if __name__ == "__main__":
    main()
