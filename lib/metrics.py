"""Average precision as COCO and as VOC define it.

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

from lib import coco_eval, voc_eval
from lib.coco_eval import Ranked
from lib.overlaps import Found, Objects, Pairs, Rows, joined, overlapping, take

Record = Mapping[str, Any]


class Evaluation:
    """Detections held against the ground truth of their images, which may come in several parts.

    What the metrics have in common is found once. `least_iou` is the lowest threshold that can be asked for.
    """

    def __init__(self, num_classes: int, least_iou: float = coco_eval.IOU_THRESHOLDS[0]):
        self.num_classes, self.least_iou, self.num_images = num_classes, least_iou, 0
        self._objects, self._found = _objects([]), _found([])
        self._pairs = overlapping(self._objects, self._found, least_iou)
        self._ranked: Ranked | None = None

    def add(self, ground_truth: Sequence[Record], detections: Sequence[Record]) -> None:
        """Further images."""
        if len(ground_truth) != len(detections):
            raise ValueError(f"{len(ground_truth)} images of ground truth, but {len(detections)} of detections")
        objects, found = (self._known(rows) for rows in (_objects(ground_truth), _found(detections)))
        pairs = overlapping(objects, found, self.least_iou)
        pairs.detection[:] += len(self._found.label)
        pairs.object[:] += len(self._objects.label)
        self._objects, self._found = joined(self._objects, objects), joined(self._found, found)
        self._pairs, self._ranked = joined(self._pairs, pairs), None
        self.num_images += len(ground_truth)

    def _known(self, rows: Rows) -> Rows:
        """Those whose label is a class, their images numbered after those that are here."""
        rows = take(rows, (rows.label >= 0) & (rows.label < self.num_classes))
        return rows._replace(image=rows.image + self.num_images)

    def coco(self, reference: bool = False) -> dict[str, Any]:
        """COCO's twelve numbers under `coco_eval.NAMES`, and `per_class`: AP of classes 1..num_classes, a list.

        With `reference` pycocotools itself finds them: the same numbers to 1e-9, in much more time.
        """
        if reference:
            numbers, per_class = _pycocotools(self._objects, self._found, self.num_classes)
        else:
            numbers, per_class = coco_eval.evaluate(self._by_rank(), self.num_classes)
        return {**numbers, "per_class": per_class.tolist()}

    def voc(self, iou: float = voc_eval.IOU_THRESHOLD) -> dict[str, Any]:
        """AP as the VOC devkit finds it at this IoU: `mAP`, and `per_class`, a list over classes 1..num_classes.

        These are areas under the monotone curve, as from VOC 2010 on; `mAP_11point` and `per_class_11point` are VOC
        2007's.
        """
        per_class = voc_eval.evaluate(self._objects, self._found, self._pairs_from(iou), self.num_classes, iou)
        metrics: dict[str, Any] = {}
        for suffix, aps in zip(("", "_11point"), per_class, strict=True):
            scored = aps[~np.isnan(aps)]
            metrics[f"mAP{suffix}"] = float(scored.mean()) if len(scored) else float("nan")
            metrics[f"per_class{suffix}"] = aps.tolist()
        return metrics

    def resampled(self, objective: str, weight: np.ndarray) -> np.ndarray:
        """`objective` ("AP", "AP50" or "mAP") on each of R resamples of the images, (R,); nan where one has no object.

        `weight` (R, N) int says how often each of the N images stands in a resample.
        """
        if weight.shape[1] != self.num_images:
            raise ValueError(f"weights of {weight.shape[1]} images, but {self.num_images} are here")
        if objective == "mAP":
            pairs = self._pairs_from(voc_eval.IOU_THRESHOLD)
            return voc_eval.resampled_map(self._objects, self._found, pairs, self.num_classes, weight)
        thresholds = slice(1) if objective == "AP50" else slice(None)
        return coco_eval.resampled_ap(self._by_rank(), self.num_classes, weight, thresholds)

    def _by_rank(self) -> Ranked:
        if self._ranked is None:
            pairs = self._pairs_from(coco_eval.IOU_THRESHOLDS[0])
            self._ranked = coco_eval.rank_found(self._objects, self._found, pairs)
        return self._ranked

    def _pairs_from(self, iou: float) -> Pairs:
        if iou < self.least_iou:
            raise ValueError(f"a threshold of {iou}, but least_iou is {self.least_iou}")
        return self._pairs


def coco_metrics(
    ground_truth: Sequence[Record], detections: Sequence[Record], num_classes: int, reference: bool = False
) -> dict[str, Any]:
    """`Evaluation.coco` of these images."""
    evaluation = Evaluation(num_classes)
    evaluation.add(ground_truth, detections)
    return evaluation.coco(reference)


def voc_metrics(
    ground_truth: Sequence[Record],
    detections: Sequence[Record],
    num_classes: int,
    iou: float = voc_eval.IOU_THRESHOLD,
) -> dict[str, Any]:
    """`Evaluation.voc` of these images."""
    evaluation = Evaluation(num_classes, iou)
    evaluation.add(ground_truth, detections)
    return evaluation.voc(iou)


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


def _images(records: Sequence[Record]) -> np.ndarray:
    return np.repeat(np.arange(len(records)), [len(record["labels"]) for record in records])


def _join(records: Sequence[Record], key: str, dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *(np.asarray(record[key]) for record in records)]).astype(dtype)


def _join_xywh(records: Sequence[Record]) -> np.ndarray:
    boxes = np.concatenate([np.zeros((0, 4)), *(np.asarray(record["boxes"]) for record in records)])  # float64
    boxes[:, 2:] -= boxes[:, :2]
    return boxes
