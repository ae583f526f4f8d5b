"""Where the training of a detector starts: a supernet's slice, pretrained or random weights; and who teaches it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch.utils.data import DataLoader

from lib import checkpoint
from lib.config import Config
from lib.detector import SSD, ElasticSSD
from lib.engine import recalibrate
from lib.errors import UserError
from lib.final_training import FinalTraining, some_images
from lib.genotype import Genotype
from lib.models import Supernet, load_supernet, load_teacher
from lib.pretrained import as_table, load_pretrained
from lib.records import Records
from lib.runlog import say
from lib.runs import supernet_checkpoint
from lib.validate import validate_network


class Start(NamedTuple):
    """`network` is what the genotype is cut from, with random weights unless it is `trained`."""

    network: ElasticSSD
    trained: bool
    supernet: Supernet | None  # of the genotype, where it is known


def find_start(
    origin: Literal["supernet", "scratch", "pretrained"],
    config: Config,
    source: dict,
    classes: Sequence[str],
    load: Path | None,
) -> Start:
    """The network to start from. `source` is the genotype file's content, `load` the supernet's run instead of its."""
    if origin == "supernet":
        path = supernet_path(config, source, load)
        supernet = load_supernet_of(path, classes)
        validate_network(config, supernet.config, ("search_space", "backbone", "head"), path)
        return Start(supernet.detector, True, supernet)
    network = ElasticSSD(config, len(classes))
    if origin == "pretrained":
        if not config.backbone.pretrained_path:
            raise UserError("--from-pretrained: backbone.pretrained_path names nothing; --set it, or the YAML may")
        print("\n".join(as_table(load_pretrained(network, config, classes).rows)))
    return Start(network, origin == "pretrained", None)


def supernet_path(config: Config, source: dict, load: Path | None) -> Path:
    """The checkpoint in `load`, else the configuration's, else that which the genotype file names."""
    searched = source.get("supernet", {})
    if named := load or config.final.supernet_state_dict:
        return supernet_checkpoint(Path(named))
    if not searched.get("path"):
        raise UserError("the genotype names no supernet: name its run with --load DIR, or use --from-scratch")
    path = supernet_checkpoint(Path(searched["path"]))
    if "sha256" in searched and checkpoint.sha256(path) != searched["sha256"]:
        say(f"note: {path} has changed since the search")
    return path


def load_supernet_of(path: Path, classes: Sequence[str]) -> Supernet:
    """The supernet of a checkpoint. Raises UserError unless it was trained on `classes`."""
    supernet = load_supernet(path)
    if supernet.classes != tuple(classes):
        raise UserError(f"{path}: was trained on {', '.join(supernet.classes)}, the data has {', '.join(classes)}")
    return supernet


def find_teacher(start: Start, config: Config, genotype: Genotype, classes: Sequence[str]) -> SSD | None:
    """Who teaches the detector by `final.distill`: a detector, or the supernet's largest sub-network at its image size.

    The latter's BatchNorm is still to be re-estimated. None, and no work at all, where distillation never has weight.
    """
    distill = config.final.distill
    if distill.teacher or not distill.active():
        size = genotype.image_size
        return load_teacher(distill, "final.distill.teacher", classes, {size: start.network.priors(size)})
    if start.supernet is None:
        raise UserError(
            'final.distill.teacher: "" is the largest sub-network of the supernet, and this training starts from none; '
            "name a detector's best.pt"
        )
    largest = replace(start.supernet.space.largest(), image_size=genotype.image_size)
    return start.supernet.detector.extract(largest).eval().requires_grad_(False)


def make_training(
    config: Config,
    folder: Path,
    start: Start,
    genotype: Genotype,
    teacher: SSD | None,
    loader: DataLoader,
    test: Records,
    device: torch.device,
    **options: bool,
) -> FinalTraining:
    """The training of one genotype. BatchNorm is re-estimated wherever the weights are those of another training."""
    model, cost = start.network.extract(genotype), start.network.cost(genotype)
    shared = [model] if start.trained else []
    if teacher is not None:
        teacher.to(device, memory_format=torch.channels_last)
        shared += [] if config.final.distill.teacher else [teacher]
    for net in shared:
        recalibrate(net.to(device), some_images(loader.dataset.records, net.image_size, config), device)
    made_of = config, folder, model, genotype, cost._asdict(), loader, test, device
    return FinalTraining(*made_of, teacher=teacher, **options)
