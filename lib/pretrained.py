"""Embed a pretrained network in the supernet, as a sub-network that computes the same function.

Kernels go to the centre of larger ones, and hidden channels come first. Surplus hidden channels have zero weights in
the projection and surplus blocks add zero to their input: they have no effect at first, but can learn. So the source's
genotype, and every sub-network that contains it, computes the source's feature maps (as in Net2Net, Chen et al., ICLR
2016).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.checkpoint import holds_numbers
from lib.config import Config
from lib.detector import ElasticSSD
from lib.elastic import ElasticDepthwiseConv, ElasticInvertedResidual, ElasticSqueezeExcitation
from lib.errors import UserError
from lib.genotype import Block, BlockChoices, Genotype
from lib.sources import Source, Tensors, read_source

HEAD_EPS = 1e-5  # of BatchNorm in the head, in every detector: `backbone.norm_eps` is the backbone's alone
FRESH = "starts fresh"
MATRICES = {5: "depthwise.7to5_matrix", 3: "depthwise.5to3_matrix"}  # by the side of the kernel that they make
Row = tuple[str, str]  # a part of the supernet, and where its weights come from


class Embedding(NamedTuple):
    """The sub-network that holds the source, and a report."""

    genotype: Genotype
    rows: list[Row]  # what was loaded, what was left out, what starts fresh


class Misfit(Exception):
    """Why a source cannot be a sub-network of the supernet."""


def load_pretrained(detector: ElasticSSD, config: Config, classes: Sequence[str]) -> Embedding:
    """Read `config.backbone.pretrained_path` into `detector`, which will be trained on `classes`.

    Raises UserError with the reason if it does not fit.
    """
    source = read_source(config.backbone.pretrained_path)
    try:
        embedding = embed(detector, source, config.backbone.pretrained_head, classes)
    except Misfit as misfit:
        raise UserError(f"{config.backbone.pretrained_path} ({source.name}): {misfit}") from None
    rows = [("recognised as", source.name), *embedding.rows]
    # The weights can start the training even if a setting differs.
    pairs = [("backbone", key, source.settings, "it was") for key in source.settings._fields]
    if source.head and config.backbone.pretrained_head:
        pairs += [("head", key, source.head, "its predictors were") for key in ("scales", "aspect_ratios", "squares")]
    for section, key, settings, what in pairs:
        value, original = getattr(getattr(config, section), key), getattr(settings, key)
        if value != original:
            rows.append(("note", f"{section}.{key} is {value}, {what} trained with {original}"))
    return Embedding(embedding.genotype, rows)


def as_table(rows: Sequence[Row]) -> list[str]:
    """The report as lines of text."""
    width = max(len(part) for part, _ in rows)
    return ["pretrained weights:", *(f"  {part:{width}}  {what}" for part, what in rows)]


@torch.no_grad()
def embed(
    detector: ElasticSSD, source: Source, with_head: bool = True, classes: Sequence[str] | None = None
) -> Embedding:
    """Copy `source` into `detector`, whose weights must be freshly initialised. Raises Misfit.

    If the source names its classes and `classes` are given, classes of the same name keep their logits.
    """
    if not with_head:
        source = replace(source, extras=(), predictors={})
    rows: list[Row] = []
    stages = _embed_backbone(detector, source, rows)
    head = _embed_extras(detector, source, rows)
    predictors = source.predictors
    # Logits are ordered by class: the same classes in another order need them rearranged.
    if predictors and source.classes and classes and tuple(classes) != source.classes:
        predictors = _with_classes(detector, predictors, source.classes, classes)
        parts = {
            "kept": [name for name in classes if name in source.classes],
            FRESH: [name for name in classes if name not in source.classes],
            "left out": [name for name in source.classes if name not in classes],
        }
        texts = [f"{what}: {', '.join(names)}" for what, names in parts.items() if names]
        rows.append(("class logits", "; ".join(texts)))
    rows.append(("predictors", _load_predictors(detector, predictors)))
    if source.left_out:
        modules = Counter(key.rpartition(".")[0] or key for key in source.left_out)
        rows.append(("left out", ", ".join(f"{module} ({count} tensors)" for module, count in modules.items())))
    space = detector.space
    return Embedding(Genotype(space.image_size[-1], space.backbone_type, stages, head), rows)


def _embed_backbone(detector: ElasticSSD, source: Source, rows: list[Row]) -> tuple[tuple[Block, ...], ...]:
    """The stages of the genotype that holds the source; the report is added to `rows`."""
    backbone, eps = detector.backbone, source.settings.norm_eps
    if len(source.stages) != len(backbone.stages):
        raise Misfit(f"it has {len(source.stages)} stages, the search space has {len(backbone.stages)}")
    _load_conv_norm(backbone.stem, source.stem, eps, "stem")
    rows.append(("stem", "loaded"))
    stages = tuple(_embed_stage(detector, source, i, rows) for i in range(len(source.stages)))
    if backbone.last_conv is not None:
        _load_conv_norm(backbone.last_conv, source.last_conv, eps, "last 1x1 convolution")
        rows.append(("last 1x1 convolution", "loaded"))
    return stages


def _embed_stage(detector: ElasticSSD, source: Source, i: int, rows: list[Row]) -> tuple[Block, ...]:
    """The blocks of the genotype that hold stage `i` of the source."""
    blocks = detector.backbone.stages[i]
    choices = detector.space.stages[i]
    theirs = source.stages[i]
    if len(theirs) > len(blocks) and not source.elastic:
        raise Misfit(f"stage {i} has {len(theirs)} blocks, the search space at most {len(blocks)}")
    loaded = [
        _embed_block(ours, tensors, choices.block, source, f"stage {i}, block {j}")
        for j, (ours, tensors) in enumerate(zip(blocks, theirs, strict=False))
    ]
    for surplus in blocks[len(loaded) :]:
        nn.init.zeros_(surplus.project_norm.weight)  # the residual branch is zero: the block is the identity
        nn.init.zeros_(surplus.project_norm.bias)
    # If the space has no such depth, the next one is filled up with the cheapest block, as the identity.
    depth = min(d for d in choices.depth if d >= len(loaded))
    cheapest = Block(choices.block.expand[0], choices.block.kernel[0])
    spelled = " ".join(f"({block.expand:g}, {block.kernel})" for block in loaded)
    what = f"{len(loaded)} of {len(theirs)} blocks loaded as {spelled}"
    if len(blocks) > len(loaded):
        what += f", {len(blocks) - len(loaded)} more as the identity"
    rows.append((f"stage {i}", what))
    return (*loaded, *[cheapest] * (depth - len(loaded)))


def _embed_block(
    ours: ElasticInvertedResidual, theirs: Tensors, choices: BlockChoices, source: Source, where: str
) -> Block:
    """Copy one inverted residual block. Returns the smallest choice that holds it."""
    hidden = _check_block(ours, theirs, where)
    room = ours.project.in_channels
    if hidden > room and not source.elastic:
        raise Misfit(f"{where}: {hidden} hidden channels, the largest expand ratio has {room}")
    hidden = min(hidden, room)  # an elastic source is cut to fit
    # The depthwise convolution comes first: it may not fit, and a block that is refused must stay as it is.
    kernel = _load_depthwise(ours.depthwise, theirs, hidden, where)
    eps = source.settings.norm_eps
    _load_norm(ours.depthwise_norm, theirs, "depthwise_norm", eps, hidden)
    if ours.expand is not None:
        ours.expand.weight[:hidden] = theirs["expand.weight"][:hidden]
        _load_norm(ours.expand_norm, theirs, "expand_norm", eps, hidden)
    if ours.squeeze_excitation is not None:
        _load_squeeze(ours.squeeze_excitation, theirs, hidden)
    # Zeros keep surplus hidden channels from reaching the output.
    ours.project.weight.zero_()
    ours.project.weight[:, :hidden] = theirs["project.weight"][:, :hidden]
    _load_norm(ours.project_norm, theirs, "project_norm", eps, ours.out_channels)
    expand = min(e for e in choices.expand if ours.hidden_channels(e) >= hidden)
    return Block(expand, min(k for k in choices.kernel if k >= kernel))


def _check_block(ours: ElasticInvertedResidual, theirs: Tensors, where: str) -> int:
    """Hidden channels of a block. Raises Misfit if anything but these and its kernel differs from `ours`."""
    for part in ("expand", "squeeze_excitation"):
        found, expected = (any(name.startswith(f"{part}.") for name in theirs), getattr(ours, part) is not None)
        if found != expected:
            raise Misfit(f"{where}: {part}: {found}, the search space has {expected}")
    # Only hidden channels can be added without changing the function; all else must agree.
    hidden = _sizes(theirs, "project.weight", where)[1] if ours.expand is not None else ours.in_channels
    kernel = _sizes(theirs, "depthwise.weight", where)[-1]
    if kernel not in (3, 5, 7):
        raise Misfit(f"{where}: depthwise.weight: a kernel of {kernel}, expected 3, 5 or 7")
    shapes = {"project.weight": (ours.out_channels, hidden, 1, 1), "depthwise.weight": (hidden, 1, kernel, kernel)}
    shapes |= _norm_shapes("depthwise_norm", hidden) | _norm_shapes("project_norm", ours.out_channels)
    shapes |= {name: (k * k, k * k) for k, name in MATRICES.items() if name in theirs}
    if ours.expand is not None:
        shapes |= {"expand.weight": (hidden, ours.in_channels, 1, 1), **_norm_shapes("expand_norm", hidden)}
    if ours.squeeze_excitation is not None:
        squeezed = _sizes(theirs, "squeeze_excitation.fc1.weight", where)[0]
        for name, rows, columns in (("fc1", squeezed, hidden), ("fc2", hidden, squeezed)):
            shapes[f"squeeze_excitation.{name}.weight"] = (rows, columns, 1, 1)
            shapes[f"squeeze_excitation.{name}.bias"] = (rows,)
    _check_tensors(theirs, shapes, where)
    return hidden


def _sizes(theirs: Tensors, name: str, where: str) -> tuple[int, ...]:
    if name not in theirs or theirs[name].ndim != 4:
        raise Misfit(f"{where}: {name}: expected the weights of a convolution")
    return tuple(theirs[name].shape)


def _norm_shapes(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{part}": (channels,) for part in ("weight", "bias", "running_mean", "running_var")}


def _check_tensors(theirs: Tensors, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise Misfit unless these tensors have these shapes and finite real numbers, of variances none below 0."""
    for name, shape in shapes.items():
        found = tuple(theirs[name].shape) if name in theirs else "nothing"
        if found != shape:
            raise Misfit(f"{where}: {name}: weights of {found}, expected {shape}")
        tensor = theirs[name]
        real = holds_numbers(tensor) and bool(tensor.isfinite().all())
        if not real or (name.endswith("running_var") and bool((tensor < 0).any())):
            raise Misfit(f"{where}: {name}: expected finite real numbers, of variances none below 0")


