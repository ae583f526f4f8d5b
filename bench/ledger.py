"""What a long ledger costs: seconds to replay it, milliseconds for a proposal.

    OMP_NUM_THREADS=1 python bench/ledger.py

The records are made up for the space of `--cfg`, with all that a real one holds (COCO's twelve numbers, the scores on
200 resamples). Random search is left out: it replays nothing, it makes its proposals again. CPU times.
"""

import json
import random
import tempfile
import time
from pathlib import Path

import common
import numpy as np

from lib.budget import Coster
from lib.coco_eval import NAMES
from lib.config import Config
from lib.config_io import read_config
from lib.controllers import make_controller
from lib.detector import ElasticSSD
from lib.ledger import Ledger, evaluation_key
from lib.runtime import run
from lib.scoring import pack
from lib.search import Identity, Search

IDENTITY = Identity(
    search="this", supernet=Path(), supernet_sha256="", budget={}, basis="some images", basis_all="all images"
)
PROPOSALS = 1000
IMAGES = 29  # that scored each candidate


def main() -> None:
    parser = common.bench_parser(__doc__, "ledger.json")
    parser.add_argument("--cfg", type=Path, default=common.REFERENCE)
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 5000, 20_000], help="records of the ledgers")
    args = parser.parse_args()
    config = read_config(args.cfg)
    detector = ElasticSSD(config, 3)
    coster = Coster(detector)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for count in args.counts:
            path = Path(folder) / f"{count}.jsonl"
            write_ledger(path, count, coster, detector)
            for controller in ("evo", "pareto-evo"):
                config.search.controller = controller
                found = measure(path, config, coster, detector)
                rows.append({"records": count, "MB": path.stat().st_size / 1e6, "controller": controller, **found})
    common.report(args, rows)


def write_ledger(path: Path, count: int, coster: Coster, detector: ElasticSSD) -> None:
    rng = random.Random(0)
    resampled = {f"{IMAGES}": pack(np.random.default_rng(0).uniform(0.3, 0.5, 200))}
    with path.open("w") as file:
        for i in range(count):
            genotype = detector.space.sample(rng)
            metrics = {name: rng.random() for name in (*NAMES, "mAP", "mAP_11point")} | coster(genotype)
            record = {
                "key": evaluation_key(genotype, IDENTITY.basis),
                "basis": IDENTITY.basis,
                "search": IDENTITY.search,
                "origin": "random",
                "budget": IDENTITY.budget,
                "genotype": genotype.to_dict(),
                "status": "ok",
                "metrics": metrics,
                "images": IMAGES,
                "objective": "AP",
                "resampled": resampled,
                "seconds": 1.0,
                "worker": "cpu#0",
                "epoch": 1,
                "time": 1e9 + i,
            }
            file.write(json.dumps(record, separators=(",", ":")) + "\n")


def measure(path: Path, config: Config, coster: Coster, detector: ElasticSSD) -> dict[str, float]:
    controller = make_controller(config.search, detector.space, 0, lambda genotype: True)
    start = time.process_time()
    with Ledger(path) as ledger:
        config.search.num_epochs = 1
        config.search.steps = len(ledger.records()) + PROPOSALS
        search = Search(controller, ledger, config, coster, IDENTITY, 1)
        search.replay()
        replayed = time.process_time()
        for _ in range(PROPOSALS):
            search.propose()
        proposed = time.process_time()
    return {"s to replay": replayed - start, "ms for a proposal": 1000 * (proposed - replayed) / PROPOSALS}


if __name__ == "__main__":
    run(main)
