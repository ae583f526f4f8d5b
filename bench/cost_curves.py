"""How the time of a supernet step and of a candidate's score grows: with batch, resolution, depth, and search images.

    python bench/cost_curves.py

A step is forward, loss, backward and optimizer on made-up pictures of 3 objects. Kernels, widths and depths are the
largest; the curve of depth gives all stages the same depth. A score is BatchNorm re-estimated on `--bn-images`, then
detection and AP on so many pictures. The points of a curve take turns; each is also shown relative to the first.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import common

from lib.config import Config
from lib.config_io import read_config
from lib.detector import ElasticSSD
from lib.genotype import Genotype
from lib.runtime import run
from lib.scoring import Scorer

CLASSES, OBJECTS = 3, 3
Curve = dict[str, Callable[[], object]]  # a label and what to time, for each point


def main() -> None:
    parser = common.bench_parser(__doc__, "cost_curves.json", rounds=5, device=True)
    parser.add_argument("--cfg", type=Path, default=common.REFERENCE)
    parser.add_argument("--batch", type=int, default=8, help="where it does not vary (default: 8)")
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--size", type=int, default=300, help="pixels a side, where they do not vary (default: 300)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[160, 224, 300, 384])
    parser.add_argument("--images", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--bn-images", type=int, default=32)
    args = parser.parse_args()
    clock = common.begin(args)
    rows = []
    for name, curve in curves(read_config(args.cfg), args).items():
        seconds = common.take_turns({at: common.timed(work, clock) for at, work in curve.items()}, args.rounds)
        first = next(iter(seconds.values()))
        for at, took in seconds.items():
            row = {"curve": name, "at": at, "seconds": common.spread(took), "of the first": common.ratio(took, first)}
            rows.append(row)
    common.report(args, rows)


def curves(config: Config, args: argparse.Namespace) -> dict[str, Curve]:
    config.search_space.image_size_choice = sorted({args.size, *args.sizes})
    config.search.bn_images = args.bn_images
    detector = ElasticSSD(config, CLASSES)
    largest = replace(detector.space.largest(), image_size=args.size)
    depths = sorted({depth for stage in detector.space.stages for depth in stage.depth})
    steps = common.SupernetSteps(detector, config, args.device)

    def step(genotype: Genotype, batch: int = args.batch) -> Callable[[], object]:
        pictures = common.random_batch(batch, genotype.image_size, OBJECTS, CLASSES)
        return partial(steps, pictures.to(args.device), genotype)

    def score(images: int) -> Callable[[], object]:
        data = common.scoring_data(images, args.bn_images, OBJECTS, CLASSES, args.size)
        return partial(Scorer(data, config, args.device), detector, largest)

    def at_depth(depth: int) -> Genotype:
        return replace(largest, stages=tuple(stage[:depth] for stage in largest.stages))

    return {
        "step by batch": {f"{batch}": step(largest, batch) for batch in args.batches},
        "step by pixels a side": {f"{size}": step(replace(largest, image_size=size)) for size in args.sizes},
        "step by depth": {f"{depth}": step(at_depth(depth)) for depth in depths},
        "score by images": {f"{images}": score(images) for images in args.images},
    }


if __name__ == "__main__":
    run(main)
