"""What scoring a candidate takes beyond its network: the score on pictures in memory against the network alone.

    python bench/evaluation.py

A sub-network of median cost of the reference space (configs/voc_mbv3.yaml) with 3 and with 80 classes, random weights
and pictures. A score is all that a search worker does for a candidate (extraction, network, NMS, metrics), without the
re-estimation of BatchNorm. The network alone is the same sub-network with BatchNorm re-estimated and folded, on the
same batches; its detections must have the score's AP. "untrained" scores send nearly every box into NMS, the most that
NMS can get; "spread" scores stand apart as a trained detector's do. Both take turns; a ratio of 1.11 means 11% more.
"""

import argparse

import common
import torch

from lib.detector import ElasticSSD, detect, fuse, recalibrate
from lib.elastic import to_device
from lib.metrics import detection_metrics
from lib.runtime import run

OBJECTS = 10  # in a picture
BN_IMAGES = 32
WIDE = 20  # times the usual weights of the class predictors: logits are spread as a trained detector's


def main() -> None:
    parser = common.bench_parser(__doc__, "evaluation.json", rounds=9, device=True)
    parser.add_argument("--images", type=int, default=36)
    parser.add_argument("--classes", type=int, nargs="+", default=[3, 80])
    args = parser.parse_args()
    clock = common.begin(args)
    rows = [compare(args, classes, scores, clock) for classes in args.classes for scores in ("untrained", "spread")]
    common.report(args, rows)


def compare(args: argparse.Namespace, classes: int, scores: str, clock: common.Clock) -> dict:
    config, detector = common.reference(classes)
    genotype = common.median_genotype(detector)
    if scores == "spread":
        spread_scores(detector)
    data = common.scoring_data(args.images, BN_IMAGES, OBJECTS, classes)
    score = common.TimedScore(data, config, detector.to(args.device), args.device, clock)
    score(genotype)

    # The network alone, prepared as the scorer prepares it.
    batches = data["images"][genotype.image_size].split(config.search.batch_size)
    model = to_device(detector.extract(genotype), args.device)
    recalibrate(model, [data["bn_images"][genotype.image_size]], args.device)
    fused = to_device(fuse(model), args.device)
    detections = detect(fused, batches, config, args.device)
    metrics = detection_metrics(detections, data["truth"], data["sizes"], data["classes"])
    both = (torch.tensor([m[name] for name in ("AP", "AP50", "AR100", "mAP")]) for m in (score.metrics, metrics))
    gap = common.check_equal("AP", *both)

    @torch.inference_mode()
    def network() -> None:
        for batch in batches:
            fused(batch.to(args.device))

    runs = {"score": lambda: score(genotype), "network": common.timed(network, clock)}
    seconds = common.take_turns(runs, args.rounds)
    return {
        "classes": classes,
        "scores": scores,
        "detections an image": sum(len(d.scores) for d in detections) / args.images,
        "score ms": common.spread(1e3 * seconds["score"]),
        "network alone ms": common.spread(1e3 * seconds["network"]),
        "ratio": common.ratio(seconds["score"], seconds["network"]),
        "gap": gap,
    }


@torch.no_grad()
def spread_scores(detector: ElasticSSD) -> None:
    for net in detector.predictors.classes:
        net[-1].weight.mul_(WIDE)


if __name__ == "__main__":
    run(main)
