"""Does inherited AP foretell final AP? The found sub-network, the largest, the smallest and random ones, trained alike.

    python bench/sub_networks.py --search runs/bccd/search --epochs 12 --random 3

Each is scored with the supernet's weights on the search split, then trained by final_train.py with the same recipe and
evaluated on the test set. Prints a table and writes OUT/sub_networks.json. What is done already is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lib import config  # noqa: E402
from lib.datasets import load_records, load_split  # noqa: E402
from lib.genotype import Genotype  # noqa: E402
from lib.models import load_supernet  # noqa: E402
from lib.scoring import Scorer, prepare_scoring_data  # noqa: E402


def pick(found: Genotype, space, count: int) -> dict[str, Genotype]:
    rng = random.Random(0)
    drawn = {f"random {i + 1}": space.sample(rng) for i in range(count)}
    return {"found": found, "largest": space.largest(), "smallest": space.smallest(), **drawn}


def inherited(networks: dict[str, Genotype], best: dict, supernet, path: Path) -> dict[str, dict]:
    """Metrics of each network with the supernet's weights, as the search scores them."""
    settings = config.from_dict(best["config"])
    records = load_records(settings.data, "train", settings.seed)
    split = load_split(path.parent / "split.json", records)
    scorer = Scorer(prepare_scoring_data(records, *split, settings), settings, torch.device("cpu"))
    return {name: scorer(supernet.detector, genotype) for name, genotype in networks.items()}


def train(name: str, genotype: Genotype, best: dict, out: Path, epochs: int, threads: int) -> dict:
    """final_train.py on one genotype; the last epoch's metrics on the test set."""
    folder = out / name.replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "genotype.json").write_text(json.dumps({**best, **genotype.to_dict()}))
    flags = ["--genotype", folder / "genotype.json", "--train-dir", folder, "--resume"]
    flags += ["--set", f"final.epochs={epochs}", "--set", f"final.eval_every={epochs}"]
    command = [sys.executable, ROOT / "final_train.py", *flags]
    with (folder / "stdout.txt").open("a") as file:
        env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        subprocess.run(list(map(str, command)), check=True, stdout=file, stderr=file, env=env)
    return json.loads((folder / "metrics.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--search", type=Path, required=True, help="folder of a search, with best.json")
    parser.add_argument("--epochs", type=int, default=12, help="of each final training")
    parser.add_argument("--random", type=int, default=3, help="random sub-networks")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time")
    parser.add_argument("--out", type=Path, help="default: SEARCH/../sub_networks")
    args = parser.parse_args()
    out = args.out or args.search.parent / "sub_networks"
    best = json.loads((args.search / "best.json").read_text())
    path = Path(best["supernet"]["path"])
    supernet = load_supernet(path)
    networks = pick(Genotype.from_dict(best), supernet.space, args.random)
    scores = inherited(networks, best, supernet, path)
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = {n: pool.submit(train, n, g, best, out, args.epochs, threads) for n, g in networks.items()}
        final = {name: job.result() for name, job in jobs.items()}
    rows = []
    print("| sub-network | M multiply-adds | inherited AP | inherited AP50 | final AP | final AP50 |")
    print("|---|---|---|---|---|---|")
    for name in networks:
        a, b = scores[name], final[name]
        rows.append({"name": name, "flops": a["flops"], "inherited": a["AP"], "final": b["AP"]})
        cells = (f"{v:.3f}" for v in (a["AP"], a["AP50"], b["AP"], b["AP50"]))
        print(f"| {name} | {a['flops'] / 1e6:.1f} | {' | '.join(cells)} |")
    (out / "sub_networks.json").write_text(json.dumps({"epochs": args.epochs, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
