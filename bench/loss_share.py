"""What matching and loss take of a training step: a batch of 32 with 20 objects a picture, the smallest sub-network.

    python bench/loss_share.py --out loss_share.json

The step is that of final_train.py on the smallest sub-network of the reference space (configs/voc_mbv3.yaml) at 300 px:
matching, network, losses, gradients, optimizer. Beside it stand matching, losses and their gradients with respect to
the network's outputs alone; both must give the same losses. They take turns. Prints a table, writes JSON.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.reference import plain_step, random_batch, reference
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
from lib.training import detection_loss

TOLERANCE = 1e-4  # of the largest loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "loss_share.json", rounds=15)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--objects", type=int, default=20, help="a picture (default: 20)")
    parser.add_argument("--classes", type=int, nargs="+", default=[3, 20])
    args = parser.parse_args()
    clock = begin(args)
    rows = {classes: compare(args, classes, clock) for classes in args.classes}
    print(f"batch {args.batch}, {args.objects} objects a picture, 300 px, {args.threads} threads, {args.rounds} rounds")
    table = [
        (classes, show(row["step_ms"], 0), show(row["loss_ms"], 1), show(row["share"], 3))
        for classes, row in rows.items()
    ]
    print_table(("classes", "step ms", "matching and loss ms", "share"), table)
    write(args.out, {"batch": args.batch, "objects": args.objects, "rounds": args.rounds, "classes": rows})


def compare(args: argparse.Namespace, classes: int, clock: Clock) -> dict:
    settings, detector = reference(classes)
    batch = random_batch(args.batch, 300, args.objects, classes)
    model = detector.extract(detector.space.smallest()).train()
    with torch.no_grad():
        logits, offsets = (output.requires_grad_() for output in model(batch.images))
    loss = detection_loss(settings)

    def losses_alone() -> dict[str, float]:
        logits.grad = offsets.grad = None
        losses = loss(logits, offsets, loss.match(batch.boxes, batch.labels, model.priors))
        sum(losses.values()).backward()
        return {name: value.item() for name, value in losses.items()}

    step = plain_step(model, settings, settings.final)
    both = [torch.tensor(list(losses.values())) for losses in (losses_alone(), step(batch))]
    gap = check_equal("losses", *both, TOLERANCE)
    seconds = take_turns({"step": timed(lambda: step(batch), clock), "loss": timed(losses_alone, clock)}, args.rounds)
    return {
        "step_ms": spread(1e3 * seconds["step"]),
        "loss_ms": spread(1e3 * seconds["loss"]),
        "share": ratio(seconds["loss"], seconds["step"]),
        "gap": gap,
    }


if __name__ == "__main__":
    main()
