"""From a detector's raw output to detections: scores, decoding, non-maximum suppression, for a whole batch at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import nms

from lib.boxes import decode
from lib.config import PostprocessConfig

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
    survive, and only the other images need a deeper one: with many classes, NMS of all candidates takes longer than the
    network.
    """
    scores = class_scores(logits, loss_type)
    found: list[Detections | None] = [None] * len(scores)
    depth, images = FIRST_LOOK * config.top_k, torch.arange(len(scores), device=scores.device)
    while len(images):
        look = _look(scores[images], offsets[images], priors_cxcywh, variances, depth)
        detections, enough = _detect(look, scores.shape[1:], config)
        for image, own in zip(images.tolist(), detections, strict=True):
            found[image] = own
        images, depth = images[~enough], depth * DEEPER
    return found


class Look(NamedTuple):
    """The K best candidates of each image, by falling score."""

    boxes: Tensor  # (B, K, 4) normalised xyxy
    scores: Tensor  # (B, K)
    labels: Tensor  # (B, K) from 0


def _look(scores: Tensor, offsets: Tensor, priors_cxcywh: Tensor, variances: Sequence[float], depth: int) -> Look:
    """At the `depth` best candidates of each image, or all; `scores` are (B, P, C)."""
    best, place = scores.flatten(1).topk(min(depth, scores[0].numel()))
    prior = place // scores.shape[2]
    chosen = offsets.gather(1, prior[..., None].expand(-1, -1, 4)).float()
    return Look(decode(chosen, priors_cxcywh[prior], variances).clamp(0, 1), best, place % scores.shape[2])


def _detect(look: Look, shape: torch.Size, config: PostprocessConfig) -> tuple[list[Detections], Tensor]:
    """Detections of each image from its best candidates, out of as many as `shape` (P, C) says; whether they are all
    that there are (B,): else look deeper."""
    above = look.scores > config.confidence_threshold
    counts, survivors = _nms_by_class(look, above, shape[1], config)
    number = survivors.sum(1)
    enough = ~above[:, -1] | (number >= config.top_k) | (counts >= config.pre_nms_top_k).all(1)
    if look.scores.shape[1] == shape.numel():
        enough = torch.ones_like(enough)
    best = survivors & (survivors.cumsum(1) <= config.top_k)
    kept = (t[best].split(number.clamp(max=config.top_k).tolist()) for t in (look.boxes, look.scores, look.labels + 1))
    return [Detections(*own) for own in zip(*kept, strict=True)], enough


def _nms_by_class(look: Look, above: Tensor, num_classes: int, config: PostprocessConfig) -> tuple[Tensor, Tensor]:
    """Candidates (B, C) of each image and class that are `above` (B, K) the threshold; which of them survive (B, K).

    Images and classes with few boxes share a call, in which each has a place of its own: boxes lie in [0, 1], places
    are 2 apart. In float64, where the shift loses nothing that counts; torchvision's batched_nms shifts in float32.
    """
    images = torch.arange(len(above), device=above.device)[:, None]
    group = (num_classes * images + look.labels)[above]  # (N,) an image's classes are neighbours
    counts = group.bincount(minlength=len(above) * num_classes)
    group, order = group.sort(stable=True)  # best first within a group
    rank = torch.arange(len(group), device=group.device) - (counts.cumsum(0) - counts)[group]
    chosen = order[rank < config.pre_nms_top_k]
    sizes = _join_few(counts.clamp(max=config.pre_nms_top_k).tolist())
    group, boxes, scores = group[rank < config.pre_nms_top_k], look.boxes[above], look.scores[above]
    boxes, scores = boxes[chosen].double() + 2 * group[:, None], scores[chosen].double()
    members = above.flatten().nonzero().flatten()[chosen].split(sizes)
    calls = zip(members, boxes.split(sizes), scores.split(sizes), strict=True)
    kept = torch.cat([own[nms(*candidates, config.nms_threshold)] for own, *candidates in calls])
    survivors = torch.zeros_like(above)
    survivors.view(-1)[kept] = True
    return counts.view(len(above), num_classes), survivors


def _join_few(counts: Sequence[int]) -> list[int]:
    """The sizes of groups, with neighbours joined up to `TOGETHER` boxes."""
    sizes = [0]
    for count in counts:
        if sizes[-1] and sizes[-1] + count > TOGETHER:
            sizes.append(0)
        sizes[-1] += count
    return sizes
