"""Prior boxes of the feature maps (SSD, Liu et al., ECCV 2016, section 2.2), their fit to data, box offsets, and IoU.

Boxes are normalised to [0, 1], x times the width, y times the height; a name says cxcywh or xyxy. IoU and offsets do
not depend on the unit.
"""

import functools
import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_convert, box_iou

VARIANCES = (0.1, 0.2)
SMALLEST_SIZE = 1e-6  # the size of an empty box must have a logarithm
LARGEST_LOG_SCALE = math.log(1000 / 16)  # torchvision's bound: keeps exp() of any prediction finite
CHUNK = 1024  # objects whose IoU with every prior is in memory at a time
FIT_OBJECTS, FIT_STARTS = 2000, 100  # objects that priors are fitted to, and starts of the search


def priors_per_cell(aspect_ratios: Sequence[Sequence[float]], squares: bool = True) -> list[int]:
    """The number of priors per cell of each level: two squares, and a wide and a tall one for each ratio."""
    return [2 * squares + 2 * len(ratios) for ratios in aspect_ratios]


def prior_boxes(
    feature_sizes: Sequence[tuple[int, int]],
    scales: Sequence[float],
    aspect_ratios: Sequence[Sequence[float]],
    clip: bool | str = True,
    squares: bool = True,
) -> Tensor:
    """All priors (P, 4), cxcywh, normalised; ordered by level, row, column, then shape.

    The shapes of a cell are squares of s_k and sqrt(s_k s_{k+1}), unless `squares` is off, then r and 1/r for each
    ratio r = width / height. `feature_sizes` are (height, width) of the levels, `scales` fractions of the image side,
    one more than levels. `clip` moves corners into the image; "sizes" cuts widths and heights to 1 instead.
    """
    levels = []
    for k, (height, width) in enumerate(feature_sizes):
        between = math.sqrt(scales[k] * scales[k + 1])
        shapes = [(scales[k], scales[k]), (between, between)] if squares else []
        for ratio in aspect_ratios[k]:
            long = scales[k] * math.sqrt(ratio)
            short = scales[k] / math.sqrt(ratio)
            shapes += [(long, short), (short, long)]
        rows = (torch.arange(height) + 0.5) / height
        columns = (torch.arange(width) + 0.5) / width
        centres = torch.cartesian_prod(rows, columns).flip(1)  # (H * W, 2)
        sizes = torch.tensor(shapes).clamp(max=1 if clip == "sizes" else math.inf)  # (K, 2)
        levels.append(torch.cat([centres.repeat_interleave(len(sizes), 0), sizes.repeat(len(centres), 1)], dim=1))
    priors = torch.cat(levels)
    if clip is True:
        # Corners are clipped. Clipping cxcywh would leave a prior at the border as wide as before.
        priors = box_convert(box_convert(priors, "cxcywh", "xyxy").clamp(0, 1), "xyxy", "cxcywh")
    return priors


def coverage(boxes_xyxy: Tensor, labels: Tensor, priors_cxcywh: Tensor, num_classes: int, threshold: float) -> Tensor:
    """The share (C,) of each class's boxes (N, 4) that have an IoU of `threshold` with a prior; NaN without boxes."""
    priors_xyxy = box_convert(priors_cxcywh.cpu(), "cxcywh", "xyxy")
    covered = [box_iou(chunk, priors_xyxy).amax(1) >= threshold for chunk in boxes_xyxy.split(CHUNK) if len(chunk)]
    found = labels[torch.cat(covered)] if covered else labels
    counts = torch.bincount(labels, minlength=num_classes + 1)[1:]
    return torch.bincount(found, minlength=num_classes + 1)[1:] / counts


