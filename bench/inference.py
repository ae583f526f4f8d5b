"""Inference of extracted, fused networks against torchvision's ssdlite320_mobilenet_v3_large, per multiply-add.

    python bench/inference.py --out inference.json

Sub-networks of the reference space (configs/voc_mbv3.yaml, 3 classes) at 300 px, cut out, BatchNorm folded; the peer
in evaluation mode as it comes, at 320 px, in a process of its own. Random weights, every prior box made sure of the
background on both sides, so that nothing enters NMS. Two comparisons: from pictures to detections, and the network
alone. The fused network must give the outputs of the elastic one, and both sides' multiply-adds are counted by the same
counter. All take turns. "faster" is how many times more multiply-adds a second. Prints a table, writes JSON.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.peer import BACKGROUND, SIZE, Peer
from bench.reference import CPU, middling, outputs, random_batch, reference
from bench.turns import add_options, begin, check_equal, print_table, show, spread, take_turns, timed, write
from lib.config import Config
from lib.detector import SSD, Cost, ElasticSSD, detect, fuse
from lib.errors import UserError
from lib.genotype import Genotype

CLASSES = 3
TOLERANCE = 1e-4  # of the largest value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "inference.json", rounds=30)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    args = parser.parse_args()
    clock = begin(args)
    settings, detector = reference(CLASSES)
    detector.predictors.set_class_bias(-BACKGROUND)
    pictures = random_batch(max(args.batch), 300, 1, CLASSES).images
    space = detector.space
    genotypes = {"smallest": space.smallest(), "middling": middling(detector), "largest": space.largest()}
    models = {name: fused(name, detector, genotype, settings, pictures) for name, genotype in genotypes.items()}
    flops = {name: detector.cost(genotype).flops for name, genotype in genotypes.items()}
    rows = []
    with Peer(CLASSES, args.threads, clock) as peer:
        peer.call("load", random_batch(max(args.batch), SIZE, 1, CLASSES))
        peer.call("silence")
        theirs: Cost = peer.call("cost")
        for batch in args.batch:
            images = pictures[:batch]
            runs = {("ssdlite320", what): peer.timed(what, batch) for what in ("detect", "network")}
            for name, model in models.items():
                runs[name, "detect"] = timed(lambda m=model, x=images: detect(m, [x], settings, CPU), clock)
                runs[name, "network"] = timed(lambda m=model, x=images: network(m, x), clock)
            seconds = take_turns(runs, args.rounds, warm_up=3)
            rows += [row(batch, *key, seconds, flops | {"ssdlite320": theirs.flops}) for key in runs]
    report(args, rows)


def fused(name: str, detector: ElasticSSD, genotype: Genotype, settings: Config, pictures: Tensor) -> SSD:
    """The sub-network as it is deployed; it must give the elastic one's outputs and find nothing."""
    model = fuse(detector.extract(genotype)).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        elastic = detector.eval()(pictures[:2], genotype)
        check_equal(f"outputs of {name}", outputs(model(pictures[:2])), outputs(elastic), TOLERANCE)
    if found := sum(len(d.scores) for d in detect(model, [pictures[:2]], settings, CPU)):
        raise UserError(f"{name} still finds {found} boxes")
    return model


@torch.inference_mode()
def network(model: SSD, images: Tensor) -> None:
    model(images)


def row(batch: int, name: str, what: str, seconds: dict[tuple[str, str], np.ndarray], flops: dict[str, int]) -> dict:
    own, theirs = seconds[name, what], seconds["ssdlite320", what]
    return {
        "batch": batch,
        "network": name,
        "what": what,
        "flops": flops[name],
        "ms": spread(1e3 * own),
        "faster": spread((theirs / flops["ssdlite320"]) / (own / flops[name])),
    }


def report(args: argparse.Namespace, rows: list[dict]) -> None:
    print(f"{args.threads} threads, {args.rounds} rounds; medians (10% to 90%)")
    table = [
        (r["batch"], r["what"], r["network"], f"{r['flops'] / 1e6:.0f}", show(r["ms"], 1), show(r["faster"]))
        for r in rows
    ]
    print_table(("batch", "what", "network", "M multiply-adds", "ms", "times faster per multiply-add"), table)
    write(args.out, {"rounds": args.rounds, "rows": rows})


if __name__ == "__main__":
    main()
