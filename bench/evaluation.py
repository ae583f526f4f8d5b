"""What scoring a candidate takes beyond its network: the score on cached pictures against the network alone on them.

    python bench/evaluation.py --out evaluation.json

The middling sub-network of the reference space (configs/voc_mbv3.yaml) with 3 and with 80 classes, random weights and
pictures. A score is all that a search worker does for a candidate (cutting it out, network, NMS, metrics), BatchNorm
re-estimation apart; the network alone is the same sub-network with BatchNorm re-estimated and folded, on the same
pictures in the same batches. Its detections must have the score's AP. Untrained, nearly every box enters NMS, which is
the most that NMS can take; "spread" scores are drawn out as in a trained detector, so that few classes of a picture
stand out. All take turns. Prints a table, writes JSON.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.reference import CPU, middling, reference
from bench.score import TimedScore, scoring_data
from bench.turns import (
    Clock,
    add_options,
    begin,
    check_equal,
    print_table,
    ratio,
    show,
    spread,
    take_turns,
    timed,
    write,
)
from lib.detector import ElasticSSD, detect, fuse, recalibrate
from lib.metrics import detection_metrics

OBJECTS = 10  # a picture
BN_IMAGES = 32
WIDE = 20  # times the usual weights of the class predictors: logits are spread as a trained detector's
MARKS = {3: 1.15, 80: 1.3}
TOLERANCE = 1e-4  # of AP


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "evaluation.json", rounds=9)
    parser.add_argument("--images", type=int, default=36)
    parser.add_argument("--classes", type=int, nargs="+", default=[3, 80])
    args = parser.parse_args()
    clock = begin(args)
    rows = [compare(args, classes, scores, clock) for classes in args.classes for scores in ("untrained", "spread")]
    print(f"{args.images} pictures, {args.threads} threads, {args.rounds} rounds; medians (10% to 90%)")
    table = [
        (row["classes"], row["scores"], show(row["score_ms"], 0), show(row["network_ms"], 0), show(row["ratio"]))
        for row in rows
    ]
    print_table(("classes", "scores", "score ms", "network alone ms", "ratio"), table)
    write(args.out, {"images": args.images, "rounds": args.rounds, "marks": MARKS, "rows": rows})


def compare(args: argparse.Namespace, classes: int, scores: str, clock: Clock) -> dict:
    settings, detector = reference(classes)
    genotype = middling(detector)
    if scores == "spread":
        spread_scores(detector)
    data = scoring_data(args.images, BN_IMAGES, OBJECTS, classes)
    batches = data["images"].split(settings.search.batch_size)
    score = TimedScore(data, settings, detector, clock)
    model = detector.extract(genotype).to(memory_format=torch.channels_last)
    recalibrate(model, [data["bn_images"]], CPU)
    fused = fuse(model).to(memory_format=torch.channels_last)
    detections = detect(fused, batches, settings, CPU)
    metrics = detection_metrics(detections, data["truth"], data["sizes"], data["classes"])
    score(genotype)
    names = ("AP", "AP50", "AR100", "mAP")
    pair = (torch.tensor([found[name] for name in names]) for found in (score.metrics, metrics))
    gap = check_equal("AP", *pair, TOLERANCE)

    @torch.inference_mode()
    def network() -> None:
        for batch in batches:
            fused(batch)

    seconds = take_turns({"score": lambda: score(genotype), "network": timed(network, clock)}, args.rounds)
    return {
        "classes": classes,
        "scores": scores,
        "detections_per_image": sum(len(d.scores) for d in detections) / args.images,
        "score_ms": spread(1e3 * seconds["score"]),
        "network_ms": spread(1e3 * seconds["network"]),
        "ratio": ratio(seconds["score"], seconds["network"]),
        "gap": gap,
    }


@torch.no_grad()
def spread_scores(detector: ElasticSSD) -> None:
    for net in detector.predictors.classes:
        net[-1].weight.mul_(WIDE)


if __name__ == "__main__":
    main()
