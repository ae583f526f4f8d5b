"""A pretrained network becomes a sub-network of the supernet, with the function that it had.

Kernels go to the centre of larger ones, hidden channels come first, and what the source lacks has no effect at first:
surplus hidden channels project with zero weights, surplus blocks add nothing to their input. Both can learn. So the
source's genotype, and every sub-network that contains it, computes the source's feature maps (as Net2Net's, Chen et
al., ICLR 2016).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.config import Config
from lib.detector import ElasticSSD
from lib.elastic import ElasticDepthwiseConv, ElasticInvertedResidual, ElasticSqueezeExcitation
from lib.errors import UserError
from lib.genotype import Block, BlockChoices, Genotype, StageChoices
from lib.sources import Source, Tensors, read_source

HEAD_EPS = 1e-5  # of BatchNorm in the head, on both sides: `backbone.norm_eps` is the backbone's alone
Row = tuple[str, str]  # a part of the supernet, and where its weights come from


class Embedding(NamedTuple):
    """`genotype` is the sub-network that holds the source; `rows` say what was loaded, left out, started fresh."""

    genotype: Genotype
    rows: list[Row]


def load_pretrained(detector: ElasticSSD, config: Config, classes: Sequence[str]) -> Embedding:
    """Read `config.backbone.pretrained_path` into `detector`, which is to know `classes`.

    Raises UserError, saying why, if it does not fit.
    """
    source = read_source(config.backbone.pretrained_path)
    try:
        embedding = embed(detector, source, config.backbone.pretrained_head, classes)
    except Misfit as misfit:
        raise UserError(f"{config.backbone.pretrained_path} ({source.name}): {misfit}") from None
    rows = [("recognised as", source.name), *embedding.rows, *_differences(config, source)]
    return Embedding(embedding.genotype, rows)


def as_table(rows: Sequence[Row]) -> list[str]:
    width = max(len(part) for part, _ in rows)
    return ["pretrained weights:", *(f"  {part:{width}}  {what}" for part, what in rows)]


class Misfit(Exception):
    """Why a source cannot be a sub-network of the supernet."""


@torch.no_grad()
def embed(
    detector: ElasticSSD, source: Source, with_head: bool = True, classes: Sequence[str] | None = None
) -> Embedding:
    """Copy `source` into `detector`, whose other weights are expected to be fresh ones. Raises Misfit.

    Where both have names of their `classes`, those of the same name keep their logits, in whatever order they come.
    """
    backbone, space = detector.backbone, detector.space
    if len(source.stages) != len(backbone.stages):
        raise Misfit(f"it has {len(source.stages)} stages, the search space has {len(backbone.stages)}")
    _load_conv_norm(backbone.stem, source.stem, source.eps, "stem")
    rows, stages = [("stem", "loaded")], []
    for i, (blocks, theirs) in enumerate(zip(backbone.stages, source.stages, strict=True)):
        stage, what = _embed_stage(blocks, theirs, space.stages[i], source, f"stage {i}")
        stages.append(stage)
        rows.append((f"stage {i}", what))
    if backbone.last_conv is not None:
        _load_conv_norm(backbone.last_conv, source.last_conv, source.eps, "last 1x1 convolution")
        rows.append(("last 1x1 convolution", "loaded"))
    head = [Block(choices.expand[-1], choices.kernel[-1]) for choices in space.head]
    if with_head and source.extras:
        in_head = replace(source, eps=HEAD_EPS)
        for i, choices in enumerate(space.head):
            fits = i < len(source.extras)
            head[i], what = _try_extra(detector.extras.blocks[i], in_head, i, choices) if fits else (head[i], FRESH)
            rows.append((f"extra block {i}", what))
    else:
        rows.append(("extra blocks", FRESH))
    theirs, wanted = source.predictors if with_head else {}, classes and tuple(classes)
    if theirs and source.classes and wanted and wanted != source.classes:
        theirs = _with_classes(detector, theirs, source.classes, wanted)
        rows.append(("class logits", _shared_classes(source.classes, wanted)))
    rows.append(("predictors", _load_predictors(detector, theirs)))
    rows += [("left out", what) for what in _left_out(source)]
    return Embedding(Genotype(space.image_size[-1], space.backbone_type, tuple(stages), tuple(head)), rows)


FRESH = "starts fresh"


def _embed_stage(
    blocks: Sequence[ElasticInvertedResidual],
    theirs: Sequence[Tensors],
    choices: StageChoices,
    source: Source,
    where: str,
) -> tuple[tuple[Block, ...], str]:
    """The blocks of a stage that hold the source's, and what was done."""
    if len(theirs) > len(blocks) and not source.elastic:
        raise Misfit(f"{where} has {len(theirs)} blocks, the search space at most {len(blocks)}")
    held = [
        _embed_block(ours, tensors, choices.block, source, f"{where}, block {j}")
        for j, (ours, tensors) in enumerate(zip(blocks, theirs, strict=False))
    ]
    for surplus in blocks[len(held) :]:
        nn.init.zeros_(surplus.project_norm.weight)  # the block's branch is zero: its output is its input
        nn.init.zeros_(surplus.project_norm.bias)
    depth = min(d for d in choices.depth if d >= len(held))
    cheapest = Block(choices.block.expand[0], choices.block.kernel[0])
    kept = (
        f"{len(held)} of {len(theirs)} blocks"
        if len(held) < len(theirs)
        else f"{len(held)} block{'s' * (len(held) > 1)}"
    )
    fresh = f", {len(blocks) - len(held)} more as the identity" if len(blocks) > len(held) else ""
    spelled = " ".join(f"({block.expand:g}, {block.kernel})" for block in held)
    return (*held, *[cheapest] * (depth - len(held))), f"{kept} loaded as {spelled}{fresh}"


