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
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from lib import coco_eval
from lib.coco_eval import Found, Objects, overlapping

Record = Mapping[str, Any]

VOC_IOU = 0.5  # a detection that overlaps an object so much has found it


def coco_metrics(
    ground_truth: Sequence[Record], detections: Sequence[Record], num_classes: int, reference: bool = False
) -> dict[str, Any]:
    """COCO's twelve numbers under `coco_eval.NAMES`, and `per_class`: AP of classes 1..num_classes, a list.

    With `reference` pycocotools itself finds them: the same numbers to 1e-9, in much more time.
    """
    _check_lengths(ground_truth, detections)
    evaluate = _pycocotools if reference else coco_eval.evaluate
    numbers, per_class = evaluate(_objects(ground_truth), _found(detections), num_classes)
    return {**numbers, "per_class": per_class.tolist()}


def _pycocotools(objects: Objects, found: Found, num_classes: int) -> tuple[dict[str, float], np.ndarray]:
    """What `coco_eval.evaluate` gives, by pycocotools."""
    area = found.box_xywh[:, 2] * found.box_xywh[:, 3]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = _coco(num_classes, iscrowd=objects.crowd, area=objects.area, **_annotation_keys(objects))
        # COCO.loadRes would refuse an empty list, and copies what is already in memory.
        results = _coco(num_classes, score=found.score, area=area, **_annotation_keys(found))
        evaluation = COCOeval(truth, results, iouType="bbox")
        evaluation.params.imgIds = sorted({*truth.imgToAnns, *results.imgToAnns})
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (thresholds, recalls, classes); -1: no objects
    per_class = np.where(precision[0, 0] < 0, np.nan, precision.mean((0, 1)))
    numbers = np.where(evaluation.stats < 0, np.nan, evaluation.stats)
    return dict(zip(coco_eval.NAMES, numbers.tolist(), strict=True)), per_class


def _annotation_keys(rows: Objects | Found) -> dict[str, np.ndarray]:
    return {"image_id": rows.image, "category_id": rows.label, "bbox": rows.box_xywh}


def _coco(num_classes: int, **columns: np.ndarray) -> COCO:
    """A COCO data set in memory. Annotations are numbered from 1, since COCOeval reads 0 as no match."""
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    coco = COCO()
    coco.dataset = {
        "images": [],
        "categories": [{"id": label} for label in range(num_classes)],
        "annotations": [{"id": number, **dict(zip(columns, row, strict=True))} for number, row in enumerate(rows, 1)],
    }
    coco.createIndex()
    return coco


def _objects(ground_truth: Sequence[Record]) -> Objects:
    """The objects of all images, labels from 0."""
    boxes = _join_xywh(ground_truth)
    area = boxes[:, 2] * boxes[:, 3]
    if any("area" in record for record in ground_truth):
        sizes = np.cumsum([len(record["labels"]) for record in ground_truth])
        for record, own in zip(ground_truth, np.split(area, sizes[:-1]), strict=True):
            own[:] = record.get("area", own)
    labels, crowd = _join(ground_truth, "labels", int), _join(ground_truth, "ignore", bool)
    return Objects(_images(ground_truth), labels - 1, boxes, area, crowd)


def _found(detections: Sequence[Record]) -> Found:
    """The detections of all images, labels from 0."""
    labels, scores = _join(detections, "labels", int), _join(detections, "scores", float)
    return Found(_images(detections), labels - 1, _join_xywh(detections), scores)


def voc_metrics(
    ground_truth: Sequence[Record], detections: Sequence[Record], num_classes: int, iou: float = VOC_IOU
) -> dict[str, Any]:
    """AP as VOCevaldet.m of the VOC devkit finds it: `mAP`, and `per_class`, a list over classes 1..num_classes.

    These are areas under the monotone curve, as from VOC 2010 on; `mAP_11point` and `per_class_11point` are VOC 2007's.
    A detection belongs to the object of its class that it overlaps most, from `iou` on; the first by score is right, a
    second one of the same object is wrong, and one of an `ignore` object is neither. The devkit counts pixels,
    x2 - x1 + 1; a VOC box read as continuous [xmin - 1, ymin - 1, xmax, ymax] has that very size, so nothing is added.
    """
    _check_lengths(ground_truth, detections)
    objects, found = _objects(ground_truth), _found(detections)
    once = np.ones((1, len(ground_truth)), int)
    curves = _voc_curves(objects, found, _claims(objects, found, iou), once, num_classes)
    metrics: dict[str, Any] = {}
    for suffix, average_precision in (("", _all_point), ("_11point", _eleven_point)):
        per_class = [average_precision(right, seen, n).item() for right, seen, n in curves]
        scored = [ap for ap in per_class if not np.isnan(ap)]
        metrics[f"mAP{suffix}"] = float(np.mean(scored)) if scored else float("nan")
        metrics[f"per_class{suffix}"] = per_class
    return metrics


