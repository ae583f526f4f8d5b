"""From a detector's raw output to detections: scores, decoding, non-maximum suppression, for a whole batch at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from torchvision.ops import batched_nms

from lib.boxes import decode
from lib.config import PostprocessConfig


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
    scores = class_scores(logits, loss_type).transpose(1, 2)  # (B, C, P)
    k = min(config.pre_nms_top_k, scores.shape[-1])
    top, prior = scores.topk(k, dim=-1)  # (B, C, k)
    image, label, rank = (top > config.confidence_threshold).nonzero(as_tuple=True)
    prior = prior[image, label, rank]
    boxes = decode(offsets[image, prior].float(), priors_cxcywh[prior], variances).clamp(0, 1)  # (N, 4)
    kept_scores = top[image, label, rank]
    group = image * scores.shape[1] + label
    keep = batched_nms(boxes, kept_scores, group, config.nms_threshold)  # by falling score
    image, boxes, kept_scores, label = image[keep], boxes[keep], kept_scores[keep], label[keep] + 1
    detections = []
    for i in range(len(logits)):
        mine = (image == i).nonzero()[: config.top_k, 0]
        detections.append(Detections(boxes[mine], kept_scores[mine], label[mine]))
    return detections
