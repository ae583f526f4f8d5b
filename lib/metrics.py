"""Average precision as COCO and as VOC define it. Pure functions: nothing is kept between calls.

Both take one dict per image, numpy arrays or CPU tensors, boxes in pixels, xyxy, continuous (0-based, x2 - x1 wide):
    ground truth   boxes (N, 4), labels (N,) in 1..num_classes, ignore (N,) bool, optionally area (N,) in pixels^2
    detections     boxes (K, 4), scores (K,), labels (K,)
`ignore` marks VOC's difficult and COCO's crowd objects. A class with objects but without detections scores 0; a class
without objects has no score: nan in `per_class`, left out of every mean. A mean over nothing is nan.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from lib.errors import UserError, did_you_mean

Record = Mapping[str, Any]

COCO_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
VOC_METHODS = ("all", "11point")


def coco_metrics(ground_truth: Sequence[Record], detections: Sequence[Record], num_classes: int) -> dict[str, Any]:
    """The twelve numbers of pycocotools under `COCO_NAMES`, and `per_class`: AP of classes 1..num_classes, a list."""
    _check_lengths(ground_truth, detections)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = _coco(len(ground_truth), num_classes, _coco_objects(ground_truth))
        # COCO.loadRes would refuse an empty list, and copies what is already in memory.
        found = _coco(len(ground_truth), num_classes, _coco_detections(detections))
        evaluation = COCOeval(truth, found, iouType="bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (thresholds, recalls, classes); -1: no objects
    per_class = np.where(precision[0, 0] < 0, np.nan, precision.mean((0, 1)))
    numbers = np.where(evaluation.stats < 0, np.nan, evaluation.stats)
    return {**dict(zip(COCO_NAMES, numbers.tolist(), strict=True)), "per_class": per_class.tolist()}


def _coco(num_images: int, num_classes: int, annotations: list[dict]) -> COCO:
    """A COCO data set in memory: images are numbered from 0, annotations from 1, since COCOeval reads 0 as no match."""
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image} for image in range(num_images)],
        "categories": [{"id": label} for label in range(1, num_classes + 1)],
        "annotations": [{**annotation, "id": number} for number, annotation in enumerate(annotations, 1)],
    }
    coco.createIndex()
    return coco


def _coco_objects(ground_truth: Sequence[Record]) -> list[dict]:
    annotations = []
    for image, record in enumerate(ground_truth):
        boxes = _xywh(record["boxes"])
        area = np.asarray(record.get("area", boxes[:, 2] * boxes[:, 3]))
        labels, ignore = np.asarray(record["labels"]), np.asarray(record["ignore"])
        columns = boxes.tolist(), labels.tolist(), area.tolist(), ignore.astype(int).tolist()
        for box, label, size, crowd in zip(*columns, strict=True):
            annotations.append({"image_id": image, "category_id": label, "bbox": box, "area": size, "iscrowd": crowd})
    return annotations


def _coco_detections(detections: Sequence[Record]) -> list[dict]:
    annotations = []
    for image, record in enumerate(detections):
        boxes = _xywh(record["boxes"])
        labels, scores = np.asarray(record["labels"]), np.asarray(record["scores"])
        columns = boxes.tolist(), labels.tolist(), (boxes[:, 2] * boxes[:, 3]).tolist(), scores.tolist()
        for box, label, size, score in zip(*columns, strict=True):
            annotations.append({"image_id": image, "category_id": label, "bbox": box, "area": size, "score": score})
    return annotations


def voc_metrics(
    ground_truth: Sequence[Record],
    detections: Sequence[Record],
    num_classes: int,
    iou: float = 0.5,
    method: str = "all",
) -> dict[str, Any]:
    """`mAP`, and `per_class`: AP of classes 1..num_classes, as VOCevaldet.m of the VOC devkit finds them.

    A detection belongs to the object of its class that it overlaps most, from `iou` on; the first by score is right, a
    second one of the same object is wrong, and one of an `ignore` object is neither. `method` is "all" (area under the
    monotone curve, VOC 2010 on) or "11point" (VOC 2007). The devkit counts pixels, x2 - x1 + 1; a VOC box read as
    continuous [xmin - 1, ymin - 1, xmax, ymax] has that very size, so nothing is added here.
    """
    _check_lengths(ground_truth, detections)
    if method not in VOC_METHODS:
        options = ", ".join(VOC_METHODS)
        raise UserError(f"VOC AP method is '{method}', expected one of {options}{did_you_mean(method, VOC_METHODS)}")
    object_labels = _join(ground_truth, "labels", int)
    ignore = _join(ground_truth, "ignore", bool)
    labels, scores = _join(detections, "labels", int), _join(detections, "scores", float)
    claims = _claims(ground_truth, detections, iou)
    average_precision = _all_point if method == "all" else _eleven_point
    per_class = []
    for label in range(1, num_classes + 1):
        num_objects = np.count_nonzero(~ignore[object_labels == label])
        of_class = labels == label
        claimed = claims[of_class][np.argsort(-scores[of_class], kind="stable")]
        claimed = claimed[(claimed < 0) | ~ignore[claimed]] if len(ignore) else claimed
        right = np.zeros(len(claimed), dtype=bool)
        right[np.unique(claimed, return_index=True)[1]] = True
        right &= claimed >= 0
        per_class.append(average_precision(np.cumsum(right), num_objects) if num_objects else float("nan"))
    scored = [ap for ap in per_class if not np.isnan(ap)]
    return {"mAP": float(np.mean(scored)) if scored else float("nan"), "per_class": per_class}


def _claims(ground_truth: Sequence[Record], detections: Sequence[Record], threshold: float) -> np.ndarray:
    """The object, numbered through the data set, that each detection belongs to; -1: none."""
    claims = [np.zeros(0, dtype=int)]
    first = 0
    for truth, found in zip(ground_truth, detections, strict=True):
        object_labels, labels = np.asarray(truth["labels"]), np.asarray(found["labels"])
        claim = np.full(len(labels), -1)
        if len(labels) and len(object_labels):
            iou = coco_mask.iou(_xywh(found["boxes"]), _xywh(truth["boxes"]), np.zeros(len(object_labels)))  # (K, N)
            iou[labels[:, None] != object_labels] = -1
            best = iou.argmax(1)
            claim = np.where(iou[np.arange(len(labels)), best] >= threshold, first + best, -1)
        claims.append(claim)
        first += len(object_labels)
    return np.concatenate(claims)


def _all_point(right: np.ndarray, num_objects: int) -> float:
    """Area under precision made monotone; `right` counts the right ones among the first 1, 2, ... detections."""
    precision = right / np.arange(1, len(right) + 1)
    highest_from_here = np.maximum.accumulate(precision[::-1])[::-1]
    return float((highest_from_here * np.diff(right, prepend=0)).sum() / num_objects)


def _eleven_point(right: np.ndarray, num_objects: int) -> float:
    """Mean of the highest precision at recall >= 0, 0.1, ..., 1, compared as whole numbers: 3 / 10 reaches 0.3."""
    precision = right / np.arange(1, len(right) + 1)
    return float(np.mean([precision[10 * right >= k * num_objects].max(initial=0) for k in range(11)]))


def _xywh(boxes_xyxy: Any) -> np.ndarray:
    boxes = np.asarray(boxes_xyxy).astype(np.float64).reshape(-1, 4)  # a copy, changed below
    boxes[:, 2:] -= boxes[:, :2]
    return boxes


def _join(records: Sequence[Record], key: str, dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *(np.asarray(record[key]) for record in records)]).astype(dtype)


def _check_lengths(ground_truth: Sequence[Record], detections: Sequence[Record]) -> None:
    if len(ground_truth) != len(detections):
        raise ValueError(f"{len(ground_truth)} images of ground truth, but {len(detections)} of detections")
