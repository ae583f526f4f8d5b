"""Trained networks read back from their checkpoints: a supernet, a final detector."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch import nn

from lib import checkpoint, config
from lib.config import Config
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
    """Read best.pt (or last.pt) of final_train.py."""
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


def load_weights(model: nn.Module, payload: dict, path: Path) -> None:
    """The weights of a checkpoint, its moving average where there is one, into `model`."""
    try:
        model.load_state_dict(checkpoint.weights(payload))
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: does not fit the configured network: {reason[:300]}") from None
