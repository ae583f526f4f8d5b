"""What share of a training step matching and loss take: batch 32, 20 objects a picture, the smallest sub-network.

    python bench/loss_share.py

The step is that of final_train.py on the smallest sub-network of the reference space (configs/voc_mbv3.yaml) at 300 px:
matching, network, losses, gradients, optimizer. Beside it, matching, losses and their gradients with respect to the
network's outputs alone; both must give the same losses. They take turns.
"""

import argparse

import common
import torch

from lib.runtime import run
from lib.training import detection_loss


def main() -> None:
    parser = common.bench_parser(__doc__, "loss_share.json", rounds=15, device=True)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--objects", type=int, default=20, help="in a picture (default: 20)")
    parser.add_argument("--classes", type=int, nargs="+", default=[3, 20])
    args = parser.parse_args()
    clock = common.begin(args)
    common.report(args, [compare(args, classes, clock) for classes in args.classes])


def compare(args: argparse.Namespace, classes: int, clock: common.Clock) -> dict:
    config, detector = common.reference(classes)
    batch = common.random_batch(args.batch, 300, args.objects, classes).to(args.device)
    model = detector.extract(detector.space.smallest()).to(args.device).train()
    with torch.no_grad():
        logits, offsets = (output.requires_grad_() for output in model(batch.images))
    loss = detection_loss(config)

    def losses_alone() -> dict[str, float]:
        logits.grad = offsets.grad = None
        losses = loss(logits, offsets, loss.match(batch.boxes, batch.labels, model.priors))
        sum(losses.values()).backward()
        return {name: value.item() for name, value in losses.items()}

    step = common.plain_step(model, config, config.final, args.device)
    both = (torch.tensor(list(losses.values())) for losses in (losses_alone(), step(batch)))
    gap = common.check_equal("losses", *both)
    runs = {"step": common.timed(lambda: step(batch), clock), "loss": common.timed(losses_alone, clock)}
    seconds = common.take_turns(runs, args.rounds)
    return {
        "classes": classes,
        "step ms": common.spread(1e3 * seconds["step"]),
        "matching and loss ms": common.spread(1e3 * seconds["loss"]),
        "share": common.ratio(seconds["loss"], seconds["step"]),
        "gap": gap,
    }


if __name__ == "__main__":
    run(main)
