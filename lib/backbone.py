"""Elastic MobileNetV2 and MobileNetV3-Large: feature maps of any sub-network, one per level of the SSD head."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from lib import UserError
from lib.config import BackboneConfig
from lib.elastic import ACTIVATIONS, BatchNorm2d, ElasticInvertedResidual, SamePadConv2d, Segment, make_divisible
from lib.genotype import Block, Genotype, StageChoices


@dataclass(frozen=True)
class Table:
    """The architecture table of a paper. Every sequence but `layer_channels` has one entry per stage."""

    strides: Sequence[int]
    layer_channels: Sequence[int]  # stem, stages, then the last 1x1 convolutions; the classifier's is not used
    activations: Sequence[str]  # the stem and the last 1x1 convolution have that of the last stage
    squeeze_excitation: Sequence[bool]
    last_conv: bool  # the 1x1 convolution after the last stage is part of the feature extractor


TABLES = {
    # Sandler et al., CVPR 2018, table 2
    "mbv2_backbone": Table(
        strides=(1, 2, 2, 2, 1, 2, 1),
        layer_channels=(32, 16, 24, 32, 64, 96, 160, 320, 1280),
        activations=("relu6",) * 7,
        squeeze_excitation=(False,) * 7,
        last_conv=False,
    ),
    # Howard et al., ICCV 2019, table 1, in the regular stages of Once-for-All
    "mbv3_backbone": Table(
        strides=(1, 2, 2, 2, 1, 2),
        layer_channels=(16, 16, 24, 40, 80, 112, 160, 960, 1280),
        activations=("relu", "relu", "relu", "h_swish", "h_swish", "h_swish"),
        squeeze_excitation=(False, False, True, False, True, True),
        last_conv=True,
    ),
}


class Half(NamedTuple):
    """A block that expands, up to its expansion or from there on."""

    whole: ElasticInvertedResidual
    first: bool

    def __call__(self, x: Tensor, block: Block) -> Tensor:
        return self.whole.expansion(x, block) if self.first else self.whole(x, block, expanded=True)

    def extract(self, block: Block) -> nn.Sequential:
        layers = self.whole.extract(block)
        return layers[:3] if self.first else layers[3:]  # the first three are convolution, BatchNorm and activation


class ElasticBackbone(nn.Module):
    """One feature map per level l of `feature_levels`: (B, C_l, S / 2**l, S / 2**l), rounded up, of (B, 3, S, S).

    It is the last feature map of that stride; MobileNetV3's last level ends in its 960-channel 1x1 convolution. With
    `feature_taps: expansion` the others end in the expansion of the block that halves them (MobileNetV3, section 6.3).
    """

    def __init__(self, config: BackboneConfig, stages: Sequence[StageChoices]):
        super().__init__()
        table = TABLES[config.backbone_type]
        strides = list(config.strides or table.strides)
        layer_channels = list(config.layer_channels or table.layer_channels)
        _check_lengths(len(stages), strides, layer_channels, table)
        # The stem's stride of 2 makes level 1, and every further one the next level.
        levels = [1 + strides[: i + 1].count(2) for i in range(len(stages))]
        self.feature_levels = list(config.feature_levels)
        _check_levels(self.feature_levels, levels)
        channels = [make_divisible(c * config.mult_ratio) for c in layer_channels]
        same_padding = config.padding == "tf_same"
        kind, padding = (SamePadConv2d, 0) if same_padding else (nn.Conv2d, 1)
        self.stem = _with_norm(kind(3, channels[0], 3, 2, padding, bias=False), table.activations[-1])
        self.stages = nn.ModuleList()
        for i, choices in enumerate(stages):
            blocks = nn.ModuleList()
            for j in range(max(choices.depth)):
                block = ElasticInvertedResidual(
                    in_channels=channels[i] if j == 0 else channels[i + 1],
                    out_channels=channels[i + 1],
                    stride=strides[i] if j == 0 else 1,
                    expands=choices.block.expand,
                    kernels=choices.block.kernel,
                    activation=table.activations[i],
                    squeeze_excitation=table.squeeze_excitation[i],
                    same_padding=same_padding,
                )
                blocks.append(block)
            self.stages.append(blocks)
        self.last_conv = None
        width = channels[len(stages)]
        if table.last_conv:
            conv = nn.Conv2d(width, channels[len(stages) + 1], 1, bias=False)
            self.last_conv = _with_norm(conv, table.activations[-1])
            width = conv.out_channels
        # A feature map leaves the backbone after the last stage of its level, the last one at the very end.
        last_stage = {level: i for i, level in enumerate(levels)}
        self._begins = [last_stage[level] + 1 for level in self.feature_levels[:-1]]  # stages
        self.feature_channels = [*(channels[i] for i in self._begins), width]
        self.split_blocks: dict[int, ElasticInvertedResidual] = {}  # by the feature map that ends in the expansion
        for k, i in enumerate(self._begins):
            block = self.stages[i][0]
            if config.feature_taps == "expansion" and block.expand is not None:
                self.split_blocks[k] = block
                block.is_tapped = True
                self.feature_channels[k] = block.expand.out_channels
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = config.norm_eps

    def channels(self, genotype: Genotype) -> tuple[int, ...]:
        """Of the feature maps of `genotype`: `feature_channels`, but for those that end in a narrower expansion."""
        channels = list(self.feature_channels)
        for k, block in self.split_blocks.items():
            channels[k] = block.hidden_channels(genotype.stages[self._begins[k]][0].expand)
        return tuple(channels)

    def segments(self, genotype: Genotype) -> list[Segment]:
        """What `genotype` runs: one segment per feature level, each ending in that level's feature map."""
        segments: list[Segment] = [[(self.stem, None)]]
        for i, blocks in enumerate(genotype.stages):
            steps: Segment = list(zip(self.stages[i], blocks, strict=False))  # a shallow stage runs its first blocks
            if i in self._begins:
                if whole := self.split_blocks.get(len(segments) - 1):
                    segments[-1].append((Half(whole, first=True), blocks[0]))
                    steps[0] = Half(whole, first=False), blocks[0]
                segments.append([])
            segments[-1] += steps
        if self.last_conv is not None:
            segments[-1].append((self.last_conv, None))
        return segments


def _with_norm(conv: nn.Conv2d, activation: str) -> nn.Sequential:
    """Convolution, BatchNorm, activation; none of them is elastic."""
    return nn.Sequential(conv, BatchNorm2d(conv.out_channels), ACTIVATIONS[activation]())


def _check_lengths(stages: int, strides: list[int], channels: list[int], table: Table) -> None:
    expected = len(table.strides)
    for key, found in (("search_space.num_cell_groups", stages), ("backbone.strides", len(strides))):
        if found != expected:
            raise UserError(f"{key}: expected {expected} values, one per stage, found {found}")
    if len(channels) < (needed := stages + 1 + table.last_conv):
        raise UserError(f"backbone.layer_channels: expected at least {needed} values, found {len(channels)}")


def _check_levels(levels: list[int], available: list[int]) -> None:
    known = sorted(set(available))
    if levels != sorted(set(levels)) or not set(levels) <= set(known) or known[-1] not in levels:
        expected = f"ascending levels out of {', '.join(map(str, known))}, ending with {known[-1]}"
        raise UserError(f"backbone.feature_levels: expected {expected}, found {levels}")
