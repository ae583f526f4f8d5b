"""How the time of a supernet step and of a candidate's score grows: with batch, resolution, depth, and search images.

    python bench/cost_curves.py --cfg configs/voc_mbv3.yaml --threads 2 --out cost_curves.json

A step is forward, loss, backward and optimizer on made-up pictures of 3 objects. Kernels, widths and depths are the
largest, but for the curve of depth, which has all depths the same. A score is BatchNorm re-estimated on `--bn-images`,
then detection and AP on so many images. All points of a curve are timed in turns, each relative to the first point's
time in the same turn; the table has medians of these ratios, with their quartiles. Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.config import Config, load
from lib.detector import ElasticSSD
from lib.engine import Trainer, detection_loss
from lib.genotype import Genotype
from lib.runlog import progress
from lib.runtime import keep_freed_memory
from lib.scoring import Scorer

CPU, CLASSES, OBJECTS = torch.device("cpu"), 3, 3
Point = tuple[str, Callable[[], object]]


def made_up(images: int, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pictures (N, 3, S, S), boxes (N, 3, 4) in [0, 1], labels (N, 3)."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8, generator=generator)
    corner = torch.rand(images, OBJECTS, 2, generator=generator) * 0.6
    boxes = torch.cat((corner, corner + 0.1 + 0.3 * torch.rand(images, OBJECTS, 2, generator=generator)), -1)
    return pictures, boxes, torch.randint(1, CLASSES + 1, (images, OBJECTS), generator=generator)


def training_step(detector: ElasticSSD, genotype: Genotype, batch: int, config: Config) -> Callable[[], object]:
    pictures, boxes, labels = made_up(batch, genotype.image_size)
    trainer = Trainer(detector, config.supernet, CPU, 10**6)
    loss = detection_loss(config)
    priors = detector.priors(genotype.image_size)

    def losses():
        yield loss(*detector(pictures, genotype), loss.match(boxes, labels, priors))

    return lambda: trainer.update(losses())


def score(detector: ElasticSSD, genotype: Genotype, images: int, config: Config) -> Callable[[], object]:
    pictures, boxes, labels = made_up(max(images, config.search.bn_images), genotype.image_size)
    ignore = torch.zeros(OBJECTS, dtype=torch.bool)
    truth = [
        {"boxes": b * genotype.image_size, "labels": n, "ignore": ignore} for b, n in zip(boxes, labels, strict=True)
    ]
    data = {
        "bn_images": pictures[: config.search.bn_images],
        "images": pictures[:images],
        "truth": truth[:images],
        "sizes": [[genotype.image_size] * 2] * images,
        "classes": [f"class {c}" for c in range(CLASSES)],
    }
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


def time_in_turns(points: Sequence[Point], rounds: int, name: str) -> list[dict]:
    seconds: list[list[float]] = []
    for turn in progress(range(rounds + 1), name):
        taken = []
        for _, work in points:
            start = time.perf_counter()
            work()
            taken.append(time.perf_counter() - start)
        if turn:  # the first one warms up
            seconds.append(taken)
    rows = []
    for k, (label, _) in enumerate(points):
        low, median, high = statistics.quantiles([taken[k] / taken[0] for taken in seconds], n=4)
        at = statistics.median(taken[k] for taken in seconds)
        rows.append({"at": label, "seconds": at, "ratio": median, "quartiles": [low, high]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", type=Path, default=Path("configs/voc_mbv3.yaml"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--size", type=int, default=300)
    parser.add_argument("--sizes", type=int, nargs="+", default=[160, 224, 300, 384])
    parser.add_argument("--images", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--bn-images", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("cost_curves.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    found = {}
    print(f"{args.cfg}, {args.threads} threads; batch {args.batch} and {args.size} px where nothing else is said\n")
    print("| curve | at | seconds | of the first (quartiles) |\n|---|---|---|---|")
    for name, points in curves(load(args.cfg), args).items():
        found[name] = time_in_turns(points, args.rounds, name)
        for row in found[name]:
            low, high = row["quartiles"]
            print(f"| {name} | {row['at']} | {row['seconds']:.3f} | {row['ratio']:.2f} ({low:.2f} to {high:.2f}) |")
    args.out.write_text(json.dumps({"cfg": str(args.cfg), "threads": args.threads, "curves": found}, indent=1) + "\n")
    print(f"\nwrote {args.out}")


if __name__ == "__main__":
    main()
