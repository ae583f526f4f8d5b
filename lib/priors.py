"""Prior boxes of the feature maps (SSD, Liu et al., ECCV 2016, section 2.2), box offsets from them, and IoU.

Boxes are normalised to [0, 1], x times the width, y times the height; a name says cxcywh or xyxy. IoU and offsets do
not depend on the unit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_convert

VARIANCES = (0.1, 0.2)
SMALLEST_SIZE = 1e-6  # the size of an empty box must have a logarithm
LARGEST_LOG_SCALE = math.log(1000 / 16)  # torchvision's bound: keeps exp() of any prediction finite


def priors_per_cell(aspect_ratios: Sequence[Sequence[float]]) -> list[int]:
    """The number of priors per cell of each level: two squares, and a wide and a tall one for each ratio."""
    return [2 + 2 * len(ratios) for ratios in aspect_ratios]


def prior_boxes(
    feature_sizes: Sequence[tuple[int, int]],
    scales: Sequence[float],
    aspect_ratios: Sequence[Sequence[float]],
    clip: bool = True,
) -> Tensor:
    """All priors (P, 4), cxcywh, normalised; ordered by level, row, column, then shape as in `_shapes`.

    `feature_sizes` are (height, width) of the levels, `scales` fractions of the image side, one more than levels:
    the last one closes the last level's sqrt(s_k s_{k+1}). `clip` moves corners into the image.
    """
    per_level = []
    for k, (height, width) in enumerate(feature_sizes):
        shapes = _shapes(scales[k], scales[k + 1], aspect_ratios[k])
        per_level.append(_level(height, width, shapes))
    priors = torch.cat(per_level)
    if clip:
        # Corners are clipped. Clipping cxcywh would leave a prior at the border as wide as before.
        priors = box_convert(box_convert(priors, "cxcywh", "xyxy").clamp(0, 1), "xyxy", "cxcywh")
    return priors


def _shapes(scale: float, next_scale: float, ratios: Sequence[float]) -> list[tuple[float, float]]:
    """(width, height) of a cell's priors: s_k, sqrt(s_k s_{k+1}), then r and 1/r for each ratio r = width / height."""
    between = math.sqrt(scale * next_scale)
    shapes = [(scale, scale), (between, between)]
    for ratio in ratios:
        long = scale * math.sqrt(ratio)
        short = scale / math.sqrt(ratio)
        shapes += [(long, short), (short, long)]
    return shapes


def _level(height: int, width: int, shapes: list[tuple[float, float]]) -> Tensor:
    """Priors (height * width * K, 4) of one level."""
    rows = (torch.arange(height) + 0.5) / height
    columns = (torch.arange(width) + 0.5) / width
    cy, cx = torch.meshgrid(rows, columns, indexing="ij")
    centres = torch.stack([cx, cy], dim=-1).reshape(-1, 1, 2)  # (H * W, 1, 2)
    sizes = torch.tensor(shapes)  # (K, 2)
    cells = [centres.expand(-1, len(sizes), -1), sizes.expand(len(centres), -1, -1)]
    return torch.cat(cells, dim=-1).reshape(-1, 4)


def encode(boxes_xyxy: Tensor, priors_cxcywh: Tensor, variances: tuple[float, float] = VARIANCES) -> Tensor:
    """Offsets (..., 4) from priors to boxes, in units of the variances (SSD, Liu et al. 2016, equation 2)."""
    boxes = box_convert(boxes_xyxy, "xyxy", "cxcywh")
    centre = (boxes[..., :2] - priors_cxcywh[..., :2]) / priors_cxcywh[..., 2:] / variances[0]
    size = (boxes[..., 2:].clamp(min=SMALLEST_SIZE) / priors_cxcywh[..., 2:]).log() / variances[1]
    return torch.cat([centre, size], dim=-1)


def decode(offsets: Tensor, priors_cxcywh: Tensor, variances: tuple[float, float] = VARIANCES) -> Tensor:
    """Boxes xyxy (..., 4), the inverse of `encode`. A box grows to at most 62.5 times its prior, so it stays finite."""
    centre = offsets[..., :2] * variances[0] * priors_cxcywh[..., 2:] + priors_cxcywh[..., :2]
    size = (offsets[..., 2:] * variances[1]).clamp(max=LARGEST_LOG_SCALE).exp() * priors_cxcywh[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of every box of `a` (..., P, 4) with every box of `b` (..., M, 4), both xyxy: (..., P, M).

    Leading dimensions broadcast. A box without area overlaps nothing: 0, never NaN.
    """
    ax1, ay1, ax2, ay2 = (x.contiguous()[..., :, None] for x in a.unbind(-1))  # (..., P, 1)
    bx1, by1, bx2, by2 = (x.contiguous()[..., None, :] for x in b.unbind(-1))  # (..., 1, M)
    # In place where possible: at this size, allocating memory costs more than the arithmetic.
    width = torch.minimum(ax2, bx2).sub_(torch.maximum(ax1, bx1)).clamp_(min=0)
    height = torch.minimum(ay2, by2).sub_(torch.maximum(ay1, by1)).clamp_(min=0)
    intersection = width * height  # (..., P, M)
    areas = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1)
    return intersection / areas.sub_(intersection).clamp_(min=torch.finfo(areas.dtype).tiny)
