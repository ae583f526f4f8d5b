"""What a long ledger costs: seconds to replay it, milliseconds of a proposal, seconds to write the results.

    OMP_NUM_THREADS=1 python bench/ledger.py --out ledger.json

The records are made up for the space of `--cfg`, with all that a real one holds (twelve numbers of COCO's, the scores
on 200 resamples at two rungs). Random search is left out: it replays nothing, it makes its proposals again. CPU times.
Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.budget import Coster
from lib.coco_eval import NAMES
from lib.config import Config
from lib.config_io import load
from lib.controllers import make_controller
from lib.detector import ElasticSSD
from lib.ledger import Ledger, evaluation_key
from lib.report import write_results
from lib.scoring import pack
from lib.search import Search

IDENTITY = {"search": "this", "basis": "basis", "basis_all": "all", "budget": {}, "supernet_sha256": ""}
PROPOSALS = 1000


def write_ledger(path: Path, count: int, coster: Coster, detector: ElasticSSD) -> None:
    rng, packed = random.Random(0), pack(np.random.default_rng(0).uniform(0.3, 0.5, 200))
    with path.open("w") as file:
        for i in range(count):
            genotype = detector.space.sample(rng)
            metrics = {name: rng.random() for name in NAMES} | {"mAP": rng.random(), "mAP_11point": rng.random()}
            record = {
                **{"key": evaluation_key(genotype, "basis"), "basis": "basis", "search": "this", "origin": "random"},
                **{"budget": {}, "genotype": genotype.to_dict(), "status": "ok", "metrics": metrics | coster(genotype)},
                **{"images": 29, "objective": "AP", "resampled": {"14": packed, "29": packed}},
                **{"seconds": 1.0, "worker": "cpu#0", "epoch": 1, "time": 1e9 + i},
            }
            file.write(json.dumps(record, separators=(",", ":")) + "\n")


def measure(path: Path, controller: str, config: Config, coster: Coster, detector: ElasticSSD) -> dict[str, float]:
    config.search.controller = controller
    asked = make_controller(controller, detector.space, 0, lambda g: True, costs=["flops"])
    start = time.process_time()
    with Ledger(path) as ledger:
        config.search.num_epochs, config.search.steps = 1, len(ledger) + PROPOSALS
        search = Search(asked, ledger, config, coster, IDENTITY, 1)
        search.replay()
        replayed = time.process_time()
        for _ in range(PROPOSALS):
            search.propose()
        proposed = time.process_time()
        write_results(search.as_run(path.parent, path), config, "")
        written = time.process_time()
    return {
        "replay_s": replayed - start,
        "proposal_ms": 1000 * (proposed - replayed) / PROPOSALS,
        "write_s": written - proposed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", type=Path, default=Path("configs/voc_mbv3.yaml"))
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 5000, 20_000])
    parser.add_argument("--out", type=Path, default=Path("ledger.json"))
    args = parser.parse_args()
    config = load(args.cfg)
    detector = ElasticSSD(config, 3)
    coster = Coster(detector)
    rows = []
    print("| records | MB | controller | to replay | a proposal | to write the results |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for count in args.counts:
            path = Path(folder) / f"{count}.jsonl"
            write_ledger(path, count, coster, detector)
            size = path.stat().st_size / 1e6
            for controller in ("evo", "pareto-evo"):
                found = measure(path, controller, config, coster, detector)
                rows.append({"records": count, "mb": size, "controller": controller, **found})
                print(f"| {count} | {size:.0f} | {controller} | {found['replay_s']:.2f} s ", end="")
                print(f"| {found['proposal_ms']:.2f} ms | {found['write_s']:.2f} s |", flush=True)
    args.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"\nwrote {args.out}")


if __name__ == "__main__":
    main()