def fit_priors(
    boxes_xyxy: Tensor,
    labels: Tensor,
    feature_sizes: Sequence[tuple[int, int]],
    pairs_per_level: Sequence[int],
    threshold: float,
    clip: bool = True,
) -> tuple[list[float], list[list[float]]]:
    """Scales and aspect ratios whose priors, without squares, cover the boxes (N, 4) of every class best.

    A cell of level k gets `pairs_per_level[k]` ratios. Scales and ratios are powers of 2 ** 0.25. The mean square of
    the classes' uncovered shares decides, so the classes that are covered least count most. Iterated local search: one
    level at a time is fitted to what the others leave uncovered.
    """
    rng = random.Random(0)
    # About FIT_OBJECTS objects at most: equally many of each class, or all where a class has fewer.
    rows = [(labels == kind).nonzero().flatten().tolist() for kind in labels.unique()]
    most = FIT_OBJECTS // max(len(rows), 1) + 1
    chosen = [row for of in rows for row in rng.sample(of, min(most, len(of)))]
    boxes = boxes_xyxy[chosen]
    kinds, labels = labels[chosen].unique(return_inverse=True)
    shares = torch.zeros(len(labels), len(kinds))  # (N, C): each object's share of its class
    shares[torch.arange(len(labels)), labels] = 1 / torch.bincount(labels)[labels]
    # The scales (S,) and the ratios (R,) to choose from, as exponents of 2 ** 0.25.
    width, height = (boxes[:, 2:] - boxes[:, :2]).clamp(0.005, 1).log2().mul(4).unbind(1)
    low, high = ((width + height) / 2).quantile(torch.tensor([0.01, 0.99])).tolist()
    longest = (width - height).abs().quantile(0.99).item()
    # Slightly above 1 too, since priors are cut off at the edge of the image. A ratio is at most 64.
    scales = torch.arange(math.floor(low), min(math.ceil(high) + 2, 2))
    ratios = torch.arange(min(math.ceil(longest) + 2, 25))
    tables = [_coverage_table(boxes, size, scales, ratios, threshold, clip) for size in feature_sizes]
    best: list[tuple[int, list[int]]] = [(0, [0] * pairs) for pairs in pairs_per_level]  # a scale, ratios
    highest = -math.inf
    for start in range(FIT_STARTS):
        # From levels at random, then from the best ones with two at random.
        found, reached, before = list(best), -math.inf, None
        for k in rng.sample(range(len(tables)), min(len(tables), 2) if start > FIT_STARTS / 3 else len(tables)):
            found[k] = rng.randrange(len(scales)), rng.choices(range(len(ratios)), k=pairs_per_level[k])
        while found != before:
            before = list(found)
            for k in range(len(tables)):
                others = [tables[j][s, r].amax(0) for j, (s, r) in enumerate(found) if j != k]
                rest = functools.reduce(torch.maximum, others, torch.zeros(len(boxes)))
                candidate, score = _fit_level(tables[k], found[k][1], rest, shares)
                if score > reached:
                    found[k], reached = candidate, score
        if reached > highest:
            best, highest = found, reached
    fitted = [round(2 ** (scales[s].item() / 4), 3) for s, _ in best]
    return [*fitted, fitted[-1]], [sorted(round(2 ** (ratios[r].item() / 4), 2) for r in picks) for _, picks in best]


def _fit_level(table: Tensor, picks: list[int], rest: Tensor, shares: Tensor) -> tuple[tuple[int, list[int]], float]:
    """The best scale of a level with its best ratios, and how good all levels are then.

    `table` (S, R, N) and `rest` (N,) have 1 for an object that this level, or another one, covers.
    """
    table, shares = table[..., rest == 0], shares[rest == 0]
    everything, nothing = torch.arange(len(table)), torch.zeros(len(table), len(shares))
    chosen = [torch.full_like(everything, pick) for pick in picks]  # (S,) each
    for i in (*range(len(picks)), *range(len(picks) - 1)):  # the first ones again, in view of the last
        kept = [table[everything, pick] for j, pick in enumerate(chosen) if j != i]
        covered = functools.reduce(torch.maximum, kept, nothing)  # (S, N)
        uncovered = shares.sum(0) - torch.maximum(table, covered[:, None]) @ shares  # (S, R, C)
        scores, chosen[i] = uncovered.square().mean(-1).neg().max(1)  # (S,)
    scale = int(scores.argmax())
    return (scale, [int(pick[scale]) for pick in chosen]), float(scores[scale])


