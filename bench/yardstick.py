"""Training and scoring in yardsticks: one training step of torchvision's ssdlite320_mobilenet_v3_large as it comes.

    python bench/yardstick.py --out yardstick.json

The yardstick: weights=None, weights_backbone=None, num_classes=4 (3 and the background), 320 px, batch 8, loss and
optimizer included, in a process of its own, without channels_last and without the allocator's setting. Ours: the
reference space (configs/voc_mbv3.yaml with 3 classes), 300 px, batch 8, data apart: a supernet step over random
genotypes, plain and with distillation from the largest; a final step of the largest sub-network; the score of a
middling candidate on 36 cached pictures, BatchNorm re-estimation apart. All take turns. Prints a table, writes JSON.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.peer import SIZE, Peer
from bench.reference import SupernetSteps, middling, outputs, plain_step, random_batch, random_genotypes, reference
from bench.score import TimedScore, scoring_data
from bench.turns import add_options, begin, check_equal, print_table, ratio, show, spread, take_turns, timed, write

CLASSES = 3
OBJECTS = 10  # a picture
DISTILL = 0.1  # the weight in configs/voc_mbv3.yaml
IMAGES, BN_IMAGES = 36, 32  # of a score
YARDSTICK = "yardstick: a step of ssdlite320"
MARKS = {
    "supernet step, random genotypes": 0.8,
    "supernet step with distillation": 1.1,
    "final step of the largest": 1.5,
    f"score on {IMAGES} pictures": 1.0,
}
TOLERANCE = 1e-4  # of the largest value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "yardstick.json", rounds=15)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    clock = begin(args)
    settings, detector = reference(CLASSES)
    batch = random_batch(args.batch, 300, OBJECTS, CLASSES)
    largest = detector.extract(detector.space.largest())
    with torch.no_grad():
        elastic, plain = detector.train()(batch.images, detector.space.largest()), largest.train()(batch.images)
    gap = check_equal("outputs of the largest", outputs(elastic), outputs(plain), TOLERANCE)
    genotypes = itertools.cycle(random_genotypes(detector, args.rounds))
    distilled = itertools.cycle(random_genotypes(detector, args.rounds))
    candidate = middling(detector)
    steps, distilling = SupernetSteps(detector, settings), SupernetSteps(copy.deepcopy(detector), settings, DISTILL)
    final = plain_step(largest, settings, settings.final)
    score = TimedScore(scoring_data(IMAGES, BN_IMAGES, OBJECTS, CLASSES), settings, copy.deepcopy(detector), clock)
    with Peer(CLASSES, args.threads, clock) as peer:
        peer.call("load", random_batch(args.batch, SIZE, OBJECTS, CLASSES))
        ours = [
            timed(lambda: steps(batch, next(genotypes)), clock),
            timed(lambda: distilling(batch, next(distilled)), clock),
            timed(lambda: final(batch), clock),
            lambda: score(candidate),
        ]
        runs = {YARDSTICK: peer.timed("train"), **dict(zip(MARKS, ours, strict=True))}
        seconds = take_turns(runs, args.rounds)
    report(args, seconds, gap)


def report(args: argparse.Namespace, seconds: dict, gap: float) -> None:
    rows = {name: {"ms": spread(1e3 * values)} for name, values in seconds.items()}
    for name, mark in MARKS.items():
        rows[name] |= {"yardsticks": ratio(seconds[name], seconds[YARDSTICK]), "mark": mark}
    table = [
        (name, show(row["ms"], 0), show(row["yardsticks"]) if name in MARKS else 1, row.get("mark", ""))
        for name, row in rows.items()
    ]
    print(f"batch {args.batch}, {args.threads} threads, {args.rounds} rounds; medians (10% to 90%)")
    print_table(("", "ms", "yardsticks", "mark"), table)
    write(args.out, {"batch": args.batch, "rounds": args.rounds, "gap": gap, "rows": rows})


if __name__ == "__main__":
    main()
