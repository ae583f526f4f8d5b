"""COCO's evaluation of boxes in numpy, all images, classes and thresholds at once; the numbers are pycocotools'.

Two observations make it fast. Only pairs of a detection and an object that overlap by 0.5 matter, and they are few. And
COCO's matching, in which the detections choose one after the other, best score first, is the stable matching of
detections that prefer the object they overlap most and objects that all prefer the best score; so the detections can
propose all at once, in rounds (Gale and Shapley, "College Admissions and the Stability of Marriage", 1962).
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import numpy as np

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
DETECTIONS_ALLOWED = (1, 10, 100)  # of one image and class; the best by score
AREAS = ((0, 1e10), (0, 32**2), (32**2, 96**2), (96**2, 1e10))  # pixels^2: all, small, medium, large; both ends belong


class Objects(NamedTuple):
    """The ground truth of all images, N objects. A crowd is not asked for, and may match any number of detections."""

    image: np.ndarray  # (N,) from 0, rising
    label: np.ndarray  # (N,) from 0
    box_xywh: np.ndarray  # (N, 4) float64, pixels
    area: np.ndarray  # (N,) float64, pixels^2
    crowd: np.ndarray  # (N,) bool


class Found(NamedTuple):
    """The detections of all images, K of them."""

    image: np.ndarray  # (K,) from 0, rising
    label: np.ndarray  # (K,) from 0
    box_xywh: np.ndarray  # (K, 4) float64, pixels
    score: np.ndarray  # (K,)


class Pairs(NamedTuple):
    """P pairs of a detection and an object of the same image and class, ordered by detection, then by object."""

    detection: np.ndarray  # (P,) index into Found
    object: np.ndarray  # (P,) index into Objects
    iou: np.ndarray  # (P,)


class Curves(NamedTuple):
    """Of one area range; T thresholds, C classes, R recalls. Classes without objects have no meaning here."""

    num_objects: np.ndarray  # (C,)
    precision: np.ndarray  # (T, C, R) the highest at that recall or a higher one
    recall: dict[int, np.ndarray]  # (T, C) by the number of detections allowed in an image


Rows = TypeVar("Rows", Objects, Found, Pairs)


def evaluate(objects: Objects, found: Found, num_classes: int) -> tuple[dict[str, float], np.ndarray]:
    """The twelve numbers under `NAMES`, and AP (C,) of each class; nan where there are no objects to ask for."""
    objects, found = (_take(rows, (rows.label >= 0) & (rows.label < num_classes)) for rows in (objects, found))
    found = _take(found, np.lexsort((-found.score, found.label)))  # stable: at equal scores the earlier image is first
    rank = _rank(found)
    found, rank = _take(found, rank < DETECTIONS_ALLOWED[-1]), rank[rank < DETECTIONS_ALLOWED[-1]]
    pairs = overlapping(objects, found, IOU_THRESHOLDS[0])
    pairs = _take(pairs, np.lexsort((-pairs.object, -pairs.iou, pairs.detection)))  # at equal IoU the later object wins
    every, *sized = (_curves(objects, found, rank, pairs, area, num_classes) for area in AREAS)
    values = [_mean(every, p) for p in (every.precision, every.precision[:1], every.precision[5:6])]  # all, 0.5, 0.75
    values += [_mean(curves, curves.precision) for curves in sized]
    values += [_mean(every, every.recall[most]) for most in DETECTIONS_ALLOWED]
    values += [_mean(curves, curves.recall[DETECTIONS_ALLOWED[-1]]) for curves in sized]
    per_class = np.where(every.num_objects > 0, every.precision.mean((0, 2)), np.nan)
    return dict(zip(NAMES, values, strict=True)), per_class


def overlapping(objects: Objects, found: Found, least_iou: float) -> Pairs:
    """Pairs of one image and class with an IoU of at least `least_iou`; a crowd's is over the detection's area."""
    object_group, group = _groups(objects, found)
    by_group = np.argsort(object_group, kind="stable")
    first, end = (np.searchsorted(object_group[by_group], group, side) for side in ("left", "right"))
    count = end - first
    detection = np.repeat(np.arange(len(group)), count)
    other = by_group[np.arange(len(detection)) + np.repeat(first - np.cumsum(count) + count, count)]
    iou = _iou(found, objects, detection, other)
    return _take(Pairs(detection, other, iou), iou >= least_iou)


def _groups(objects: Objects, found: Found) -> tuple[np.ndarray, np.ndarray]:
    """One number for each image and class, of the objects and of the detections."""
    images = max(objects.image.max(initial=0), found.image.max(initial=0)) + 1
    return objects.label * images + objects.image, found.label * images + found.image


def _iou(found: Found, objects: Objects, detection: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(P,) of pairs given by their indices, rounded as pycocotools rounds: an IoU may equal a threshold exactly."""
    a, b = (np.ascontiguousarray(rows.box_xywh.T) for rows in (found, objects))  # (4, K), (4, N)
    width, height = (
        np.minimum((a[axis] + a[axis + 2])[detection], (b[axis] + b[axis + 2])[other])
        - np.maximum(a[axis][detection], b[axis][other])
        for axis in (0, 1)
    )
    overlap = width.clip(0) * height.clip(0)
    area = (a[2] * a[3])[detection]
    union = np.where(objects.crowd[other], area, area + (b[2] * b[3])[other] - overlap)
    return np.divide(overlap, union, out=np.zeros(len(overlap)), where=overlap > 0)


