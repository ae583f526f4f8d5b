"""Training and scoring, in units of one training step of torchvision's ssdlite320_mobilenet_v3_large.

    python bench/yardstick.py

The yardstick: weights=None, weights_backbone=None, num_classes=4 (3 and the background), 320 px, batch 8, with loss and
optimizer, in a process of its own, without channels_last and without the allocator's setting. Beside it, the reference
space (configs/voc_mbv3.yaml with 3 classes) at 300 px, batch 8, on pictures in memory: a supernet step on random
genotypes, without and with distillation from the largest; a final step of the largest sub-network; the score of a
sub-network of median cost on 36 pictures, without the re-estimation of BatchNorm. All take turns.
"""

import copy
import itertools

import common
import torch

from lib.runtime import run

CLASSES = 3
OBJECTS = 10  # in a picture
DISTILL = 0.1  # the weight in configs/voc_mbv3.yaml
IMAGES, BN_IMAGES = 36, 32  # of a score
YARDSTICK = "yardstick: a step of ssdlite320"


def main() -> None:
    parser = common.bench_parser(__doc__, "yardstick.json", rounds=15, device=True)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    clock = common.begin(args)
    config, detector = common.reference(CLASSES)
    batch = common.random_batch(args.batch, 300, OBJECTS, CLASSES)
    largest = detector.extract(detector.space.largest())
    with torch.no_grad():
        elastic = detector.train()(batch.images, detector.space.largest())
        plain = largest.train()(batch.images)
    gap = common.check_equal("outputs of the largest", common.outputs(elastic), common.outputs(plain))

    # Each has weights of its own, so that no step changes what another one works on.
    steps = common.SupernetSteps(copy.deepcopy(detector), config, args.device)
    distilling = common.SupernetSteps(copy.deepcopy(detector), config, args.device, DISTILL)
    final = common.plain_step(largest, config, config.final, args.device)
    data = common.scoring_data(IMAGES, BN_IMAGES, OBJECTS, CLASSES)
    candidate = common.median_genotype(detector)
    score = common.TimedScore(data, config, detector.to(args.device), args.device, clock)
    genotypes = itertools.cycle(common.random_genotypes(detector, args.rounds))
    distilled = itertools.cycle(common.random_genotypes(detector, args.rounds))
    batch = batch.to(args.device)
    peer = common.Peer(CLASSES, args)
    peer.call("load", common.random_batch(args.batch, common.PEER_SIZE, OBJECTS, CLASSES))
    runs = {
        YARDSTICK: peer.timed("train"),
        "supernet step, random genotypes": common.timed(lambda: steps(batch, next(genotypes)), clock),
        "supernet step with distillation": common.timed(lambda: distilling(batch, next(distilled)), clock),
        "final step of the largest": common.timed(lambda: final(batch), clock),
        f"score on {IMAGES} pictures": lambda: score(candidate),
    }
    seconds = common.take_turns(runs, args.rounds)

    rows = [
        {"": name, "ms": common.spread(1e3 * took), "yardsticks": common.ratio(took, seconds[YARDSTICK])}
        for name, took in seconds.items()
    ]
    common.report(args, rows, gap=gap)


if __name__ == "__main__":
    run(main)