def _load_depthwise(ours: ElasticDepthwiseConv, theirs: Tensors, hidden: int, where: str) -> int:
    """Centre the source's kernels in ours, or transform larger ones down to ours. Returns the loaded kernels' side."""
    weight = theirs["depthwise.weight"][:hidden]
    largest = ours.weight.shape[-1]
    # A smaller kernel of Once-for-All is the centre of the next larger one, transformed (Cai et al. 2020).
    while weight.shape[-1] > largest:
        smaller = weight.shape[-1] - 2
        matrix = theirs.get(f"depthwise.{smaller + 2}to{smaller}_matrix")
        if matrix is None:
            raise Misfit(f"{where}: a kernel of {weight.shape[-1]}, the search space has at most {largest}")
        weight = F.linear(weight[:, :, 1:-1, 1:-1].flatten(1), matrix).view(-1, 1, smaller, smaller)
    ours.weight[:hidden] = F.pad(weight, [(largest - weight.shape[-1]) // 2] * 4)
    for name, matrix in ours.named_parameters():
        if name.endswith("_matrix") and f"depthwise.{name}" in theirs:
            matrix.copy_(theirs[f"depthwise.{name}"])
    return weight.shape[-1]


def _load_squeeze(ours: ElasticSqueezeExcitation, theirs: Tensors, hidden: int) -> None:
    """Surplus hidden channels do not enter the squeeze, and surplus squeezed channels have no effect."""
    squeezed = min(len(theirs["squeeze_excitation.fc1.bias"]), len(ours.fc1.bias))
    for name, layer, inputs, outputs in (("fc1", ours.fc1, hidden, squeezed), ("fc2", ours.fc2, squeezed, hidden)):
        layer.weight[:outputs].zero_()
        layer.weight[:outputs, :inputs] = theirs[f"squeeze_excitation.{name}.weight"][:outputs, :inputs]
        layer.bias[:outputs] = theirs[f"squeeze_excitation.{name}.bias"][:outputs]


def _load_norm(ours: nn.BatchNorm2d, theirs: Tensors, name: str, eps: float, channels: int) -> None:
    """Copy the first channels of a BatchNorm. The weight makes up for another eps, so that the function is the same."""
    var = theirs[f"{name}.running_var"][:channels]
    ours.weight[:channels] = theirs[f"{name}.weight"][:channels] * ((var + ours.eps) / (var + eps)).sqrt()
    for part in ("bias", "running_mean", "running_var"):
        getattr(ours, part)[:channels] = theirs[f"{name}.{part}"][:channels]


def _load_conv_norm(ours: nn.Sequential, theirs: Tensors, eps: float, where: str) -> None:
    """Copy a convolution and its BatchNorm, which must have the same shape."""
    channels = len(ours[0].weight)
    _check_tensors(theirs, {"0.weight": tuple(ours[0].weight.shape), **_norm_shapes("1", channels)}, where)
    ours[0].weight.copy_(theirs["0.weight"])
    _load_norm(ours[1], theirs, "1", eps, channels)


def _embed_extras(detector: ElasticSSD, source: Source, rows: list[Row]) -> tuple[Block, ...]:
    """The head of the genotype that holds the source; the report is added to `rows`."""
    source = replace(source, settings=source.settings._replace(norm_eps=HEAD_EPS))
    head = []
    for i, choices in enumerate(detector.space.head):
        block = Block(choices.expand[-1], choices.kernel[-1])
        what = FRESH
        if i < len(source.extras):
            # An extra block that does not fit is no reason to refuse the backbone.
            try:
                block = _embed_block(detector.extras.blocks[i], source.extras[i], choices, source, f"extra block {i}")
                what = f"loaded as ({block.expand:g}, {block.kernel})"
            except Misfit as misfit:
                what = f"{FRESH} ({misfit})"
        head.append(block)
        rows.append((f"extra block {i}", what))
    return tuple(head)


def _load_predictors(detector: ElasticSSD, theirs: Tensors) -> str:
    """Copy the tensors of the same name and shape: all but the class logits if the number of classes differs."""
    ours: dict[str, Tensor] = detector.predictors.state_dict()
    fitting = {name: t for name, t in theirs.items() if name in ours and t.shape == ours[name].shape}
    floating = {name: tuple(t.shape) for name, t in ours.items() if name in fitting and t.is_floating_point()}
    _check_tensors(fitting, floating, "predictors")
    detector.predictors.load_state_dict(fitting, strict=False)
    if not fitting:
        return FRESH
    fresh = sorted({name.rpartition(".")[0] for name in ours if name not in fitting})
    return f"loaded; {FRESH}: {', '.join(fresh)}" if fresh else "loaded"


def _with_classes(detector: ElasticSSD, theirs: Tensors, known: Sequence[str], wanted: Sequence[str]) -> Tensors:
    """`theirs` with class logits for `wanted`: the background's and those of `known` classes, else `detector`'s."""
    result = dict(theirs)
    for level, net in enumerate(detector.predictors.classes):
        for part in ("weight", "bias"):
            name = f"classes.{level}.{len(net) - 1}.{part}"
            merged = getattr(net[-1], part).unflatten(0, (-1, len(wanted) + 1)).clone()  # (priors, classes + 1, ...)
            fitting = (len(merged) * (len(known) + 1), *merged.shape[2:])
            # Another number of priors in a cell: none of these logits has a counterpart.
            if name not in theirs or theirs[name].shape != fitting:
                continue
            given = theirs[name].unflatten(0, (-1, len(known) + 1))
            merged[:, 0] = given[:, 0]
            for label, class_name in enumerate(wanted, start=1):
                if class_name in known:
                    merged[:, label] = given[:, known.index(class_name) + 1]
            result[name] = merged.flatten(0, 1)
    return result