def _rank(found: Found) -> np.ndarray:
    """(K,) 0, 1, ... within an image and class, in the order of the detections."""
    _, group = _groups(found, found)
    order = np.argsort(group, kind="stable")
    rank = np.empty(len(group), dtype=np.int64)
    rank[order] = _running_sum(np.ones(len(group), dtype=np.int64), group[order]) - 1
    return rank


def _curves(
    objects: Objects, found: Found, rank: np.ndarray, pairs: Pairs, area: tuple[float, float], num_classes: int
) -> Curves:
    """Precision and recall of the objects within `area`; `found` by class, then score, and `pairs` by falling IoU."""
    low, high = area
    asked = ~objects.crowd & (objects.area >= low) & (objects.area <= high)  # (N,)
    size = found.box_xywh[:, 2] * found.box_xywh[:, 3]
    inside = (size >= low) & (size <= high)  # (K,)
    # An object that is asked for is preferred to all that are not.
    preferred = _take(pairs, np.argsort(2 * pairs.detection + ~asked[pairs.object], kind="stable"))
    threshold, pair = _match(preferred, objects.crowd, len(found.label))
    detection, right = preferred.detection[pair], asked[preferred.object[pair]]  # (M,) by threshold, class, score
    label = found.label[detection]
    curve = threshold * num_classes + label
    # Of the matched detections those of objects that are asked for count, of the others those inside.
    counted = np.concatenate([[0], np.cumsum(inside)])
    before_class = counted[np.searchsorted(found.label, label)]
    seen = counted[detection + 1] - before_class + _running_sum(right - inside[detection].astype(int), curve)
    hits = _running_sum(right.astype(int), curve)
    curve, label, rank, hits, seen = (x[right] for x in (curve, label, rank[detection], hits, seen))
    num_objects = np.bincount(objects.label[asked], minlength=num_classes)
    precision = _highest_precision(curve, hits / num_objects[label], hits / (seen + np.spacing(1)), num_classes)
    shape = len(IOU_THRESHOLDS), num_classes
    recall = {}
    for most in DETECTIONS_ALLOWED:
        hits_among_first = np.bincount(curve[rank < most], minlength=shape[0] * shape[1]).reshape(shape)
        recall[most] = hits_among_first / np.maximum(num_objects, 1)
    return Curves(num_objects, precision, recall)


def _highest_precision(curve: np.ndarray, recall: np.ndarray, precision: np.ndarray, num_classes: int) -> np.ndarray:
    """(T, C, R) from the points of all curves at which a detection is right: precision is highest there."""
    shape = len(IOU_THRESHOLDS), num_classes, len(RECALLS)
    highest = np.zeros(shape)
    last = np.searchsorted(RECALLS, recall, side="right") - 1  # of the recalls that a point has reached
    np.maximum.at(highest.reshape(-1), curve * shape[2] + last, precision)
    return np.maximum.accumulate(highest[..., ::-1], axis=-1)[..., ::-1]


def _match(pairs: Pairs, crowd: np.ndarray, num_detections: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (M,) of the threshold and of the pair of all matches, ordered by threshold, then by detection.

    The detections' order is that of their scores, the pairs' order that of each detection's preference.
    """
    threshold, pair = np.nonzero(pairs.iou >= IOU_THRESHOLDS[:, None])
    # Every threshold has detections and objects of its own.
    proposer = threshold * num_detections + pairs.detection[pair]
    target = threshold * len(crowd) + pairs.object[pair]
    shared = crowd[pairs.object[pair]]
    owner = np.append(proposer, -1)
    holder = np.empty(len(IOU_THRESHOLDS) * len(crowd), dtype=np.int64)
    current = np.flatnonzero(np.diff(proposer, prepend=-1))  # the proposal of each detection, at first its favourite
    while True:
        holder[target[current[::-1]]] = proposer[current[::-1]]  # the last one written stays: the best score
        lost = (holder[target[current]] != proposer[current]) & ~shared[current]
        if not lost.any():
            return threshold[current], pair[current]
        following = current + lost
        current = following[owner[following] == proposer[current]]  # without those that have no further choice


def _running_sum(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Cumulative sum (M,) that begins anew where `group` changes."""
    total = np.cumsum(values)
    start = np.flatnonzero(np.diff(group, prepend=-1))
    return total - np.repeat((total - values)[start], np.diff(start, append=len(group)))


def _mean(curves: Curves, values: np.ndarray) -> float:
    """Mean of `values` (T, C, ...) over the classes that have objects."""
    has_objects = curves.num_objects > 0
    return float(values[:, has_objects].mean()) if has_objects.any() else float("nan")


def _take(rows: Rows, chosen: np.ndarray) -> Rows:
    return type(rows)(*(column[chosen] for column in rows))
