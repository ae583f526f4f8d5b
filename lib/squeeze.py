"""Squeeze-and-excitation whose gradient takes less memory traffic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision import ops


def squeeze(x: Tensor) -> tuple[Tensor, Tensor]:
    """A feature map (B, C, H, W) to go on with, as it is, and its mean (B, C, 1, 1).

    The gradient of the mean, one number for a channel, is added to that of the map. Autograd would spread it over a
    map of its own first.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _Squeeze.apply(x)
    return x, x.mean((2, 3), keepdim=True)


class SqueezeExcitation(ops.SqueezeExcitation):
    """torchvision's, with `squeeze` in the place of its pooling."""

    def forward(self, x: Tensor) -> Tensor:
        x, mean = squeeze(x)
        return x * self.scale_activation(self.fc2(self.activation(self.fc1(mean))))


class _Squeeze(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.size = x.shape[2] * x.shape[3]
        return x.view_as(x), x.mean((2, 3), keepdim=True)

    @staticmethod
    def backward(ctx: Any, of_map: Tensor, of_mean: Tensor) -> Tensor:
        return of_map + of_mean / ctx.size
