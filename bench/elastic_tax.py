"""What elasticity costs: a training step of the supernet on a genotype against the same step of `extract(genotype)`.

    python bench/elastic_tax.py

The reference space (configs/voc_mbv3.yaml with 3 classes), random weights and pictures. A step is matching, network,
losses, gradients and optimizer. Both sides must have the same outputs, and the largest the same losses for two steps.
Each genotype's two sides take turns; a ratio of 1.03 means that the elastic step takes 3% longer.
"""

import statistics
from functools import partial

import common
import torch

from lib.runtime import run

CLASSES = 3
OBJECTS = 10  # in a picture


def main() -> None:
    parser = common.bench_parser(__doc__, "elastic_tax.json", rounds=7, device=True)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--random", type=int, default=8, help="random genotypes (default: 8)")
    args = parser.parse_args()
    clock = common.begin(args)
    config, detector = common.reference(CLASSES)
    batch = common.random_batch(args.batch, 300, OBJECTS, CLASSES)
    genotypes = {"largest": detector.space.largest(), "smallest": detector.space.smallest()}
    genotypes |= {f"random {i + 1}": g for i, g in enumerate(common.random_genotypes(detector, args.random))}

    models, gaps = {}, {}
    for name, genotype in genotypes.items():
        models[name] = detector.extract(genotype).train()
        with torch.no_grad():
            elastic = common.outputs(detector.train()(batch.images, genotype))
            plain = common.outputs(models[name](batch.images))
        gaps[name] = common.check_equal(f"outputs of {name}", elastic, plain)

    supernet_step = common.SupernetSteps(detector, config, args.device)
    steps = {name: common.plain_step(model, config, config.supernet, args.device) for name, model in models.items()}
    batch = batch.to(args.device)
    for i in (1, 2):  # the second step's losses depend on the first step's gradients
        both = supernet_step(batch, genotypes["largest"]), steps["largest"](batch)
        common.check_equal(f"losses of step {i} of the largest", *(torch.tensor(list(x.values())) for x in both))

    rows = []
    for name, genotype in genotypes.items():
        runs = {
            "supernet": common.timed(partial(supernet_step, batch, genotype), clock),
            "plain": common.timed(partial(steps[name], batch), clock),
        }
        seconds = common.take_turns(runs, args.rounds)
        row = {
            "genotype": name,
            "M multiply-adds": detector.cost(genotype).flops / 1e6,
            "supernet ms": common.spread(1e3 * seconds["supernet"]),
            "plain ms": common.spread(1e3 * seconds["plain"]),
            "ratio": common.ratio(seconds["supernet"], seconds["plain"]),
            "gap": gaps[name],
        }
        rows.append(row)
    medians = [row["ratio"]["median"] for row in rows]
    summary = {"median": statistics.median(medians), "worst": max(medians)}
    common.report(args, rows, **summary)
    print(f"median ratio {summary['median']:.3f}, worst {summary['worst']:.3f}")


if __name__ == "__main__":
    run(main)