def _voc_curves(
    objects: Objects, found: Found, claims: np.ndarray, weight: np.ndarray, num_classes: int
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of each class, in each of R resamples (see `coco_eval.resampled_ap`): how many of the first 1, 2, ... detections
    by score are right (R, K), how many there are (R, K), and the number of objects (R,)."""
    curves = []
    for label in range(num_classes):
        chosen = np.flatnonzero(found.label == label)
        chosen = chosen[np.argsort(-found.score[chosen], kind="stable")]
        chosen = chosen[(claims[chosen] < 0) | ~np.append(objects.crowd, False)[claims[chosen]]]
        right = np.zeros(len(chosen), int)
        right[np.unique(claims[chosen], return_index=True)[1]] = 1
        right[claims[chosen] < 0] = 0
        times = weight[:, found.image[chosen]]
        asked = objects.image[(objects.label == label) & ~objects.crowd]
        curves.append((np.cumsum(times * right, 1), np.cumsum(times, 1), weight[:, asked].sum(1)))
    return curves


def resampled(
    ground_truth: Sequence[Record], detections: Sequence[Record], num_classes: int, objective: str, weight: np.ndarray
) -> np.ndarray:
    """`objective` ("AP", "AP50" or "mAP") on each of R resamples of the images, (R,); nan where one has no object.

    `weight` (R, N) int says how often each of the N images stands in a resample.
    """
    _check_lengths(ground_truth, detections)
    objects, found = _objects(ground_truth), _found(detections)
    if objective != "mAP":
        thresholds = slice(1) if objective == "AP50" else slice(None)
        return coco_eval.resampled_ap(objects, found, num_classes, weight, thresholds)
    curves = _voc_curves(objects, found, _claims(objects, found, VOC_IOU), weight, num_classes)
    per_class = np.stack([_all_point(*curve) for curve in curves])
    counted = ~np.isnan(per_class)
    total = np.where(counted, per_class, 0).sum(0)
    return np.divide(total, counted.sum(0), out=np.full(len(total), np.nan), where=counted.any(0))


def _claims(objects: Objects, found: Found, threshold: float) -> np.ndarray:
    """The object that each detection belongs to; -1: none."""
    same_measure = objects._replace(crowd=np.zeros(len(objects.crowd), bool))  # VOC's IoU knows no crowds
    pairs = overlapping(same_measure, found, threshold)
    best_last = np.lexsort((-pairs.object, pairs.iou))  # at equal IoU the earlier object wins
    claims = np.full(len(found.label), -1)
    claims[pairs.detection[best_last]] = pairs.object[best_last]  # the last one written stays
    return claims


def _all_point(right: np.ndarray, seen: np.ndarray, num_objects: np.ndarray) -> np.ndarray:
    """(R,) area under precision made monotone; nan where there are no objects."""
    precision = right / np.maximum(seen, 1)
    highest_from_here = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    area = (highest_from_here * np.diff(right, prepend=0, axis=1)).sum(1)
    return np.divide(area, num_objects, out=np.full(len(area), np.nan), where=num_objects > 0)


def _eleven_point(right: np.ndarray, seen: np.ndarray, num_objects: np.ndarray) -> np.ndarray:
    """Mean of the highest precision at recall >= 0, 0.1, ..., 1, compared as whole numbers: 3 / 10 reaches 0.3."""
    precision = right / np.maximum(seen, 1)
    reached = 10 * right >= np.arange(11)[:, None, None] * num_objects[:, None]  # (11, R, K)
    mean = np.where(reached, precision, 0).max(2, initial=0).mean(0)
    return np.where(num_objects > 0, mean, np.nan)


def _images(records: Sequence[Record]) -> np.ndarray:
    return np.repeat(np.arange(len(records)), [len(record["labels"]) for record in records])


def _join(records: Sequence[Record], key: str, dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *(np.asarray(record[key]) for record in records)]).astype(dtype)


def _join_xywh(records: Sequence[Record]) -> np.ndarray:
    boxes = np.concatenate([np.zeros((0, 4)), *(np.asarray(record["boxes"]) for record in records)])  # float64
    boxes[:, 2:] -= boxes[:, :2]
    return boxes


def _check_lengths(ground_truth: Sequence[Record], detections: Sequence[Record]) -> None:
    if len(ground_truth) != len(detections):
        raise ValueError(f"{len(ground_truth)} images of ground truth, but {len(detections)} of detections")
