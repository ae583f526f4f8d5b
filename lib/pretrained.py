"""Embed a pretrained network in the supernet, as a sub-network that computes the same function.

Kernels go to the centre of larger ones, and hidden channels come first. Surplus hidden channels have zero weights in
the projection and surplus blocks add zero to their input: they have no effect at first, but can learn. So the source's
genotype, and every sub-network that contains it, computes the source's feature maps (as in Net2Net, Chen et al., ICLR
2016).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from lib import UserError, naming
from lib.checkpoint import holds_numbers
from lib.config import Config
from lib.detector import ElasticSSD
from lib.elastic import NORM_TENSORS, ElasticInvertedResidual
from lib.genotype import Block, BlockChoices, Genotype
from lib.head import Predictors
from lib.sources import Source, Tensors, read_source

SETTINGS = ("backbone.pixel_mean", "backbone.pixel_std", "backbone.padding", "backbone.norm_eps")
HEAD_KEYS = ("scales", "aspect_ratios", "squares", "clip", "variances", "extra_activation")
PREDICTOR_SETTINGS = ("backbone.feature_taps", *(f"head.{key}" for key in HEAD_KEYS))
SYNONYMS = {"aeroplane": "airplane", "motorbike": "motorcycle", "sofa": "couch", "tvmonitor": "tv"}  # VOC's, COCO's
FRESH = "starts fresh"
Row = tuple[str, str]  # a part of the supernet, and where its weights come from


class Embedding(NamedTuple):
    """The sub-network that holds the source, and a report."""

    genotype: Genotype
    rows: list[Row]  # what was loaded, what was left out, what starts fresh


def load_pretrained(detector: ElasticSSD, config: Config, classes: Sequence[str]) -> Embedding:
    """Read `config.backbone.pretrained_path` into `detector`, which will be trained on `classes`.

    Raises UserError with the reason if it does not fit.
    """
    source = read_source(config.backbone.pretrained_path)
    with naming(f"{config.backbone.pretrained_path} ({source.name})"):
        embedding = embed(detector, source, config.backbone.pretrained_head, classes)
    rows = [("recognised as", source.name), *embedding.rows]
    # The weights can start the training even if a setting differs.
    noted = dict.fromkeys(SETTINGS, "it was")
    if source.predictors and config.backbone.pretrained_head:
        noted |= dict.fromkeys(PREDICTOR_SETTINGS, "its predictors were")
    for key, what in noted.items():
        value, original = attrgetter(key)(config), attrgetter(key)(source.config)
        if value != original:
            rows.append(("note", f"{key} is {value}, {what} trained with {original}"))
    return Embedding(embedding.genotype, rows)


def as_table(rows: Sequence[Row]) -> list[str]:
    """The report as lines of text."""
    width = max(len(part) for part, _ in rows)
    return ["pretrained weights:", *(f"  {part:{width}}  {what}" for part, what in rows)]


@torch.no_grad()
def embed(
    detector: ElasticSSD, source: Source, with_head: bool = True, classes: Sequence[str] | None = None
) -> Embedding:
    """Copy `source` into `detector`, whose weights must be freshly initialised. Raises UserError.

    If the source names its classes and `classes` are given, classes of the same name keep their logits.
    """
    if not with_head:
        source = replace(source, extras=(), predictors={})
    rows: list[Row] = []
    backbone, eps = detector.backbone, source.config.backbone.norm_eps
    if len(source.stages) != len(backbone.stages):
        raise UserError(f"it has {len(source.stages)} stages, the search space has {len(backbone.stages)}")
    _embed_conv(backbone.stem, source.stem, eps, "stem", rows)
    stages = tuple(_embed_stage(detector, source, i, rows) for i in range(len(source.stages)))
    if backbone.last_conv is not None:
        _embed_conv(backbone.last_conv, source.last_conv, eps, "last 1x1 convolution", rows)
    space = detector.space
    size = source.image_size if source.image_size in space.image_size else space.image_size[-1]
    genotype = Genotype(size, space.backbone_type, stages, _embed_extras(detector, source, rows))
    theirs = source.predictors
    # For feature maps as wide as the source's, which may be narrower than the widest ones.
    ours = detector.predictors.extract(detector.backbone.channels(genotype))
    # Logits are ordered by class: the same classes in another order need them rearranged.
    if theirs and source.classes and classes and tuple(classes) != tuple(source.classes):
        known = list(source.classes)
        numbers = {_spelling(name): known.index(name) for name in known} | {name: known.index(name) for name in known}
        origins = {name: numbers.get(name, numbers.get(_spelling(name))) for name in classes}
        theirs = _with_classes(ours, theirs, len(known), origins)
        found = {name: known[i] for name, i in origins.items() if i is not None}
        parts = {
            "kept": [name if name == origin else f"{name} ({origin})" for name, origin in found.items()],
            FRESH: [name for name in classes if name not in found],
            "left out": [name for name in dict.fromkeys(known) if name not in found.values()],
        }
        texts = [f"{what}: {', '.join(names)}" for what, names in parts.items() if names]
        rows.append(("class logits", "; ".join(texts)))
    rows.append(("predictors", _load_predictors(detector.predictors, ours.state_dict(), theirs, source.head_eps)))
    if source.left_out:
        modules = dict.fromkeys(key.rpartition(".")[0] or key for key in source.left_out)
        rows.append(("left out", ", ".join(modules)))
    return Embedding(genotype, rows)


def _embed_conv(ours: nn.Sequential, theirs: Tensors, eps: float, where: str, rows: list[Row]) -> None:
    """Copy a convolution and its BatchNorm, which must have the same shape."""
    weight = ours[0].weight
    _check_tensors(theirs, {"0.weight": tuple(weight.shape), **_norm_shapes("1", len(weight))}, where)
    _load(ours, theirs, eps)
    rows.append((where, "loaded"))


def _embed_stage(detector: ElasticSSD, source: Source, i: int, rows: list[Row]) -> tuple[Block, ...]:
    """The blocks of the genotype that hold stage `i` of the source."""
    blocks = detector.backbone.stages[i]
    choices = detector.space.stages[i]
    theirs = source.stages[i]
    if len(theirs) > len(blocks):
        raise UserError(f"stage {i} has {len(theirs)} blocks, the search space at most {len(blocks)}")
    eps = source.config.backbone.norm_eps
    loaded = []
    for j, tensors in enumerate(theirs):
        loaded.append(_embed_block(blocks[j], tensors, choices.block, eps, f"stage {i}, block {j}"))
    for surplus in blocks[len(loaded) :]:
        nn.init.zeros_(surplus.project_norm.weight)  # the residual branch is zero: the block is the identity
        nn.init.zeros_(surplus.project_norm.bias)
    # If the space has no such depth, the next one is filled up with the cheapest block, as the identity.
    depth = min(d for d in choices.depth if d >= len(loaded))
    cheapest = Block(choices.block.expand[0], choices.block.kernel[0])
    what = "loaded as " + " ".join(f"({block.expand:g}, {block.kernel})" for block in loaded)
    if len(blocks) > len(loaded):
        what += f", {len(blocks) - len(loaded)} more as the identity"
    rows.append((f"stage {i}", what))
    return (*loaded, *[cheapest] * (depth - len(loaded)))


def _embed_block(
    ours: ElasticInvertedResidual, theirs: Tensors, choices: BlockChoices, eps: float, where: str
) -> Block:
    """Copy one inverted residual block. Returns the smallest choice that holds it."""
    # Nothing is written before all is known to fit: a block that is refused must stay as it is.
    hidden, kernel = _check_block(ours, theirs, where)
    border = (ours.depthwise.weight.shape[-1] - kernel) // 2
    _load(ours, {**theirs, "depthwise.weight": F.pad(theirs["depthwise.weight"], [border] * 4)}, eps)
    expand = min(e for e in choices.expand if ours.hidden_channels(e) >= hidden)
    return Block(expand, min(k for k in choices.kernel if k >= kernel))


def _check_block(ours: ElasticInvertedResidual, theirs: Tensors, where: str) -> tuple[int, int]:
    """Hidden channels and kernel of a block. Raises UserError if they are too large, or anything else differs."""
    filters = theirs.get("depthwise.weight")
    if filters is None or filters.ndim != 4:
        raise UserError(f"{where}: depthwise.weight: expected the weights of a convolution")
    # Hidden channels and a border of the kernel can be added without changing the function; all else must agree.
    hidden = len(filters) if ours.expand is not None else ours.in_channels
    kernel = filters.shape[-1]
    room, largest = ours.project.in_channels, ours.depthwise.weight.shape[-1]
    if hidden > room:
        raise UserError(f"{where}: {hidden} hidden channels, the largest expand ratio has {room}")
    if kernel not in range(3, largest + 1, 2):
        raise UserError(f"{where}: a kernel of {kernel}, the search space has at most {largest} and odd ones only")
    shapes = {"project.weight": (ours.out_channels, hidden, 1, 1), "depthwise.weight": (hidden, 1, kernel, kernel)}
    shapes |= _norm_shapes("depthwise_norm", hidden) | _norm_shapes("project_norm", ours.out_channels)
    for size in (3, 5):
        if (name := f"depthwise.{size + 2}to{size}_matrix") in theirs:
            shapes[name] = (size * size, size * size)
    if ours.expand is not None:
        shapes |= {"expand.weight": (hidden, ours.in_channels, 1, 1), **_norm_shapes("expand_norm", hidden)}
    if ours.squeeze_excitation is not None:
        squeezed = ours.squeeze_excitation.squeeze_channels(hidden)
        for name, rows, columns in (("fc1", squeezed, hidden), ("fc2", hidden, squeezed)):
            shapes[f"squeeze_excitation.{name}.weight"] = (rows, columns, 1, 1)
            shapes[f"squeeze_excitation.{name}.bias"] = (rows,)
    layers = {name.partition(".")[0] for name in shapes}
    if surplus := [name for name in theirs if name.partition(".")[0] not in layers]:
        raise UserError(f"{where}: {surplus[0]}: the search space has no such layer")
    _check_tensors(theirs, shapes, where)
    return hidden, kernel


def _norm_shapes(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{part}": (channels,) for part in NORM_TENSORS}


def _check_tensors(theirs: Tensors, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise UserError unless these tensors have these shapes and finite real numbers, of variances none below 0."""
    for name, shape in shapes.items():
        found = tuple(theirs[name].shape) if name in theirs else "nothing"
        if found != shape:
            raise UserError(f"{where}: {name}: weights of {found}, expected {shape}")
        tensor = theirs[name]
        real = holds_numbers(tensor) and bool(tensor.isfinite().all())
        if not real or (name.endswith("running_var") and bool((tensor < 0).any())):
            raise UserError(f"{where}: {name}: expected finite real numbers, of variances none below 0")


