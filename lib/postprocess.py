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
    """
    scores = class_scores(logits, loss_type)
    depth, detections = FIRST_LOOK * config.top_k, []
    for i, look in enumerate(zip(*_look(scores, offsets, priors_cxcywh, variances, depth), strict=True)):
        own, deeper = slice(i, i + 1), depth
        while (found := _detect(*look, scores.shape[1:], config)) is None:
            deeper *= DEEPER
            look = [t[0] for t in _look(scores[own], offsets[own], priors_cxcywh, variances, deeper)]
        detections.append(found)
    return detections


def _look(
    scores: Tensor, offsets: Tensor, priors_cxcywh: Tensor, variances: Sequence[float], depth: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The `depth` best candidates of each image, K, or all: boxes (B, K, 4), scores (B, K) and classes from 0 (B, K).

    By falling score; `scores` are (B, P, C).
    """
    best, place = scores.flatten(1).topk(min(depth, scores[0].numel()))
    prior = place // scores.shape[2]
    chosen = offsets.gather(1, prior[..., None].expand(-1, -1, 4)).float()
    return decode(chosen, priors_cxcywh[prior], variances).clamp(0, 1), best, place % scores.shape[2]


def _detect(
    boxes: Tensor, scores: Tensor, labels: Tensor, shape: torch.Size, config: PostprocessConfig
) -> Detections | None:
    """Detections of one image from its best candidates, out of as many as `shape` (P, C) says; None: look deeper.

    What survives NMS depends on better boxes only. So a look at the best candidates is enough if `top_k` of them
    survive: with many classes, NMS of all candidates takes longer than the network.
    """
    above = int((scores > config.confidence_threshold).sum())
    complete = above < len(scores) or len(scores) == shape.numel()
    boxes, scores, labels = boxes[:above], scores[:above], labels[:above]
    counts = labels.bincount(minlength=shape[1]).tolist()
    keep = _nms_by_class(boxes, scores, labels, counts, config)[: config.top_k]
    if complete or len(keep) == config.top_k or min(counts) >= config.pre_nms_top_k:
        return Detections(boxes[keep], scores[keep], labels[keep] + 1)
    return None


def _nms_by_class(
    boxes: Tensor, scores: Tensor, labels: Tensor, counts: Sequence[int], config: PostprocessConfig
) -> Tensor:
    """Which of the boxes (N, 4), best first, survive, ascending; `counts` are those of each label.

    Classes with few boxes share a call, in which each has a place of its own: boxes lie in [0, 1], places are 2 apart.
    In float64, where the shift rounds nothing; torchvision's batched_nms shifts in float32.
    """
    order, most = labels.argsort(stable=True), config.pre_nms_top_k
    if max(counts) > most:
        order = torch.cat([members[:most] for members in order.split(counts)])
        counts = [min(count, most) for count in counts]
    apart = boxes[order].double() + 2 * labels[order, None]
    groups = zip(*(t.split(_join_few(counts)) for t in (order, apart, scores[order].double())), strict=True)
    return torch.cat([members[nms(*own, config.nms_threshold)] for members, *own in groups]).sort().values


def _join_few(counts: Sequence[int]) -> list[int]:
    """The sizes of classes, with neighbours joined up to `TOGETHER` boxes."""
    sizes = [0]
    for count in counts:
        if sizes[-1] and sizes[-1] + count > TOGETHER:
            sizes.append(0)
        sizes[-1] += count
    return sizes