def _embed_block(
    ours: ElasticInvertedResidual, theirs: Tensors, choices: BlockChoices, source: Source, where: str
) -> Block:
    """Copy one inverted residual. Returns the smallest choice that holds it."""
    theirs_out, hidden = theirs["project.weight"].shape[:2]
    theirs_in = theirs["expand.weight"].shape[1] if "expand.weight" in theirs else hidden
    room = ours.project.in_channels
    for what, found, expected in (
        ("input channels", theirs_in, ours.in_channels),
        ("output channels", theirs_out, ours.out_channels),
        ("expanding convolution", "expand.weight" in theirs, ours.expand is not None),
        ("squeeze-and-excitation", _SQUEEZE in theirs, ours.squeeze_excitation is not None),
    ):
        if found != expected:
            raise Misfit(f"{where}: {what}: {found}, the search space has {expected}")
    if hidden > room and not source.elastic:
        raise Misfit(f"{where}: {hidden} hidden channels, the largest expand ratio has {room}")
    hidden = min(hidden, room)
    if ours.expand is not None:
        ours.expand.weight[:hidden] = theirs["expand.weight"][:hidden]
        _load_norm(ours.expand_norm, theirs, "expand_norm", source.eps, hidden)
    kernel = _load_depthwise(ours.depthwise, theirs, hidden, source, where)
    _load_norm(ours.depthwise_norm, theirs, "depthwise_norm", source.eps, hidden)
    if ours.squeeze_excitation is not None:
        _load_squeeze(ours.squeeze_excitation, theirs, hidden)
    ours.project.weight.zero_()
    ours.project.weight[:, :hidden] = theirs["project.weight"][:, :hidden]
    _load_norm(ours.project_norm, theirs, "project_norm", source.eps, theirs_out)
    expand = min(e for e in choices.expand if ours.hidden_channels(e) >= hidden)
    return Block(expand, min(k for k in choices.kernel if k >= kernel))


_SQUEEZE = "squeeze_excitation.fc1.weight"


def _load_depthwise(ours: ElasticDepthwiseConv, theirs: Tensors, hidden: int, source: Source, where: str) -> int:
    """Centre the source's kernels in ours, or transform them down to ours; the side of what was loaded."""
    weight = theirs["depthwise.weight"][:hidden]
    largest = ours.weight.shape[-1]
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
    """Surplus hidden channels are not looked at, and surplus squeezed ones have no effect."""
    names = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    w1, b1, w2, b2 = (theirs[f"squeeze_excitation.{name}"] for name in names)
    squeezed = min(len(b1), len(ours.fc1.bias))
    ours.fc1.weight[:squeezed].zero_()
    ours.fc1.weight[:squeezed, :hidden] = w1[:squeezed, :hidden]
    ours.fc1.bias[:squeezed] = b1[:squeezed]
    ours.fc2.weight[:hidden].zero_()
    ours.fc2.weight[:hidden, :squeezed] = w2[:hidden, :squeezed]
    ours.fc2.bias[:hidden] = b2[:hidden]


def _load_norm(ours: nn.BatchNorm2d, theirs: Tensors, name: str, eps: float, channels: int) -> None:
    """The first channels of a BatchNorm. Where eps differs, the weight makes up for it: the function is the same."""
    weight, bias, mean, var = (
        theirs[f"{name}.{part}"][:channels] for part in ("weight", "bias", "running_mean", "running_var")
    )
    ours.weight[:channels] = weight * ((var + ours.eps) / (var + eps)).sqrt()
    ours.bias[:channels], ours.running_mean[:channels], ours.running_var[:channels] = bias, mean, var


