"""SSD head: elastic extra feature blocks of stride 2, and the predictors on every feature map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lib.elastic import BatchNorm2d, ElasticInvertedResidual, ReLU6, Segment
from lib.genotype import BlockChoices, Genotype


class ElasticExtras(nn.Module):
    """Inverted residuals of stride 2 after the backbone, each giving one more feature map (SSDLite, MobileNetV2 paper).

    `in_channels` are the backbone's last ones, `channels` the output channels of each block.
    """

    def __init__(self, in_channels: int, channels: Sequence[int], choices: Sequence[BlockChoices]):
        super().__init__()
        self.blocks = nn.ModuleList()
        for out_channels, choice in zip(channels, choices, strict=True):
            block = ElasticInvertedResidual(in_channels, out_channels, 2, choice.expand, choice.kernel, "relu6")
            self.blocks.append(block)
            in_channels = out_channels

    def segments(self, genotype: Genotype) -> list[Segment]:
        """What `genotype` runs: one segment, of one block, per extra feature map."""
        return [[(module, block)] for module, block in zip(self.blocks, genotype.head, strict=True)]


class Predictors(nn.Module):
    """Class logits and box offsets of every prior, from one pair of small networks per feature map.

    `num_classes` does not count the background: there are num_classes + 1 logits, the background's first. `kind` is
    "ssdlite", a depthwise 3x3 convolution and a 1x1 one, or "plain", one 3x3 convolution.
    """

    def __init__(self, in_channels: Sequence[int], priors_per_cell: Sequence[int], num_classes: int, kind: str):
        super().__init__()
        self.num_classes = num_classes
        pairs = list(zip(in_channels, priors_per_cell, strict=True))
        self.classes = nn.ModuleList(_predictor(kind, c, p * (num_classes + 1)) for c, p in pairs)
        self.boxes = nn.ModuleList(_predictor(kind, c, p * 4) for c, p in pairs)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Feature maps (B, C_l, H_l, W_l) to logits (B, P, num_classes + 1) and offsets (B, P, 4)."""
        logits = [_per_prior(net(f), self.num_classes + 1) for net, f in zip(self.classes, features, strict=True)]
        offsets = [_per_prior(net(f), 4) for net, f in zip(self.boxes, features, strict=True)]
        return torch.cat(logits, 1), torch.cat(offsets, 1)

    @torch.no_grad()
    def set_class_bias(self, bias: float) -> None:
        """Start every class logit near `bias`, the focal prior (Lin et al., ICCV 2017, section 4.1)."""
        for net in self.classes:
            net[-1].bias.fill_(bias)


def _per_prior(output: Tensor, width: int) -> Tensor:
    """(B, A * width, H, W) to (B, H * W * A, width): priors run over rows, columns, then the priors of a cell."""
    return output.permute(0, 2, 3, 1).reshape(output.shape[0], -1, width)


def _predictor(kind: str, in_channels: int, outputs: int) -> nn.Sequential:
    if kind == "plain":
        return nn.Sequential(nn.Conv2d(in_channels, outputs, 3, padding=1))
    return nn.Sequential(
        nn.Conv2d(in_channels, in_channels, 3, padding=1, groups=in_channels, bias=False),
        BatchNorm2d(in_channels),
        ReLU6(),
        nn.Conv2d(in_channels, outputs, 1),
    )
