"""From a detector's raw output to detections: scores, decoding, non-maximum suppression, for a whole batch at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import nms

from lib.config import PostprocessConfig
from lib.priors import decode

FIRST_LOOK = 2  # times `top_k`: candidates of an image among which its detections are looked for at first
DEEPER = 4  # times as many at each further look
TOGETHER = 64  # boxes of which NMS takes less time than a call of it


class Detections(NamedTuple):
    """What was found in one picture, best first: boxes (K, 4) normalised xyxy, scores (K,), labels (K,) from 1."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


def class_scores(logits: Tensor, loss_type: str) -> Tensor:
    """Logits (..., C + 1) to the foreground's scores (..., C): sigmoid after focal loss, softmax after multibox."""
    logits = logits.float()
    return logits[..., 1:].sigmoid() if loss_type == "focal" else logits.softmax(-1)[..., 1:]


def postprocess(
    logits: Tensor,
    offsets: Tensor,
    priors_cxcywh: Tensor,
    config: PostprocessConfig,
    loss_type: str,
    variances: Sequence[float],
) -> list[Detections]:
    """Logits (B, P, C + 1) and offsets (B, P, 4) to the detections of each image (SSD, section 3.1, "inference").

    Per image and class the `pre_nms_top_k` best boxes above the confidence threshold enter NMS; per image the `top_k`
    best survivors stay. Boxes are cut at the image's border.

    What survives NMS depends on better boxes only. So a look at the best candidates is enough if `top_k` of them
    survive: with many classes, NMS of all candidates takes longer than the network. Images that need it get a deeper
    look, one by one, which bounds the memory.
    """
    scores = class_scores(logits, loss_type)
    size, depth = scores.shape[1:], FIRST_LOOK * config.top_k
    found, enough = _detect(_look(scores, offsets, priors_cxcywh, variances, depth), size, config)
    for i in (~enough).nonzero().flatten().tolist():
        own, deeper = slice(i, i + 1), depth
        while not enough[i]:
            deeper *= DEEPER
            look = _look(scores[own], offsets[own], priors_cxcywh, variances, deeper)
            (found[i],), enough[own] = _detect(look, size, config)
    return found


class Look(NamedTuple):
    """The K best candidates of each image, by falling score."""

    boxes: Tensor  # (B, K, 4) normalised xyxy
    scores: Tensor  # (B, K)
    labels: Tensor  # (B, K) from 0


def _look(scores: Tensor, offsets: Tensor, priors_cxcywh: Tensor, variances: Sequence[float], depth: int) -> Look:
    """At the `depth` best candidates of each image, or all; `scores` are (B, P, C)."""
    best, place = scores.flatten(1).topk(min(depth, scores.shape[1:].numel()))
    prior = place // scores.shape[2]
    chosen = offsets.gather(1, prior[..., None].expand(-1, -1, 4)).float()
    return Look(decode(chosen, priors_cxcywh[prior], variances).clamp(0, 1), best, place % scores.shape[2])


def _detect(look: Look, size: torch.Size, config: PostprocessConfig) -> tuple[list[Detections], Tensor]:
    """Detections of each image from its best candidates, out of as many as `size` (P, C) says; (B,) whether a deeper
    look could not change them."""
    above = look.scores > config.confidence_threshold
    survivors, counts = _nms_by_class(look, above, size[1], config)
    number = survivors.sum(1)
    enough = ~above[:, -1] | (number >= config.top_k) | (counts >= config.pre_nms_top_k).all(1)
    if look.scores.shape[1] == size.numel():
        enough[:] = True
    best = survivors & (survivors.cumsum(1) <= config.top_k)
    columns = (t[best].split(best.sum(1).tolist()) for t in (look.boxes, look.scores, look.labels + 1))
    # Copies: views would keep, and take along to another process, what the whole batch holds.
    return [Detections(*(t.clone() for t in own)) for own in zip(*columns, strict=True)], enough


def _nms_by_class(look: Look, above: Tensor, num_classes: int, config: PostprocessConfig) -> tuple[Tensor, Tensor]:
    """Which of the candidates that are `above` (B, K) the threshold survive (B, K); how many entered (B, C) per class.

    Images and classes with few boxes share a call, in which each has a place of its own: boxes lie in [0, 1], places
    are 2 apart. In float64, where the shift loses nothing that counts; torchvision's batched_nms shifts in float32.
    """
    images = torch.arange(len(above), device=above.device)[:, None]
    candidates = above.flatten().nonzero().flatten()
    group = (num_classes * images + look.labels).flatten()[candidates]  # an image's classes are neighbours
    counts = group.bincount(minlength=len(above) * num_classes)
    group, order = group.sort(stable=True)  # best first within a group
    rank = torch.arange(len(group), device=group.device) - (counts.cumsum(0) - counts)[group]
    enters, counts = rank < config.pre_nms_top_k, counts.clamp(max=config.pre_nms_top_k)
    candidates, group = candidates[order[enters]], group[enters]
    apart = look.boxes.flatten(0, 1)[candidates].double() + 2 * group[:, None]
    scores, sizes = look.scores.flatten()[candidates].double(), _join_few(counts.tolist())
    calls = zip(*(t.split(sizes) for t in (candidates, apart, scores)), strict=True)
    survivors = torch.zeros_like(above)
    survivors.view(-1)[torch.cat([own[nms(*boxes, config.nms_threshold)] for own, *boxes in calls])] = True
    return survivors, counts.view(len(above), num_classes)


def _join_few(counts: Sequence[int]) -> list[int]:
    """The sizes of groups, with neighbours joined up to `TOGETHER` boxes."""
    sizes = [0]
    for count in counts:
        if sizes[-1] and sizes[-1] + count > TOGETHER:
            sizes.append(0)
        sizes[-1] += count
    return sizes
