"""What scoring a candidate takes beyond its network: the score on cached pictures against the network alone on them.

    python bench/evaluation.py --out evaluation.json

The reference space (configs/voc_mbv3.yaml) with 3 and with 80 classes, random weights and pictures. A score is all that
a search worker does for a candidate (cutting it out, network, NMS, metrics), BatchNorm re-estimation apart; the
network alone is the same sub-network with BatchNorm re-estimated and folded, on the same pictures in the same batches.
Both must give the same outputs before NMS. They take turns. Prints a table and a profile by step, writes JSON.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.reference import CPU, middling, outputs, reference
from bench.score import TimedScore, scoring_data
from bench.turns import (
    Clock,
    add_options,
    begin,
    check_equal,
    ratio,
    spread,
    take_turns,
    timed,
)
from lib.engine import recalibrate
from lib.fuse import fuse

OBJECTS = 10  # a picture
BN_IMAGES = 32
TOLERANCE = 1e-3  # of the largest value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "evaluation.json", rounds=7)
    parser.add_argument("--images", type=int, default=36)
    parser.add_argument("--classes", type=int, nargs="+", default=[3, 80])
    args = parser.parse_args()
    clock = begin(args)
    rows = {classes: compare(args, classes, clock) for classes in args.classes}
    print(rows)


def compare(args: argparse.Namespace, classes: int, clock: Clock) -> dict:
    settings, detector = reference(classes)
    genotype = middling(detector)
    data = scoring_data(args.images, BN_IMAGES, OBJECTS, classes)
    batches = data["images"].split(settings.search.batch_size)
    score = TimedScore(data, settings, detector, clock)
    model = detector.extract(genotype).to(memory_format=torch.channels_last)
    recalibrate(model, [data["bn_images"]], CPU)
    fused = fuse(model).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        gap = check_equal("outputs", outputs(fused(batches[0])), outputs(model.eval()(batches[0])), TOLERANCE)

    @torch.inference_mode()
    def network() -> None:
        for batch in batches:
            fused(batch)

    seconds = take_turns({"score": lambda: score(genotype), "network": timed(network, clock)}, args.rounds)
    return {
        "score_ms": spread(1e3 * seconds["score"]),
        "network_ms": spread(1e3 * seconds["network"]),
        "ratio": ratio(seconds["score"], seconds["network"]),
        "gap": gap,
    }


if __name__ == "__main__":
    main()
