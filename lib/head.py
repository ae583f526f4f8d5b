"""SSD head: elastic extra feature blocks of stride 2, and the predictors on every feature map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lib.elastic import (
    BatchNorm2d,
    ElasticBatchNorm,
    ElasticConv1x1,
    ElasticDepthwiseConv,
    ElasticInvertedResidual,
    ReLU6,
    Segment,
    copy_module,
)
from lib.genotype import BlockChoices, Genotype


class ElasticExtras(nn.Module):
    """Inverted residuals of stride 2 after the backbone, each giving one more feature map (SSDLite, MobileNetV2 paper).

    `in_channels` are the backbone's last ones, `channels` the output channels of each block, which may end in a ReLU6.
    """

    def __init__(self, in_channels: int, channels: Sequence[int], choices: Sequence[BlockChoices], relu6: bool):
        super().__init__()
        self._tail: Segment = [(nn.Sequential(ReLU6()), None)] if relu6 else []
        self.blocks = nn.ModuleList()
        for out_channels, choice in zip(channels, choices, strict=True):
            block = ElasticInvertedResidual(in_channels, out_channels, 2, choice.expand, choice.kernel, "relu6")
            self.blocks.append(block)
            in_channels = out_channels

    def segments(self, genotype: Genotype) -> list[Segment]:
        """What `genotype` runs: one segment, of one block, per extra feature map."""
        return [[step, *self._tail] for step in zip(self.blocks, genotype.head, strict=True)]


class Predictors(nn.Module):
    """Class logits and box offsets of every prior, from one pair of small networks per feature map.

    `num_classes` does not count the background: there are num_classes + 1 logits, the background's first. Of each
    map's `kinds`, "ssdlite" is a depthwise 3x3 convolution and a 1x1 one, "elastic" the same for the first channels of
    `in_channels`, and "plain" one 3x3 convolution.
    """

    def __init__(self, in_channels: Sequence[int], priors: Sequence[int], num_classes: int, kinds: Sequence[str]):
        super().__init__()
        self.num_classes = num_classes
        levels = list(zip(kinds, in_channels, priors, strict=True))
        self.classes = nn.ModuleList(_predictor(kind, c, p * (num_classes + 1)) for kind, c, p in levels)
        self.boxes = nn.ModuleList(_predictor(kind, c, p * 4) for kind, c, p in levels)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Feature maps (B, C_l, H_l, W_l) to logits (B, P, num_classes + 1) and offsets (B, P, 4)."""
        logits = [_per_prior(net(f), self.num_classes + 1) for net, f in zip(self.classes, features, strict=True)]
        offsets = [_per_prior(net(f), 4) for net, f in zip(self.boxes, features, strict=True)]
        return torch.cat(logits, 1), torch.cat(offsets, 1)

    def extract(self, channels: Sequence[int]) -> Predictors:
        """A plain copy for feature maps of exactly these `channels`."""
        own = copy_module(self)
        for nets in (own.classes, own.boxes):
            for k, net in enumerate(nets):
                if isinstance(net, ElasticPredictor):
                    nets[k] = net.extract(channels[k])
        return own


def _per_prior(output: Tensor, width: int) -> Tensor:
    """(B, A * width, H, W) to (B, H * W * A, width): priors run over rows, columns, then the priors of a cell."""
    return output.permute(0, 2, 3, 1).reshape(output.shape[0], -1, width)


class ElasticPredictor(nn.Sequential):
    """The "ssdlite" predictor of a feature map's first channels, as many as it has."""

    def __init__(self, channels: int, outputs: int):
        convolution = ElasticDepthwiseConv(channels, kernels=[3], stride=1)
        super().__init__(convolution, ElasticBatchNorm(channels), ReLU6(), ElasticConv1x1(channels, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        convolution, norm, activation, last = self
        return last(activation(norm(convolution(x, 3))), last.out_channels)

    def extract(self, channels: int) -> nn.Sequential:
        convolution, norm, activation, last = self
        first = convolution.extract(channels, 3), norm.extract(channels), activation
        return nn.Sequential(*first, last.extract(channels, last.out_channels))


def _predictor(kind: str, in_channels: int, outputs: int) -> nn.Sequential:
    if kind == "elastic":
        return ElasticPredictor(in_channels, outputs)
    if kind == "plain":
        return nn.Sequential(nn.Conv2d(in_channels, outputs, 3, padding=1))
    return nn.Sequential(
        nn.Conv2d(in_channels, in_channels, 3, padding=1, groups=in_channels, bias=False),
        BatchNorm2d(in_channels),
        ReLU6(),
        nn.Conv2d(in_channels, outputs, 1),
    )
