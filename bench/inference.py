"""Inference of extracted, fused networks against torchvision's ssdlite320_mobilenet_v3_large, per multiply-add.

    python bench/inference.py

Sub-networks of the reference space (configs/voc_mbv3.yaml, 3 classes) at 300 px, extracted, with BatchNorm folded; the
peer in evaluation mode at 320 px, in a process of its own. Random weights; on both sides every prior box is sure of the
background, so that nothing enters NMS. "detect" is from pictures to detections, "network" the network alone. The fused
network must give the elastic one's outputs. All take turns. "faster": how many times more multiply-adds a second.
"""

from functools import partial

import common
import torch
from torch import Tensor

from lib.config import Config
from lib.detector import SSD, ElasticSSD, detect, fuse
from lib.errors import UserError
from lib.genotype import Genotype
from lib.runtime import run

CLASSES = 3
PEER = "ssdlite320"


def main() -> None:
    parser = common.bench_parser(__doc__, "inference.json", rounds=30, device=True)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    args = parser.parse_args()
    clock = common.begin(args)
    config, detector = common.reference(CLASSES)
    detector.predictors.set_class_bias(-common.BACKGROUND)
    pictures = common.random_batch(max(args.batch), 300, 1, CLASSES).images
    space = detector.space
    genotypes = {"smallest": space.smallest(), "median": common.median_genotype(detector), "largest": space.largest()}
    models = {name: fused(name, detector, genotype, config, pictures) for name, genotype in genotypes.items()}
    models = {name: model.to(args.device) for name, model in models.items()}
    flops = {name: detector.cost(genotype).flops for name, genotype in genotypes.items()}

    rows = []
    peer = common.Peer(CLASSES, args)
    peer.call("load", common.random_batch(max(args.batch), common.PEER_SIZE, 1, CLASSES))
    peer.call("silence")
    flops[PEER] = peer.call("cost").flops
    for batch in args.batch:
        images = pictures[:batch].to(args.device)
        runs = {(PEER, what): peer.timed(what, batch) for what in ("detect", "network")}
        for name, model in models.items():
            runs[name, "detect"] = common.timed(partial(detect, model, [images], config, args.device), clock)
            runs[name, "network"] = common.timed(partial(network, model, images), clock)
        seconds = common.take_turns(runs, args.rounds, warm_up=3)
        for (name, what), took in seconds.items():
            faster = (seconds[PEER, what] / flops[PEER]) / (took / flops[name])
            row = {"batch": batch, "what": what, "network": name, "M multiply-adds": flops[name] / 1e6}
            rows.append({**row, "ms": common.spread(1e3 * took), "faster": common.spread(faster)})
    common.report(args, rows)


def fused(name: str, detector: ElasticSSD, genotype: Genotype, config: Config, pictures: Tensor) -> SSD:
    """The sub-network as it is deployed, checked against the elastic one, on the CPU."""
    model = fuse(detector.extract(genotype)).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        elastic = detector.eval()(pictures[:2], genotype)
        plain = model(pictures[:2])
    common.check_equal(f"outputs of {name}", common.outputs(plain), common.outputs(elastic))
    if found := sum(len(d.scores) for d in detect(model, [pictures[:2]], config, common.CPU)):
        raise UserError(f"{name} still finds {found} boxes")
    return model


@torch.inference_mode()
def network(model: SSD, images: Tensor) -> None:
    model(images)


if __name__ == "__main__":
    run(main)
