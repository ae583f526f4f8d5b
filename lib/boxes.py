"""Boxes: overlap of two sets, and the offsets that lead from a prior box to an object.

Frames are converted by `torchvision.ops.box_convert`. Nothing here depends on the unit, pixels or normalised.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchvision.ops import box_convert

VARIANCES = (0.1, 0.2)
SMALLEST_SIZE = 1e-6  # an empty box has no logarithm of its size
LARGEST_LOG_SCALE = math.log(1000 / 16)  # torchvision's bound: exp() of a wild prediction stays finite


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of every box of `a` (..., P, 4) with every box of `b` (..., M, 4), both xyxy: (..., P, M).

    Leading dimensions broadcast. A box without area overlaps nothing: 0, never NaN.
    """
    ax1, ay1, ax2, ay2 = (x.contiguous()[..., :, None] for x in a.unbind(-1))  # (..., P, 1)
    bx1, by1, bx2, by2 = (x.contiguous()[..., None, :] for x in b.unbind(-1))  # (..., 1, M)
    # In place where it can be: at this size, fresh memory costs more than the arithmetic.
    width = torch.minimum(ax2, bx2).sub_(torch.maximum(ax1, bx1)).clamp_(min=0)
    height = torch.minimum(ay2, by2).sub_(torch.maximum(ay1, by1)).clamp_(min=0)
    intersection = width * height  # (..., P, M)
    areas = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1)
    return intersection / areas.sub_(intersection).clamp_(min=torch.finfo(areas.dtype).tiny)


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
