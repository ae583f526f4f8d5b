"""Average precision as COCO and as VOC define it.

Both take one dict per image, numpy arrays or CPU tensors, boxes in pixels, xyxy, continuous (0-based, x2 - x1 wide):
    ground truth   boxes (N, 4), labels (N,) in 1..num_classes, ignore (N,) bool, optionally area (N,) in pixels^2
    detections     boxes (K, 4), scores (K,), labels (K,)
`ignore` marks VOC's difficult and COCO's crowd objects. A class with objects but without detections scores 0; a class
without objects has no score: nan in `per_class`, left out of every mean. A mean over nothing is nan.

VOC's evaluation of boxes on arrays, as VOCevaldet.m of the VOC devkit finds it.

A detection belongs to the object of its class that it overlaps most, from a threshold on; the first by score is right,
a second one of the same object is wrong, and one of an ignored object is neither. The devkit counts pixels,
x2 - x1 + 1; a VOC box read as continuous [xmin - 1, ymin - 1, xmax, ymax] has that very size, so nothing is added.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from lib import coco_eval
from lib.coco_eval import GroundTruth, Pairs, Ranked, Rows, ScoredBoxes, iou, joined, overlapping, take
from lib.postprocess import Detections


def to_pixels(detections: Detections, width: int, height: int) -> dict[str, Tensor]:
    """Detections of one picture with boxes in its pixels, as the metrics take them."""
    scale = torch.tensor([width, height, width, height], dtype=torch.float32)
    return {
        "boxes": detections.boxes * scale,
        "scores": detections.scores,
        "labels": detections.labels,
    }


def detection_metrics(
    detections: Sequence[Detections],
    truth: Sequence[dict],
    sizes: Sequence[tuple[int, int]],
    classes: Sequence[str],
    reference: bool = False,
) -> dict:
    """COCO's twelve numbers, VOC's mAP over all points and over VOC 2007's 11, both APs per class.

    `truth` and `sizes` (width, height) are per picture. With `reference` COCO's numbers are found by pycocotools.
    """
    evaluation = Evaluation(len(classes))
    evaluation.add(truth, [to_pixels(d, *size) for d, size in zip(detections, sizes, strict=True)])
    return summarise(evaluation, classes, reference)


def summarise(evaluation: Evaluation, classes: Sequence[str], reference: bool = False) -> dict:
    """What `detection_metrics` gives, of images that were evaluated already."""
    coco, voc = evaluation.coco(reference), evaluation.voc()
    pairs = zip(classes, coco.pop("per_class"), voc["per_class"], strict=True)
    per_class = {name: {"AP": coco_ap, "mAP": voc_ap} for name, coco_ap, voc_ap in pairs}
    return {**coco, "mAP": voc["mAP"], "mAP_11point": voc["mAP_11point"], "per_class": per_class}


VOC_IOU = 0.5
PerImage = Mapping[str, Any]


class Evaluation:
    """Detections held against the ground truth of their images, which may come in several parts.

    What the metrics have in common is found once. `least_iou` is the lowest threshold that can be asked for.
    """

    def __init__(self, num_classes: int, least_iou: float = coco_eval.IOU_THRESHOLDS[0]):
        self.num_classes, self.least_iou, self.num_images = num_classes, least_iou, 0
        self._objects, self._found = _objects([]), _found([])
        self._pairs = overlapping(self._objects, self._found, least_iou)
        self._ranked: Ranked | None = None

    def add(self, ground_truth: Sequence[PerImage], detections: Sequence[PerImage]) -> None:
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
            numbers, per_class = coco_eval.coco_numbers(self._by_rank(), self.num_classes)
        return {**numbers, "per_class": per_class.tolist()}

    def voc(self, iou: float = VOC_IOU) -> dict[str, Any]:
        """AP as the VOC devkit finds it at this IoU: `mAP`, and `per_class`, a list over classes 1..num_classes.

        These are areas under the monotone curve, as from VOC 2010 on; `mAP_11point` and `per_class_11point` are VOC
        2007's.
        """
        per_class = voc_ap(self._objects, self._found, self._pairs_from(iou), self.num_classes, iou)
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
            pairs = self._pairs_from(VOC_IOU)
            return resampled_map(self._objects, self._found, pairs, self.num_classes, weight)
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
    ground_truth: Sequence[PerImage], detections: Sequence[PerImage], num_classes: int, reference: bool = False
) -> dict[str, Any]:
    """`Evaluation.coco` of these images."""
    evaluation = Evaluation(num_classes)
    evaluation.add(ground_truth, detections)
    return evaluation.coco(reference)


def voc_metrics(
    ground_truth: Sequence[PerImage],
    detections: Sequence[PerImage],
    num_classes: int,
    iou: float = VOC_IOU,
) -> dict[str, Any]:
    """`Evaluation.voc` of these images."""
    evaluation = Evaluation(num_classes, iou)
    evaluation.add(ground_truth, detections)
    return evaluation.voc(iou)


def _pycocotools(objects: GroundTruth, found: ScoredBoxes, num_classes: int) -> tuple[dict[str, float], np.ndarray]:
    """What `coco_eval.coco_numbers` gives, by pycocotools."""
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


def _annotation_keys(rows: GroundTruth | ScoredBoxes) -> dict[str, np.ndarray]:
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


def _objects(ground_truth: Sequence[PerImage]) -> GroundTruth:
    """The objects of all images, labels from 0."""
    boxes = _join_xywh(ground_truth)
    area = boxes[:, 2] * boxes[:, 3]
    if any("area" in record for record in ground_truth):
        sizes = np.cumsum([len(record["labels"]) for record in ground_truth])
        for record, own in zip(ground_truth, np.split(area, sizes[:-1]), strict=True):
            own[:] = record.get("area", own)
    labels, crowd = _join(ground_truth, "labels", int), _join(ground_truth, "ignore", bool)
    return GroundTruth(_images(ground_truth), labels - 1, boxes, area, crowd)


def _found(detections: Sequence[PerImage]) -> ScoredBoxes:
    """The detections of all images, labels from 0."""
    labels, scores = _join(detections, "labels", int), _join(detections, "scores", float)
    return ScoredBoxes(_images(detections), labels - 1, _join_xywh(detections), scores)


def _images(records: Sequence[PerImage]) -> np.ndarray:
    return np.repeat(np.arange(len(records)), [len(record["labels"]) for record in records])


def _join(records: Sequence[PerImage], key: str, dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *(np.asarray(record[key]) for record in records)]).astype(dtype)


def _join_xywh(records: Sequence[PerImage]) -> np.ndarray:
    boxes = np.concatenate([np.zeros((0, 4)), *(np.asarray(record["boxes"]) for record in records)])  # float64
    boxes[:, 2:] -= boxes[:, :2]
    return boxes


Curve = tuple[np.ndarray, np.ndarray, np.ndarray]


def voc_ap(
    objects: GroundTruth, found: ScoredBoxes, pairs: Pairs, num_classes: int, threshold: float = VOC_IOU
) -> tuple[np.ndarray, np.ndarray]:
    """AP (C,) of each class over all points, as from VOC 2010 on, and over VOC 2007's 11; nan where no object is."""
    once = np.ones((1, max(objects.image.max(initial=0), found.image.max(initial=0)) + 1), int)
    curves = _curves(objects, found, _claims(objects, found, pairs, threshold), once, num_classes)
    all_points, eleven = (np.array([ap(*c)[0] for c in curves]) for ap in (_all_point, _eleven_point))
    return all_points, eleven


