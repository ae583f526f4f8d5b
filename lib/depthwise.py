"""Depthwise convolution whose weights' gradient is quick on a CPU for wide kernels as well.

oneDNN has a depthwise kernel for that gradient up to 3 columns. For wider filters it takes the one for groups of 16
channels, which does 16 times the work: a fifth of a whole training step. Here the gradient of a wide filter is put
together from those of filters 3 columns wide.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

COLUMNS = 3  # of the widest filter whose gradient oneDNN computes channel by channel


def depthwise_conv(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """F.conv2d of (B, C, H, W) with weights (C, 1, K, K), each channel on its own; the same values and gradients."""
    wide = weight.shape[-1] > COLUMNS and weight.requires_grad and torch.is_grad_enabled()
    plain = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if wide and plain and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling():
        return _WideDepthwiseConv.apply(x, weight, stride, padding)
    return F.conv2d(x, weight, stride=stride, padding=padding, groups=weight.shape[0])


class DepthwiseConv2d(nn.Conv2d):
    """nn.Conv2d with a square filter for each channel, through `depthwise_conv`."""

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is not None:  # has been fused: nothing to train
            return super().forward(x)
        return depthwise_conv(x, self.weight, self.stride[0], self.padding[0])


class _WideDepthwiseConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, stride=stride, padding=padding, groups=len(weight))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = _gradients(gradient, x, weight, ctx.stride, ctx.padding, 0)
        if ctx.needs_input_grad[1]:
            of_weight = _weight_gradient(gradient, x, weight.shape[-1], ctx.stride, ctx.padding)
        return of_x, of_weight, None, None


def _gradients(gradient: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, which: int) -> Tensor:
    """The gradient of the input (`which` is 0) or of the weights (1)."""
    mask = [which == 0, which == 1, False]
    options = [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], len(weight), mask
    return torch.ops.aten.convolution_backward(gradient, x, weight, None, *options)[which]


def _weight_gradient(gradient: Tensor, x: Tensor, size: int, stride: int, padding: int) -> Tensor:
    """The gradient (C, 1, K, K) of weights from that of the output, (B, C, H', W'), and the input (B, C, H, W).

    The input is padded once. A filter's columns from `first` on see it shifted by as many pixels: the same memory,
    read from there on. What then comes at a row's end from the next row meets output that does not exist, zeros.
    """
    batch, channels, height, width = x.shape
    height, width = height + 2 * padding, width + 2 * padding
    row = channels * width
    memory = x.new_empty(batch * height * row + row)  # a row more, for the last image
    memory[-row:].zero_()
    shape, strides = (batch, channels, height, width), (height * row, 1, row, channels)
    _place(x, memory.as_strided(shape, strides), padding)
    wider = (*gradient.shape[:3], (width - COLUMNS) // stride + 1)
    padded = torch.empty(wider, dtype=x.dtype, memory_format=torch.channels_last)
    _place(gradient, padded, 0)
    template = x.new_empty(channels, 1, size, COLUMNS)
    result = x.new_empty(channels, 1, size, size)
    for first in (*range(0, size - COLUMNS, COLUMNS), size - COLUMNS):
        shifted = memory.as_strided(shape, strides, first * channels)
        result[..., first : first + COLUMNS] = _gradients(padded, shifted, template, stride, 0, 1)
    return result


def _place(x: Tensor, out: Tensor, first: int) -> None:
    """Copy (B, C, H, W) into a tensor of at least its size from row and column `first` on, with zeros around it.

    F.pad would first fill all of it with zeros, in the time of the copy.
    """
    bottom, right = first + x.shape[2], first + x.shape[3]
    out[:, :, first:bottom, first:right].copy_(x)
    for border in (out[:, :, :first], out[:, :, bottom:], out[:, :, :, :first], out[:, :, :, right:]):
        border.zero_()