def _load_conv_norm(ours: nn.Sequential, theirs: Tensors, eps: float, where: str) -> None:
    """A convolution and its BatchNorm, of the same shape on both sides."""
    if "0.weight" not in theirs:
        raise Misfit(f"{where}: missing")
    found, expected = tuple(theirs["0.weight"].shape), tuple(ours[0].weight.shape)
    if found != expected:
        raise Misfit(f"{where}: weights of {found}, the backbone has {expected}")
    ours[0].weight.copy_(theirs["0.weight"])
    _load_norm(ours[1], theirs, "1", eps, found[0])


def _try_extra(ours: ElasticInvertedResidual, source: Source, i: int, choices: BlockChoices) -> tuple[Block, str]:
    """An extra block is worth having, but no reason to refuse a backbone."""
    try:
        block = _embed_block(ours, source.extras[i], choices, source, f"extra block {i}")
    except Misfit as misfit:
        return Block(choices.expand[-1], choices.kernel[-1]), f"{FRESH} ({misfit})"
    return block, f"loaded as ({block.expand:g}, {block.kernel})"


def _load_predictors(detector: ElasticSSD, theirs: Tensors) -> str:
    """Whatever has the same name and shape: all but the class logits where the classes are others."""
    ours: dict[str, Tensor] = detector.predictors.state_dict()
    fitting = {name: t for name, t in theirs.items() if name in ours and t.shape == ours[name].shape}
    detector.predictors.load_state_dict(fitting, strict=False)
    if not fitting:
        return FRESH
    fresh = sorted({name.rpartition(".")[0] for name in ours if name not in fitting})
    return "loaded" + (f", but {', '.join(fresh)} {'start' if len(fresh) > 1 else 'starts'} fresh" if fresh else "")


def _with_classes(detector: ElasticSSD, theirs: Tensors, known: Sequence[str], wanted: Sequence[str]) -> Tensors:
    """`theirs` with class logits for `wanted`: the background's and those of the same name, the rest `detector`'s."""
    ours, result = detector.predictors.state_dict(), dict(theirs)
    for level, net in enumerate(detector.predictors.classes):
        for name in (f"classes.{level}.{len(net) - 1}.{part}" for part in ("weight", "bias")):
            if name not in theirs or theirs[name].shape[1:] != ours[name].shape[1:]:
                continue
            merged = ours[name].unflatten(0, (-1, len(wanted) + 1)).clone()  # (priors of a cell, classes + 1, ...)
            given = theirs[name].unflatten(0, (-1, len(known) + 1))
            if len(merged) != len(given):
                continue
            merged[:, 0] = given[:, 0]
            for label, class_name in enumerate(wanted, start=1):
                if class_name in known:
                    merged[:, label] = given[:, known.index(class_name) + 1]
            result[name] = merged.flatten(0, 1)
    return result


def _shared_classes(known: Sequence[str], wanted: Sequence[str]) -> str:
    """Which classes keep their logits, which start fresh, which are not needed any more."""
    parts = {
        "kept": [name for name in wanted if name in known],
        FRESH: [name for name in wanted if name not in known],
        "left out": [name for name in known if name not in wanted],
    }
    return "; ".join(f"{what}: {', '.join(names)}" for what, names in parts.items() if names)


def _left_out(source: Source) -> list[str]:
    """The parts whose tensors no detector needs, each with the number of them."""
    parts: dict[str, int] = {}
    for key in source.left_out:
        part = key.rpartition(".")[0] or key
        parts[part] = parts.get(part, 0) + 1
    return [", ".join(f"{part} ({count} tensors)" for part, count in parts.items())] if parts else []


def _differences(config: Config, source: Source) -> list[Row]:
    """Settings under which the source was not trained: it is the start all the same, but not its old self."""
    backbone = config.backbone
    wrong = [
        (f"backbone.{key}", mine, theirs)
        for key, mine, theirs in (
            ("pixel_mean", list(backbone.pixel_mean), list(source.mean)),
            ("pixel_std", list(backbone.pixel_std), list(source.std)),
            ("padding", backbone.padding, source.padding),
            ("norm_eps", backbone.norm_eps, source.eps),
        )
        if mine != theirs
    ]
    return [("note", f"{key} is {mine}, it was trained with {theirs}") for key, mine, theirs in wrong]