def resampled_map(
    objects: GroundTruth, found: ScoredBoxes, pairs: Pairs, num_classes: int, weight: np.ndarray
) -> np.ndarray:
    """mAP (R,) over all points, as `coco_eval.resampled_ap` finds AP; nan without objects."""
    curves = _curves(objects, found, _claims(objects, found, pairs, VOC_IOU), weight, num_classes)
    per_class = np.stack([_all_point(*curve) for curve in curves])
    counted = ~np.isnan(per_class)
    total = np.where(counted, per_class, 0).sum(0)
    return np.divide(total, counted.sum(0), out=np.full(len(total), np.nan), where=counted.any(0))


def _claims(objects: GroundTruth, found: ScoredBoxes, pairs: Pairs, threshold: float) -> np.ndarray:
    """(K,) the object that each detection belongs to; -1: none."""
    same_measure = objects._replace(crowd=np.zeros(len(objects.crowd), bool))  # VOC's IoU knows no crowds
    overlap = iou(same_measure, found, pairs.detection, pairs.object)
    best_last = np.lexsort((-pairs.object, overlap))  # at equal IoU the earlier object wins
    best_last = best_last[overlap[best_last] >= threshold]
    claims = np.full(len(found.label), -1)
    claims[pairs.detection[best_last]] = pairs.object[best_last]  # the last one written stays
    return claims


def _curves(
    objects: GroundTruth, found: ScoredBoxes, claims: np.ndarray, weight: np.ndarray, num_classes: int
) -> list[Curve]:
    """Of each class, in each of R resamples: how many of the first 1, 2, ... detections by score are right (R, K), how
    many there are (R, K), and the number of objects (R,)."""
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
