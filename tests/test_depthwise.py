from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lib import elastic
from lib.elastic import DepthwiseConv2d, depthwise_conv


@pytest.fixture
def wide_calls(monkeypatch):
    """How often the gradient of a wide filter was put together."""
    calls, original = [], elastic._weight_gradient
    monkeypatch.setattr(elastic, "_weight_gradient", lambda *a: calls.append(a) or original(*a))
    return calls


def gradients(function, x, weight, seed=1):
    x, weight = x.clone(memory_format=torch.preserve_format).requires_grad_(), weight.clone().requires_grad_()
    output = function(x, weight)
    generator = torch.Generator().manual_seed(seed)
    output.backward(torch.randn(output.shape, generator=generator))
    return output.detach(), x.grad, weight.grad


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(("height", "width"), [(9, 9), (10, 12), (4, 7), (3, 3), (1, 1)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [3, 4, 5, 7, 9])
def test_output_and_gradients_are_those_of_torch_in_float64(size, stride, height, width, memory_format):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, height, width, generator=generator).to(memory_format=memory_format)
    weight = torch.randn(6, 1, size, size, generator=generator)
    found = gradients(lambda x, w: depthwise_conv(x, w, stride, size // 2), x, weight)
    expected = gradients(
        lambda x, w: F.conv2d(x, w, stride=stride, padding=size // 2, groups=6), x.double(), weight.double()
    )
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs.float(), rtol=1e-4, atol=1e-5)


def test_without_padding():
    x, weight = torch.randn(2, 6, 11, 11), torch.randn(6, 1, 5, 5)
    found = gradients(lambda x, w: depthwise_conv(x, w, 2, 0), x, weight)
    expected = gradients(lambda x, w: F.conv2d(x, w, stride=2, groups=6), x, weight)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_only_wide_filters_that_are_trained_in_float32_go_their_own_way(wide_calls):
    x, wide, narrow = torch.randn(1, 4, 8, 8), torch.randn(4, 1, 5, 5), torch.randn(4, 1, 3, 3)
    gradients(lambda x, w: depthwise_conv(x, w, 1, 1), x, narrow)
    gradients(lambda x, w: depthwise_conv(x, w, 1, 2), x.double(), wide.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert depthwise_conv(x, wide.requires_grad_(), 1, 2).dtype == torch.bfloat16
    assert not wide_calls
    gradients(lambda x, w: depthwise_conv(x, w, 1, 2), x, wide.detach())
    assert len(wide_calls) == 1


def test_an_input_without_a_gradient(wide_calls):
    weight = torch.randn(4, 1, 5, 5, requires_grad=True)
    depthwise_conv(torch.randn(1, 4, 8, 8), weight, 1, 2).sum().backward()
    assert len(wide_calls) == 1 and weight.grad.shape == weight.shape


def test_the_layer_is_a_convolution_with_another_gradient(wide_calls):
    layer = DepthwiseConv2d(6, 6, 5, 2, 2, groups=6, bias=False)
    plain = nn.Conv2d(6, 6, 5, 2, 2, groups=6, bias=False)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 6, 9, 9)
    for each in (layer, copy.deepcopy(layer), plain):
        each(x).square().sum().backward()
    assert len(wide_calls) == 2 and torch.equal(layer(x), plain(x))
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad, rtol=1e-4, atol=1e-5)


def test_a_bias_is_not_forgotten():
    layer = DepthwiseConv2d(6, 6, 5, 1, 2, groups=6)
    x = torch.randn(2, 6, 9, 9)
    assert torch.equal(layer(x), nn.Conv2d.forward(layer, x))
