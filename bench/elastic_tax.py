"""What elasticity costs: a training step of the supernet on a genotype against the same step of `extract(genotype)`.

    python bench/elastic_tax.py --out elastic_tax.json

The reference space (configs/voc_mbv3.yaml with 3 classes), random weights and pictures. A step is matching, network,
losses, gradients and optimizer. Both sides must have the same losses, and the largest also after the steps. They take
turns; the ratio is that of times beside each other. Prints a table, writes JSON.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.reference import SupernetSteps, outputs, plain_step, random_batch, random_genotypes, reference
from bench.turns import add_options, begin, check_equal, print_table, ratio, show, spread, take_turns, timed, write
from lib.datasets import Batch
from lib.detector import SSD, ElasticSSD
from lib.genotype import Genotype

CLASSES = 3
OBJECTS = 10  # a picture
TOLERANCE = 1e-4  # of the largest value: the same sums in another order


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "elastic_tax.json", rounds=7)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--random", type=int, default=8, help="random genotypes (default: 8)")
    args = parser.parse_args()
    clock = begin(args)
    settings, detector = reference(CLASSES)
    batch = random_batch(args.batch, 300, OBJECTS, CLASSES)
    genotypes = {"largest": detector.space.largest(), "smallest": detector.space.smallest()}
    genotypes |= {f"random {i + 1}": g for i, g in enumerate(random_genotypes(detector, args.random))}
    models = {name: detector.extract(genotype) for name, genotype in genotypes.items()}
    gaps = {name: check_outputs(name, detector, genotypes[name], model, batch) for name, model in models.items()}
    elastic = SupernetSteps(detector, settings)
    plain = {name: plain_step(model, settings, settings.supernet) for name, model in models.items()}
    for i in range(2):  # the second one's losses are those after the first one's gradients
        losses = [
            torch.tensor(list(step.values()))
            for step in (elastic(batch, genotypes["largest"]), plain["largest"](batch))
        ]
        check_equal(f"losses of step {i + 1} of the largest", *losses, TOLERANCE)
    rows = {}
    for name, genotype in genotypes.items():
        runs = {
            "supernet": timed(lambda genotype=genotype: elastic(batch, genotype), clock),
            "plain": timed(lambda step=plain[name]: step(batch), clock),
        }
        seconds = take_turns(runs, args.rounds)
        rows[name] = {
            "flops": detector.cost(genotype).flops,
            "supernet_ms": spread(1e3 * seconds["supernet"]),
            "plain_ms": spread(1e3 * seconds["plain"]),
            "ratio": ratio(seconds["supernet"], seconds["plain"]),
            "gap": gaps[name],
        }
    report(args, rows)


def check_outputs(name: str, detector: ElasticSSD, genotype: Genotype, model: SSD, batch: Batch) -> float:
    with torch.no_grad():
        elastic, plain = detector.train()(batch.images, genotype), model.train()(batch.images)
    return check_equal(f"outputs of {name}", outputs(elastic), outputs(plain), TOLERANCE)


def report(args: argparse.Namespace, rows: dict) -> None:
    medians = [row["ratio"]["median"] for row in rows.values()]
    summary = {"median": statistics.median(medians), "worst": max(medians)}
    table = [
        (
            name,
            f"{row['flops'] / 1e6:.0f}",
            show(row["supernet_ms"], 0),
            show(row["plain_ms"], 0),
            show(row["ratio"], 3),
        )
        for name, row in rows.items()
    ]
    print(
        f"batch {args.batch}, 300 px, {CLASSES} classes, {args.threads} threads, {args.rounds} rounds; "
        "medians (10% to 90%)"
    )
    print_table(("genotype", "M multiply-adds", "supernet ms", "plain ms", "ratio"), table)
    print(f"median ratio {summary['median']:.3f}, worst {summary['worst']:.3f}")
    write(args.out, {"batch": args.batch, "rounds": args.rounds, **summary, "genotypes": rows})


if __name__ == "__main__":
    main()
