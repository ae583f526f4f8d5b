"""How the time of a supernet step and of a candidate's score grows: with batch, resolution, depth, and search images.

    python bench/cost_curves.py --cfg configs/voc_mbv3.yaml --threads 2 --out cost_curves.json

A step is forward, loss, backward and optimizer on made-up pictures of 3 objects. Kernels, widths and depths are the
largest, but for the curve of depth, which has all depths the same. A score is BatchNorm re-estimated on `--bn-images`,
then detection and AP on so many images. All points of a curve are timed in turns, each relative to the first point's
time in the same turn; the table has medians (10% to 90%). Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.reference import random_batch
from bench.score import scoring_data
from bench.turns import Clock, add_options, begin, print_table, ratio, show, spread, take_turns, timed, write
from lib.config import Config
from lib.config_io import load
from lib.detector import ElasticSSD
from lib.genotype import Genotype
from lib.scoring import Scorer
from lib.training import Trainer, detection_loss

CPU, CLASSES, OBJECTS = torch.device("cpu"), 3, 3
Point = tuple[str, Callable[[], object]]


def training_step(detector: ElasticSSD, genotype: Genotype, batch: int, config: Config) -> Callable[[], object]:
    data = random_batch(batch, genotype.image_size, OBJECTS, CLASSES)
    trainer = Trainer(detector, config.supernet, CPU, 10**6)
    loss = detection_loss(config)
    priors = detector.priors(genotype.image_size)

    def losses():
        yield loss(*detector(data.images, genotype), loss.match(data.boxes, data.labels, priors))

    return lambda: trainer.update(losses())


def score(detector: ElasticSSD, genotype: Genotype, images: int, config: Config) -> Callable[[], object]:
    data = scoring_data(images, config.search.bn_images, OBJECTS, CLASSES, genotype.image_size)
    scorer = Scorer(data, config, CPU)
    return lambda: scorer.race(detector, genotype)


def at_depth(genotype: Genotype, depth: int) -> Genotype:
    return replace(genotype, stages=tuple(stage[:depth] for stage in genotype.stages))


def curves(config: Config, args: argparse.Namespace) -> dict[str, list[Point]]:
    config.search_space.image_size_choice = sorted(args.sizes)
    config.search.bn_images = args.bn_images
    detector = ElasticSSD(config, CLASSES)
    largest = replace(detector.space.largest(), image_size=args.size)
    depths = sorted({d for stage in detector.space.stages for d in stage.depth})
    return {
        "step by batch": [(f"{b}", training_step(detector, largest, b, config)) for b in args.batches],
        "step by pixels a side": [
            (f"{s}", training_step(detector, replace(largest, image_size=s), args.batch, config)) for s in args.sizes
        ],
        "step by depth": [(f"{d}", training_step(detector, at_depth(largest, d), args.batch, config)) for d in depths],
        "score by images": [(f"{n}", score(detector, largest, n, config)) for n in args.images],
    }


def time_in_turns(points: Sequence[Point], rounds: int, clock: Clock) -> list[dict]:
    seconds = take_turns({label: timed(work, clock) for label, work in points}, rounds)
    first = seconds[points[0][0]]
    return [{"at": at, "seconds": spread(took), "ratio": ratio(took, first)} for at, took in seconds.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", type=Path, default=Path("configs/voc_mbv3.yaml"))
    add_options(parser, "cost_curves.json", rounds=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--size", type=int, default=300)
    parser.add_argument("--sizes", type=int, nargs="+", default=[160, 224, 300, 384])
    parser.add_argument("--images", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--bn-images", type=int, default=32)
    args = parser.parse_args()
    clock, found = begin(args), {}
    print(f"{args.cfg}, {args.threads} threads; batch {args.batch} and {args.size} px where nothing else is said\n")
    for name, points in curves(load(args.cfg), args).items():
        found[name] = time_in_turns(points, args.rounds, clock)
    rows = [(name, r["at"], show(r["seconds"], 3), show(r["ratio"])) for name, curve in found.items() for r in curve]
    print_table(("curve", "at", "seconds", "of the first"), rows)
    write(args.out, {"cfg": str(args.cfg), "curves": found})


if __name__ == "__main__":
    main()
