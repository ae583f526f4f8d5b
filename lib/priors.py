"""Prior boxes of the feature levels (SSD, Liu et al. 2016, section 2.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_convert

from lib.errors import UserError


def priors_per_cell(aspect_ratios: Sequence[Sequence[float]]) -> list[int]:
    """How many priors each cell of a level has: two squares, and a wide and a tall one for each ratio."""
    return [2 + 2 * len(ratios) for ratios in aspect_ratios]


def prior_boxes(
    feature_sizes: Sequence[tuple[int, int]],
    scales: Sequence[float],
    aspect_ratios: Sequence[Sequence[float]],
    clip: bool = True,
) -> Tensor:
    """All priors (P, 4), cxcywh, normalised; ordered by level, row, column, then shape as in `_shapes`.

    `feature_sizes` are (height, width) of the levels, `scales` fractions of the image side, one more than levels:
    the last one closes the last level's sqrt(s_k s_{k+1}). With `clip` the corners are held inside the image.
    """
    levels = len(feature_sizes)
    if len(scales) != levels + 1:
        raise UserError(f"scales: expected {levels + 1} values, one more than feature levels, found {len(scales)}")
    if len(aspect_ratios) != levels:
        raise UserError(f"aspect_ratios: expected {levels} lists, one a feature level, found {len(aspect_ratios)}")
    priors = torch.cat(
        [
            _level(height, width, _shapes(scales[k], scales[k + 1], aspect_ratios[k]))
            for k, (height, width) in enumerate(feature_sizes)
        ]
    )
    if clip:
        # The image cuts off corners. Clipping cxcywh would leave a prior at the border as wide as before.
        priors = box_convert(box_convert(priors, "cxcywh", "xyxy").clamp(0, 1), "xyxy", "cxcywh")
    return priors


def _shapes(scale: float, next_scale: float, ratios: Sequence[float]) -> list[tuple[float, float]]:
    """(width, height) of a cell's priors: s_k, sqrt(s_k s_{k+1}), then r and 1/r for each ratio r = width / height."""
    between = math.sqrt(scale * next_scale)
    shapes = [(scale, scale), (between, between)]
    for ratio in ratios:
        long, short = scale * math.sqrt(ratio), scale / math.sqrt(ratio)
        shapes += [(long, short), (short, long)]
    return shapes


def _level(height: int, width: int, shapes: list[tuple[float, float]]) -> Tensor:
    """Priors (height * width * K, 4) of one level."""
    cy, cx = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    centres = torch.stack([cx, cy], dim=-1).reshape(-1, 1, 2)  # (H * W, 1, 2)
    sizes = torch.tensor(shapes)  # (K, 2)
    cells = [centres.expand(-1, len(sizes), -1), sizes.expand(len(centres), -1, -1)]
    return torch.cat(cells, dim=-1).reshape(-1, 4)
