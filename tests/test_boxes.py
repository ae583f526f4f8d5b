"""Boxes: overlap against torchvision, offsets against torchvision's coder and as a round trip."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_convert, box_iou

from lib.priors import decode, encode, pairwise_iou


def random_boxes(*shape: int, seed: int = 0, smallest: float = 0.01) -> torch.Tensor:
    """Boxes (*shape, 4), xyxy, inside the image."""
    generator = torch.Generator().manual_seed(seed)
    size = smallest + (1 - smallest) * torch.rand(*shape, 2, generator=generator) ** 2
    corner = torch.rand(*shape, 2, generator=generator) * (1 - size)
    return torch.cat([corner, corner + size], dim=-1)


def test_iou_is_torchvisions():
    a, b = random_boxes(3, 7), random_boxes(3, 5, seed=1)
    expected = torch.stack([box_iou(x, y) for x, y in zip(a, b, strict=True)])
    torch.testing.assert_close(pairwise_iou(a, b), expected)


def test_iou_broadcasts_over_leading_dimensions():
    a, b = random_boxes(2, 3, 4), random_boxes(6, seed=1)
    expected = box_iou(a.reshape(-1, 4), b).reshape(2, 3, 4, 6)
    torch.testing.assert_close(pairwise_iou(a, b), expected)


def test_iou_of_nothing_has_the_right_shape():
    assert pairwise_iou(random_boxes(2, 3), torch.zeros(2, 0, 4)).shape == (2, 3, 0)


def test_iou_of_boxes_without_area_is_zero():
    empty = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.2, 0.2, 0.2, 0.8], [0.6, 0.6, 0.4, 0.4]])
    others = torch.cat([empty, torch.tensor([[0.0, 0.0, 1.0, 1.0]])])
    assert torch.equal(pairwise_iou(empty, others), torch.zeros(3, 4))


def test_encode_is_torchvisions():
    boxes, priors = random_boxes(20), random_boxes(20, seed=1)
    coder = BoxCoder(weights=(10.0, 10.0, 5.0, 5.0))
    expected = coder.encode_single(boxes, priors)
    offsets = encode(boxes, box_convert(priors, "xyxy", "cxcywh"))
    torch.testing.assert_close(offsets, expected, rtol=1e-4, atol=1e-4)


def test_decode_is_torchvisions_even_far_out():
    priors = random_boxes(20, seed=1)
    offsets = 100 * torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    expected = BoxCoder(weights=(10.0, 10.0, 5.0, 5.0)).decode_single(offsets, priors)
    torch.testing.assert_close(decode(offsets, box_convert(priors, "xyxy", "cxcywh")), expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), variances=st.tuples(st.floats(0.05, 1), st.floats(0.05, 1)))
def test_decode_inverts_encode(seed, variances):
    boxes = random_boxes(2, 8, seed=seed, smallest=0.05).double()
    priors = box_convert(random_boxes(8, seed=seed + 1, smallest=0.05), "xyxy", "cxcywh").double()
    offsets = encode(boxes, priors, variances)
    torch.testing.assert_close(decode(offsets, priors, variances), boxes)
    torch.testing.assert_close(encode(decode(offsets, priors, variances), priors, variances), offsets)


def test_extreme_values_stay_finite():
    priors = box_convert(random_boxes(2), "xyxy", "cxcywh")
    assert encode(torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.4, 0.4, 0.4, 0.9]]), priors).isfinite().all()
    assert decode(torch.tensor([[1e4] * 4, [-1e4] * 4]), priors).isfinite().all()
