"""Average precision as COCO and as VOC define it.

Images come as one dict each, of numpy arrays or CPU tensors; boxes are xyxy in continuous pixels (0-based, a box is
x2 - x1 wide):
    ground truth   boxes (N, 4), labels (N,) in 1..num_classes, ignore (N,) bool, optionally area (N,) in pixels^2
    detections     boxes (K, 4), scores (K,), labels (K,)
`ignore` marks VOC's difficult and COCO's crowd objects. Unless every image gives `area`, an object's is its box's. A
class with objects but without detections scores 0. A class without objects has no score: it is nan in `per_class` and
left out of every mean. A mean over nothing is nan.
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from lib import coco_eval
from lib.coco_eval import GroundTruth, ScoredBoxes, overlapping_pairs, take
from lib.postprocess import Detections

VOC_IOU = 0.5
PerImage = Mapping[str, Any]


def to_pixels(detections: Detections, width: int, height: int) -> dict[str, Tensor]:
    """Detections of one picture with boxes in its pixels, as the metrics take them."""
    scale = torch.tensor([width, height, width, height], dtype=torch.float32)
    return {"boxes": detections.boxes * scale, "scores": detections.scores, "labels": detections.labels}


def detection_metrics(
    detections: Sequence[Detections], truth: Sequence[PerImage], sizes: Sequence[Sequence[int]], classes: Sequence[str]
) -> dict:
    """The `Evaluation.summary` of detections; `truth` and `sizes` (width, height) are per picture."""
    in_pixels = [to_pixels(found, *size) for found, size in zip(detections, sizes, strict=True)]
    return Evaluation(len(classes), truth, in_pixels).summary(classes)


class Evaluation:
    """Detections of some images compared with their ground truth."""

    def __init__(self, num_classes: int, ground_truth: Sequence[PerImage], detections: Sequence[PerImage]) -> None:
        self.num_classes = num_classes
        self.num_images = len(ground_truth)
        image, label, boxes = _places(ground_truth)
        has_area = all("area" in record for record in ground_truth)
        area = _join(ground_truth, "area", float) if has_area else boxes[:, 2:].prod(1)
        objects = GroundTruth(image, label, boxes, area, crowd=_join(ground_truth, "ignore", bool))
        found = ScoredBoxes(*_places(detections), score=_join(detections, "scores", float))
        self.objects, self.found = (
            take(rows, (rows.label >= 0) & (rows.label < num_classes)) for rows in (objects, found)
        )
        self.pairs = overlapping_pairs(self.objects, self.found, VOC_IOU)
        self.ranked = coco_eval.rank_detections(self.objects, self.found, self.pairs)

    def summary(self, classes: Sequence[str], reference: bool = False) -> dict:
        """COCO's twelve numbers, VOC's mAP over all points and over VOC 2007's 11, and both APs of each class.

        With `reference` pycocotools finds COCO's numbers.
        """
        coco, voc = self.coco(reference), self.voc()
        pairs = zip(classes, coco.pop("per_class"), voc["per_class"], strict=True)
        per_class = {name: {"AP": coco_ap, "mAP": voc_ap} for name, coco_ap, voc_ap in pairs}
        return {**coco, "mAP": voc["mAP"], "mAP_11point": voc["mAP_11point"], "per_class": per_class}

    def coco(self, reference: bool = False) -> dict[str, Any]:
        """COCO's twelve numbers under `coco_eval.NAMES`, and `per_class`: AP of classes 1..num_classes, a list.

        With `reference` pycocotools finds them: the same numbers to 1e-9, in much more time.
        """
        if reference:
            numbers, per_class = _pycocotools(self.objects, self.found, self.num_classes)
        else:
            numbers, per_class = coco_eval.coco_numbers(self.ranked, self.num_classes)
        return {**numbers, "per_class": per_class.tolist()}

    def voc(self) -> dict[str, Any]:
        """AP of the VOC devkit at an IoU of 0.5: `mAP`, and `per_class`, a list over classes 1..num_classes.

        They are areas under the monotone curve, as from VOC 2010 on, and with `_11point` as of VOC 2007.
        """
        curves = self._voc_curves(np.ones((1, self.num_images), int))
        metrics: dict[str, Any] = {}
        for suffix, average_precision in (("", _all_point), ("_11point", _eleven_point)):
            per_class = np.array([average_precision(*curve)[0] for curve in curves])
            scored = per_class[~np.isnan(per_class)]
            metrics[f"mAP{suffix}"] = float(scored.mean()) if len(scored) else float("nan")
            metrics[f"per_class{suffix}"] = per_class.tolist()
        return metrics

    def resampled(self, objective: str, weight: np.ndarray) -> np.ndarray:
        """`objective` ("AP", "AP50" or "mAP") on each of R resamples of the images, (R,); nan if one has no object.

        `weight` (R, num_images) int says how often each image occurs in a resample.
        """
        if objective != "mAP":
            thresholds = slice(1) if objective == "AP50" else slice(None)
            return coco_eval.resampled_ap(self.ranked, self.num_classes, weight, thresholds)
        per_class = np.stack([_all_point(*curve) for curve in self._voc_curves(weight)])  # (C, R)
        counted = ~np.isnan(per_class)
        total = np.where(counted, per_class, 0).sum(0)
        return np.divide(total, counted.sum(0), out=np.full(len(total), np.nan), where=counted.any(0))

    @functools.cached_property
    def outcomes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The owner (K,) of each detection, -1 without; whether it is right (K,); those that count, by falling score.

        As in VOCevaldet.m of the VOC devkit a detection belongs to the object of its class with the highest IoU, from
        0.5 on. The first by score is right, a second one of the same object is wrong, and one of an ignored object does
        not count. The devkit counts pixels, x2 - x1 + 1; read as continuous [xmin - 1, ymin - 1, xmax, ymax] a box has
        that very size.
        """
        objects, found, pairs = self.objects, self.found, self.pairs
        # VOC's IoU knows no crowds. COCO's of a crowd is at least as high, so `pairs` holds all that matter.
        no_crowds = objects._replace(crowd=np.zeros(len(objects.crowd), bool))
        overlap = coco_eval.iou(no_crowds, found, pairs.detection, pairs.object)
        best_last = np.lexsort((-pairs.object, overlap))  # at equal IoU the earlier object wins
        best_last = best_last[overlap[best_last] >= VOC_IOU]
        owner = np.full(len(found.label), -1)
        owner[pairs.detection[best_last]] = pairs.object[best_last]  # the last one written stays
        ignored = np.append(objects.crowd, False)[owner]  # the last one is for owner -1
        order = np.argsort(-found.score, kind="stable")
        right = np.zeros(len(owner), bool)
        right[order[np.unique(owner[order], return_index=True)[1]]] = True
        return owner, right & (owner >= 0) & ~ignored, order[~ignored[order]]

    def _voc_curves(self, weight: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Of each class, in R resamples: precision (R, K) and number of right ones (R, K) among its first 1, 2, ..., K
        detections by falling score, and number of objects (R,).
        """
        objects, found, (_, right, order) = self.objects, self.found, self.outcomes
        curves = []
        for label in range(self.num_classes):
            chosen = order[found.label[order] == label]
            times = weight[:, found.image[chosen]]
            num_right = np.cumsum(times * right[chosen], 1)
            num_objects = weight[:, objects.image[(objects.label == label) & ~objects.crowd]].sum(1)
            curves.append((num_right / np.maximum(np.cumsum(times, 1), 1), num_right, num_objects))
        return curves


def _places(records: Sequence[PerImage]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image (N,), label from 0 (N,) and box_xywh (N, 4) of everything in all images."""
    image = np.repeat(np.arange(len(records)), [len(record["labels"]) for record in records])
    boxes = _join(records, "boxes", float, 4)
    boxes[:, 2:] -= boxes[:, :2]
    return image, _join(records, "labels", int) - 1, boxes


def _join(records: Sequence[PerImage], key: str, dtype: type, *row: int) -> np.ndarray:
    nothing = np.zeros((0, *row), dtype)  # there may be no image
    return np.concatenate([nothing, *(np.asarray(record[key]) for record in records)]).astype(dtype)


def _pycocotools(objects: GroundTruth, found: ScoredBoxes, num_classes: int) -> tuple[dict[str, float], np.ndarray]:
    """The result of `coco_eval.coco_numbers`, from pycocotools."""
    area = found.box_xywh[:, 2:].prod(1)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = _coco(objects, num_classes, iscrowd=objects.crowd, area=objects.area)
        # COCO.loadRes would refuse an empty list, and copies what is already in memory.
        results = _coco(found, num_classes, score=found.score, area=area)
        evaluation = COCOeval(truth, results, iouType="bbox")
        evaluation.params.imgIds = sorted({*truth.imgToAnns, *results.imgToAnns})
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (thresholds, recalls, classes); -1: no objects
    per_class = np.where(precision[0, 0] < 0, np.nan, precision.mean((0, 1)))
    numbers = np.where(evaluation.stats < 0, np.nan, evaluation.stats)
    return dict(zip(coco_eval.NAMES, numbers.tolist(), strict=True)), per_class


def _coco(rows: GroundTruth | ScoredBoxes, num_classes: int, **columns: np.ndarray) -> COCO:
    """A COCO data set in memory. Annotations are numbered from 1, since COCOeval reads 0 as no match."""
    columns |= {"image_id": rows.image, "category_id": rows.label, "bbox": rows.box_xywh}
    columns["id"] = np.arange(1, len(rows.image) + 1)
    values = zip(*(column.tolist() for column in columns.values()), strict=True)
    coco = COCO()
    coco.dataset = {"images": [], "categories": [{"id": label} for label in range(num_classes)]}
    coco.dataset["annotations"] = [dict(zip(columns, row, strict=True)) for row in values]
    coco.createIndex()
    return coco


def _all_point(precision: np.ndarray, num_right: np.ndarray, num_objects: np.ndarray) -> np.ndarray:
    """AP (R,) of a curve, the area under precision made monotone; nan where there are no objects."""
    highest_from_here = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    area = (highest_from_here * np.diff(num_right, prepend=0, axis=1)).sum(1)
    return np.divide(area, num_objects, out=np.full(len(area), np.nan), where=num_objects > 0)


def _eleven_point(precision: np.ndarray, num_right: np.ndarray, num_objects: np.ndarray) -> np.ndarray:
    """AP (R,), the mean of the highest precision at recall >= 0, 0.1, ..., 1; nan where there are no objects."""
    # Recall is compared in whole numbers, so that 3 of 10 reaches 0.3.
    reached = 10 * num_right >= np.arange(11)[:, None, None] * num_objects[:, None]  # (11, R, K)
    mean = np.where(reached, precision, 0).max(2, initial=0).mean(0)
    return np.where(num_objects > 0, mean, np.nan)
