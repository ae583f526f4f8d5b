"""Squeeze-and-excitation against torchvision's."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision import ops

from lib.squeeze import SqueezeExcitation, squeeze


def pair(dtype=torch.float32):
    torch.manual_seed(0)
    mine, theirs = (
        kind(6, 3, scale_activation=nn.Hardsigmoid).to(dtype) for kind in (SqueezeExcitation, ops.SqueezeExcitation)
    )
    theirs.load_state_dict(mine.state_dict())
    return mine, theirs


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("sides", [(9, 9), (4, 7), (1, 1)])
def test_output_and_gradients_are_torchvisions(sides, memory_format):
    x = torch.randn(2, 6, *sides).to(memory_format=memory_format)
    results = []
    for layer in pair():
        own = x.clone(memory_format=torch.preserve_format).requires_grad_()
        output = layer(own)
        output.square().sum().backward()
        results.append([output.detach(), own.grad, *(p.grad for p in layer.parameters())])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert results[0][1].is_contiguous(memory_format=memory_format)


def test_gradients_are_those_of_finite_differences():
    x = torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(squeeze, (x,))


def test_without_gradients_the_map_itself_comes_back():
    x = torch.randn(1, 6, 4, 4)
    with torch.no_grad():
        assert squeeze(x)[0] is x
    mine, theirs = pair()
    with torch.inference_mode():
        torch.testing.assert_close(mine(x), theirs(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_what_torchvision_gives(dtype):
    x, gradients = torch.randn(2, 6, 8, 8), []
    for layer in pair():
        own = x.to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype):
            output = layer(own)
        output.float().sum().backward()
        gradients.append((output.detach(), own.grad, layer.fc1.weight.grad))
    for mine, theirs in zip(*gradients, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=0.02, atol=0.02)