def _coverage_table(
    boxes: Tensor, feature_size: tuple[int, int], scales: Tensor, ratios: Tensor, threshold: float, clip: bool
) -> Tensor:
    """(S, R, N): 1 for each box (N, 4) that a ratio's wide or tall prior of a scale covers somewhere on a level.

    The cell is chosen along x and y apart, which is exact where nothing is clipped, and otherwise slightly too strict.
    """
    # The long and the short side of each shape, as exponents of 2 ** 0.125.
    long, short = 2 * scales[:, None] + ratios, 2 * scales[:, None] - ratios  # (S, R)
    smallest = int(short.min())
    sides = 2 ** (torch.arange(smallest, int(long.max()) + 1) / 8)  # (U,)
    in_x, wide = _best_overlaps(boxes[:, 0::2], feature_size[1], sides, clip)
    in_y, tall = _best_overlaps(boxes[:, 1::2], feature_size[0], sides, clip)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    covered = torch.zeros(*long.shape, len(boxes), dtype=torch.bool)
    for width, height in ((long - smallest, short - smallest), (short - smallest, long - smallest)):
        shared = in_x[width] * in_y[height]  # (S, R, N)
        covered |= shared >= threshold * (wide[width] * tall[height] + area - shared)
    return covered.float()


def _best_overlaps(spans: Tensor, cells: int, sides: Tensor, clip: bool) -> tuple[Tensor, Tensor]:
    """Along an axis: overlap (U, N) of each span (N, 2) with its best prior of each side (U,), and its length."""
    centres = (torch.arange(cells) + 0.5) / cells
    low, high = centres - sides[:, None] / 2, centres + sides[:, None] / 2  # (U, cells)
    if clip:
        low, high = low.clamp(min=0), high.clamp(max=1)
    begin, end = spans[:, :1], spans[:, 1:]
    overlaps, lengths = [], []
    for start, stop in zip(low, high, strict=True):  # one at a time, for want of memory
        shared = (torch.minimum(end, stop) - torch.maximum(begin, start)).clamp(min=0)  # (N, cells)
        best = (shared / (stop - start + end - begin)).argmax(1)
        overlaps.append(shared.gather(1, best[:, None])[:, 0])
        lengths.append((stop - start)[best])
    return torch.stack(overlaps), torch.stack(lengths)


def encode(boxes_xyxy: Tensor, priors_cxcywh: Tensor, variances: tuple[float, float] = VARIANCES) -> Tensor:
    """Offsets (..., 4) from priors to boxes, in units of the variances (SSD, Liu et al. 2016, equation 2)."""
    low, high = boxes_xyxy[..., :2], boxes_xyxy[..., 2:]
    centre = ((low + high) / 2 - priors_cxcywh[..., :2]) / priors_cxcywh[..., 2:] / variances[0]
    size = ((high - low).clamp(min=SMALLEST_SIZE) / priors_cxcywh[..., 2:]).log() / variances[1]
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
    ax1, ay1, ax2, ay2 = a.mT.contiguous()[..., :, None].unbind(-3)  # (..., P, 1)
    bx1, by1, bx2, by2 = b.mT.contiguous()[..., None, :].unbind(-3)  # (..., 1, M)
    # In place where possible: at this size, allocating memory costs more than the arithmetic.
    width = torch.minimum(ax2, bx2).sub_(torch.maximum(ax1, bx1)).clamp_(min=0)
    height = torch.minimum(ay2, by2).sub_(torch.maximum(ay1, by1)).clamp_(min=0)
    intersection = width * height  # (..., P, M)
    areas = (a[..., 2:] - a[..., :2]).prod(-1)[..., :, None] + (b[..., 2:] - b[..., :2]).prod(-1)[..., None, :]
    return intersection / areas.sub_(intersection).clamp_(min=torch.finfo(areas.dtype).tiny)
