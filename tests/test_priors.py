"""Prior boxes against a slow loop and torchvision's generator; offsets and overlaps against torchvision's."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_convert, box_iou

from lib.priors import coverage, decode, encode, fit_priors, pairwise_iou, prior_boxes, priors_per_cell

SIZES = [(19, 19), (10, 10), (5, 5), (3, 3), (2, 2), (1, 1)]
SCALES = [0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.05]
RATIOS = [[2], [2, 3], [2, 3], [2, 3], [2], [2]]


def slow_priors(sizes, scales, ratios, clip):
    boxes = []
    for k, (height, width) in enumerate(sizes):
        for i in range(height):
            for j in range(width):
                shapes = [(scales[k], scales[k]), (math.sqrt(scales[k] * scales[k + 1]),) * 2]
                for r in ratios[k]:
                    shapes.append((scales[k] * math.sqrt(r), scales[k] / math.sqrt(r)))
                    shapes.append((scales[k] / math.sqrt(r), scales[k] * math.sqrt(r)))
                for w, h in shapes:
                    cx, cy = (j + 0.5) / width, (i + 0.5) / height
                    corners = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
                    if clip:
                        corners = [min(max(x, 0.0), 1.0) for x in corners]
                    x1, y1, x2, y2 = corners
                    boxes.append([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1])
    return torch.tensor(boxes)


def test_reference_config_has_2268_priors():
    assert priors_per_cell(RATIOS) == [4, 6, 6, 6, 4, 4]
    assert prior_boxes(SIZES, SCALES, RATIOS).shape == (2268, 4)


@pytest.mark.parametrize("clip", [True, False])
def test_equals_the_slow_loop(clip):
    sizes, scales, ratios = [(3, 5), (2, 2), (1, 1)], [0.2, 0.5, 0.9, 1.05], [[2], [2, 3], []]
    torch.testing.assert_close(prior_boxes(sizes, scales, ratios, clip), slow_priors(sizes, scales, ratios, clip))


def test_unclipped_equals_torchvision():
    generator = DefaultBoxGenerator(RATIOS, scales=SCALES, clip=False)
    images = ImageList(torch.zeros(1, 3, 300, 300), [(300, 300)])
    (expected,) = generator(images, [torch.zeros(1, 1, *size) for size in SIZES])
    priors = box_convert(prior_boxes(SIZES, SCALES, RATIOS, clip=False), "cxcywh", "xyxy") * 300
    torch.testing.assert_close(priors, expected, rtol=1e-5, atol=1e-3)


def test_clip_cuts_corners_off():
    """The first prior of a 19 x 19 level, 0.15 wide around (0.5 / 19, 0.5 / 19), keeps its far corner."""
    clipped, whole = (prior_boxes(SIZES, SCALES, RATIOS, clip)[0] for clip in (True, False))
    far = (whole[:2] + whole[2:] / 2)[0].item()
    torch.testing.assert_close(clipped, torch.tensor([far / 2, far / 2, far, far]))
    corners = box_convert(prior_boxes(SIZES, SCALES, RATIOS), "cxcywh", "xyxy")
    assert corners.min() >= -1e-6
    assert corners.max() <= 1 + 1e-6


def test_without_squares_a_cell_has_the_shapes_of_its_ratios():
    ratios = [[1, 4], [2]]
    assert priors_per_cell(ratios, squares=False) == [4, 2]
    priors = prior_boxes([(1, 1), (1, 1)], [0.2, 0.5, 0.9], ratios, clip=False, squares=False)
    expected = [
        (0.2, 0.2),
        (0.2, 0.2),
        (0.4, 0.1),
        (0.1, 0.4),
        (0.5 * 2**0.5, 0.5 / 2**0.5),
        (0.5 / 2**0.5, 0.5 * 2**0.5),
    ]
    torch.testing.assert_close(priors[:, 2:], torch.tensor(expected))


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


# Priors fitted to a data set


def test_coverage_is_a_share_of_each_class():
    boxes = torch.tensor([[0, 0, iou, 1] for iou in (0.5, 0.4, 0.9, 0.1)])
    labels, priors = torch.tensor([1, 1, 3, 3]), torch.tensor([[0.5, 0.5, 1, 1], [0.9, 0.9, 0.1, 0.1]])
    shares = coverage(boxes, labels, priors, 3, 0.5)
    torch.testing.assert_close(shares, torch.tensor([0.5, math.nan, 0.5]), equal_nan=True)
    assert coverage(boxes[:0], labels[:0], priors, 3, 0.5).isnan().all()


def test_fitted_priors_cover_what_they_can():
    """Upright bars of one shape beside squares of another: two levels have a prior for each."""
    corner = 0.5 * torch.rand(80, 2, generator=torch.Generator().manual_seed(0))
    size = torch.tensor([0.1, 0.5]).repeat(80, 1)
    size[40:] = 0.35
    boxes, labels = torch.cat([corner, corner + size], 1), torch.arange(80) // 40 + 1
    sizes = [(12, 12), (6, 6)]
    scales, ratios = fit_priors(boxes, labels, sizes, [1, 1], 0.5)
    priors = prior_boxes(sizes, scales, ratios, squares=False)
    assert coverage(boxes, labels, priors, 2, 0.5).tolist() == [1, 1]
    assert (scales, ratios) == fit_priors(boxes, labels, sizes, [1, 1], 0.5)[:2]


@settings(max_examples=10)
@given(
    count=st.integers(1, 60),
    seed=st.integers(0, 2**31),
    pairs=st.lists(st.integers(1, 2), min_size=1, max_size=3),
    threshold=st.floats(0.3, 0.7),
    clip=st.booleans(),
)
def test_fitted_priors_are_valid_for_any_boxes(count, seed, pairs, threshold, clip):
    """As many as were asked for, at scales and ratios that the configuration accepts."""
    boxes = random_boxes(count, seed=seed, smallest=0.0)
    labels = torch.randint(1, 4, (count,), generator=torch.Generator().manual_seed(seed))
    sizes = [(8 >> k, 8 >> k) for k in range(len(pairs))]
    with mock.patch("lib.priors.FIT_STARTS", 3):
        scales, ratios = fit_priors(boxes, labels, sizes, pairs, threshold, clip)
    assert len(scales) == len(pairs) + 1 and [len(r) for r in ratios] == pairs
    assert min(scales) > 0 and max(scales) < 1.3 and min(min(r) for r in ratios) >= 1
    priors = prior_boxes(sizes, scales, ratios, clip, squares=False)
    assert len(priors) == sum(2 * n * h * w for n, (h, w) in zip(pairs, sizes, strict=True))
    assert priors.isfinite().all()
