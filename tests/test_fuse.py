"""Folding BatchNorm: the fused detector's outputs are those of the detector."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lib.detector import fuse
from lib.elastic import SamePadConv2d


@pytest.mark.parametrize("changes", [{}, {"backbone__padding": "tf_same", "head__predictor": "plain"}])
def test_a_fused_detector_computes_the_same(tiny_detector, changes):
    detector = tiny_detector(**changes)
    images = torch.randint(0, 256, (2, 3, 80, 100), dtype=torch.uint8)
    for genotype in (detector.space.smallest(), detector.space.largest()):
        plain = detector.extract(genotype)
        fused = fuse(plain)
        assert any(isinstance(m, nn.BatchNorm2d) for m in plain.modules())
        assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
        with torch.no_grad():
            for found, expected in zip(fused(images), plain(images), strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_padding_convolution_stays_one():
    """TensorFlow's padding is asymmetric: folded into an ordinary convolution, it would shift the picture."""
    model = nn.Sequential(SamePadConv2d(3, 4, 3, 2, bias=False), nn.BatchNorm2d(4)).eval()
    fused = fuse(model)
    x = torch.rand(1, 3, 8, 8)
    assert len(fused) == 1 and isinstance(fused[0], SamePadConv2d)
    torch.testing.assert_close(fused(x), model(x))


def test_only_a_convolution_right_before_is_folded():
    norm_first = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4))
    for module in norm_first.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(0.1, 1)
    fused = fuse(norm_first)
    assert len(fused) == 4 and norm_first.training and not fused.training
    x = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(fused(x), norm_first.eval()(x))


def test_in_place_gives_what_the_copy_gives():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model[1].running_mean.uniform_(0.1, 1)
    copied = fuse(model)
    assert fuse(model, inplace=True) is model and len(model) == 2 and not model.training
    x = torch.rand(2, 3, 6, 6)
    assert torch.equal(model(x), copied(x))
