"""Trained networks read back from their checkpoints: a supernet, a final detector, a teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lib import checkpoint, config
from lib.config import Config, DistillConfig
from lib.detector import SSD, ElasticSSD
from lib.errors import UserError
from lib.genotype import Genotype, SearchSpace
from lib.schedule import space_at


class Supernet(NamedTuple):
    """`space` holds the sub-networks that were open at `epoch`, the last one that was trained."""

    detector: ElasticSSD
    config: Config
    classes: tuple[str, ...]
    epoch: int
    space: SearchSpace


class Detector(NamedTuple):
    """A detector of final_train.py, ready to use: `model` is in evaluation mode."""

    model: SSD
    config: Config
    genotype: Genotype
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    epoch: int


def load_supernet(path: Path, mmap: bool = False) -> Supernet:
    """Read a checkpoint of supernet_train.py. `mmap` lets the processes of a machine share its memory."""
    payload = checkpoint.load(path, mmap)
    if "genotype" in payload or "config" not in payload:
        raise UserError(f"{path}: not a supernet's checkpoint; expected last.pt of supernet_train.py")
    settings = config.from_dict(payload["config"], str(path))
    detector = ElasticSSD(settings, len(payload["classes"]))
    load_weights(detector, payload, path)
    epoch = max(payload["epoch"] - (payload["batch"] == 0), 1)
    return Supernet(detector, settings, tuple(payload["classes"]), epoch, space_at(settings, epoch))


def load_detector(path: Path) -> Detector:
    """Read best.pt (or last.pt) of final_train.py; of a run's folder, its best.pt."""
    path = path / "best.pt" if path.is_dir() else path
    if path.suffix == ".onnx":
        raise UserError(f"{path}: an exported detector; expected the checkpoint that it comes from, best.pt")
    payload = checkpoint.load(path)
    if "genotype" not in payload:
        raise UserError(f"{path}: not a detector's checkpoint; expected best.pt of final_train.py")
    settings = config.from_dict(payload["config"], str(path))
    genotype = Genotype.from_dict(payload["genotype"])
    classes = tuple(payload["classes"])
    model = ElasticSSD(settings, len(classes)).extract(genotype)
    load_weights(model, payload, path)
    return Detector(model.eval(), settings, genotype, classes, tuple(payload["category_ids"]), payload["epoch"])


def detector_checkpoint(where: Path) -> Path | None:
    """best.pt in the folder of a final training, or `where` itself if it is a detector's checkpoint; else None."""
    if where.is_dir():
        return where / "best.pt" if (where / "best.pt").is_file() else None
    return where if where.is_file() and "genotype" in checkpoint.load(where, mmap=True) else None


def load_teacher(distill: DistillConfig, key: str, classes: Sequence[str], priors: Mapping[int, Tensor]) -> SSD | None:
    """The detector that `distill.teacher` names, frozen. None if it names none, or never gives it a weight.

    `key` is that setting's name; `priors` (P, 4), by image size, are those of the networks that it would teach. It may
    have another image size, if that gives the same ones. Raises UserError unless these and the classes are equal.
    """
    if not distill.teacher or not distill.active():
        return None
    teacher = load_detector(Path(distill.teacher))
    if teacher.classes != tuple(classes):
        known = ", ".join(teacher.classes)
        raise UserError(f"{key}: {distill.teacher} knows {known}, not {', '.join(classes)}")
    for size, expected in priors.items():
        if not torch.equal(teacher.model.priors, expected):
            raise UserError(f"{key}: {distill.teacher} has other prior boxes than what it would teach at {size} px")
    return teacher.model.requires_grad_(False)


def load_weights(model: nn.Module, payload: dict, path: Path) -> None:
    """The weights of a checkpoint, its moving average where there is one, into `model`."""
    try:
        model.load_state_dict(checkpoint.weights(payload))
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: does not fit the configured network: {reason[:300]}") from None