def _load(ours: nn.Module, theirs: Tensors, eps: float) -> None:
    """Copy the tensors, or the first channels that both have. The weights of our surplus inputs become zero."""
    theirs = dict(theirs)
    for name, module in ours.named_modules():
        var = theirs.get(f"{name}.running_var")
        # The weight of a BatchNorm makes up for another eps, so that the function is the same.
        if isinstance(module, nn.BatchNorm2d) and var is not None:
            theirs[f"{name}.weight"] = theirs[f"{name}.weight"] * ((var + module.eps) / (var + eps)).sqrt()
    for name, tensor in ours.state_dict().items():
        if name in theirs:
            corner = tuple(slice(min(sizes)) for sizes in zip(tensor.shape, theirs[name].shape, strict=True))
            tensor[corner[:1]] = 0
            tensor[corner] = theirs[name][corner]


def _embed_extras(detector: ElasticSSD, source: Source, rows: list[Row]) -> tuple[Block, ...]:
    """The head of the genotype that holds the source; the report is added to `rows`."""
    head = []
    for i, choices in enumerate(detector.space.head):
        block = Block(choices.expand[-1], choices.kernel[-1])
        what = FRESH
        if i < len(source.extras):
            # An extra block that does not fit is no reason to refuse the backbone.
            try:
                ours, theirs = detector.extras.blocks[i], source.extras[i]
                block = _embed_block(ours, theirs, choices, source.head_eps, f"extra block {i}")
                what = f"loaded as ({block.expand:g}, {block.kernel})"
            except UserError as misfit:
                what = f"{FRESH} ({misfit})"
        head.append(block)
        rows.append((f"extra block {i}", what))
    return tuple(head)


def _load_predictors(predictors: nn.Module, ours: Tensors, theirs: Tensors, eps: float) -> str:
    """Copy the tensors of the same name and shape as `ours`: not the class logits of another number of classes."""
    fitting = {name: t for name, t in theirs.items() if name in ours and t.shape == ours[name].shape}
    floating = {name: tuple(t.shape) for name, t in ours.items() if name in fitting and t.is_floating_point()}
    _check_tensors(fitting, floating, "predictors")
    _load(predictors, fitting, eps)
    if not fitting:
        return FRESH
    fresh = sorted({name.rpartition(".")[0] for name in ours if name not in fitting})
    return f"loaded; {FRESH}: {', '.join(fresh)}" if fresh else "loaded"


def _spelling(name: str) -> str:
    """A name without case, spaces and hyphens, in COCO's words: tvmonitor is tv, Dining-Table is diningtable."""
    plain = re.sub(r"[\W_]", "", name.lower()) or name
    return SYNONYMS.get(plain, plain)


def _with_classes(ours: Predictors, theirs: Tensors, known: int, origins: Mapping[str, int | None]) -> Tensors:
    """`theirs`, of `known` classes, with class logits from `origins`: the background's and these, else `ours`."""
    result = dict(theirs)
    pairs = {0: 0, **{to: i + 1 for to, i in enumerate(origins.values(), start=1) if i is not None}}
    for level, net in enumerate(ours.classes):
        for part in ("weight", "bias"):
            name = f"classes.{level}.{len(net) - 1}.{part}"
            merged = getattr(net[-1], part).unflatten(0, (-1, len(origins) + 1)).clone()  # (priors, classes + 1, ...)
            # With another number of priors in a cell none of these logits has a counterpart.
            if name in theirs and theirs[name].shape == (len(merged) * (known + 1), *merged.shape[2:]):
                merged[:, list(pairs)] = theirs[name].unflatten(0, (-1, known + 1))[:, list(pairs.values())]
                result[name] = merged.flatten(0, 1)
    return result
