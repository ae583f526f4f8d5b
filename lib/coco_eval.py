"""COCO's evaluation of boxes on arrays: all images, classes and IoU thresholds at once, with pycocotools' numbers.

Two observations make it fast. Only pairs of a detection and an object with an IoU of at least 0.5 matter, and they are
few. And COCO's matching, in which the detections choose one after the other, best score first, is the stable matching
of detections that prefer the object with the highest IoU and objects that prefer the detection with the best score; so
all detections can propose at once, in rounds (Gale and Shapley, "College Admissions and the Stability of Marriage",
1962).

Shapes: N objects, K detections, P pairs, M matches, T = 10 IoU thresholds, C classes, R resamples of the images.
"""

from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch.nn import functional as F

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
DETECTIONS_ALLOWED = (1, 10, 100)  # of one image and class, the best by score
# By the suffix of the names, in pixels^2; both ends belong to the range.
AREAS = {"": (0, 1e10), "s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e10)}
POINTS_AT_ONCE = 2_000_000  # bounds the memory: more resamples than have so many points are done in turns


class GroundTruth(NamedTuple):
    """The objects of all images. A crowd is not to be found, and may match any number of detections."""

    image: np.ndarray  # (N,) from 0, rising
    label: np.ndarray  # (N,) from 0
    box_xywh: np.ndarray  # (N, 4) float64, pixels
    area: np.ndarray  # (N,) float64, pixels^2
    crowd: np.ndarray  # (N,) bool


class ScoredBoxes(NamedTuple):
    """The detections of all images."""

    image: np.ndarray  # (K,) from 0, rising
    label: np.ndarray  # (K,) from 0
    box_xywh: np.ndarray  # (K, 4) float64, pixels
    score: np.ndarray  # (K,)


class Pairs(NamedTuple):
    """Pairs of a detection and an object of the same image and class."""

    detection: np.ndarray  # (P,) index into ScoredBoxes
    object: np.ndarray  # (P,) index into GroundTruth
    iou: np.ndarray  # (P,)


Rows = TypeVar("Rows", GroundTruth, ScoredBoxes, Pairs)


def take(rows: Rows, chosen: np.ndarray) -> Rows:
    """The rows that an index or a mask chooses."""
    return type(rows)(*(column[chosen] for column in rows))


def overlapping_pairs(objects: GroundTruth, found: ScoredBoxes, least_iou: float) -> Pairs:
    """All pairs with an IoU of at least `least_iou`, ordered by detection, then by object."""
    images = max(objects.image.max(initial=0), found.image.max(initial=0)) + 1
    object_group = objects.label * images + objects.image
    found_group = found.label * images + found.image
    # Sorted by group, the objects of a detection's image and class are one interval.
    by_group = np.argsort(object_group, kind="stable")
    first = np.searchsorted(object_group[by_group], found_group, "left")
    count = np.searchsorted(object_group[by_group], found_group, "right") - first
    detection = np.repeat(np.arange(len(found_group)), count)
    other = by_group[np.arange(len(detection)) + np.repeat(first - np.cumsum(count) + count, count)]
    pairs = Pairs(detection, other, iou(objects, found, detection, other))
    return take(pairs, pairs.iou >= least_iou)


def iou(objects: GroundTruth, found: ScoredBoxes, detection: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(P,) IoU of detections and objects given by their indices (P,); with a crowd, over the detection's area only."""
    # Rounded as pycocotools rounds, since an IoU may equal a threshold exactly.
    x, y, w, h = np.ascontiguousarray(found.box_xywh.T)  # (K,) each
    object_x, object_y, object_w, object_h = np.ascontiguousarray(objects.box_xywh.T)  # (N,) each
    right = np.minimum((x + w)[detection], (object_x + object_w)[other])
    bottom = np.minimum((y + h)[detection], (object_y + object_h)[other])
    width = right - np.maximum(x[detection], object_x[other])
    height = bottom - np.maximum(y[detection], object_y[other])
    overlap = width.clip(0) * height.clip(0)
    area = (w * h)[detection]
    union = np.where(objects.crowd[other], area, area + (object_w * object_h)[other] - overlap)
    return np.divide(overlap, union, out=np.zeros(len(overlap)), where=overlap > 0)


class Ranked(NamedTuple):
    """The input of the matching, with at most 100 detections of an image and class, the best."""

    objects: GroundTruth
    found: ScoredBoxes  # by class, then by falling score
    rank: np.ndarray  # (K,) from 0, within an image and class
    pairs: Pairs  # by detection, then by falling IoU


def rank_detections(objects: GroundTruth, found: ScoredBoxes, pairs: Pairs) -> Ranked:
    """Sort and cut the detections; `pairs` must hold all with an IoU of at least 0.5, and may hold others."""
    order = np.lexsort((-found.score, found.label))  # stable: at equal scores the earlier image is first
    group = found.label[order] * (found.image.max(initial=0) + 1) + found.image[order]
    by_group = np.argsort(group, kind="stable")
    rank = np.empty(len(group), int)
    rank[by_group] = _running_sum(np.ones(len(group), int), group[by_group]) - 1
    kept = rank < DETECTIONS_ALLOWED[-1]
    order, rank = order[kept], rank[kept]
    # The pairs point to the detections' new places, -1 for those that were cut.
    place = np.full(len(found.label), -1)
    place[order] = np.arange(len(order))
    pairs = pairs._replace(detection=place[pairs.detection])
    pairs = take(pairs, pairs.detection >= 0)
    by_preference = np.lexsort((-pairs.object, -pairs.iou, pairs.detection))  # at equal IoU the later object wins
    return Ranked(objects, take(found, order), rank, take(pairs, by_preference))


def coco_numbers(ranked: Ranked, num_classes: int) -> tuple[dict[str, float], np.ndarray]:
    """The twelve numbers under `NAMES`, and the AP (C,) of each class; nan where there are no objects to find."""
    images = max(ranked.objects.image.max(initial=0), ranked.found.image.max(initial=0)) + 1
    once = np.ones((1, images), int)
    numbers = {}
    for size, area in AREAS.items():
        matches = _match_area(ranked, area, num_classes)
        num_objects, ap = _average_precision(ranked, matches, once, num_classes)  # (1, C), (1, T, C)
        # The recall with each of DETECTIONS_ALLOWED, (3, T, C).
        curve = matches.curve[matches.right]
        rank = ranked.rank[matches.detection[matches.right]]
        right = [np.bincount(curve[rank < most], minlength=ap.size) for most in DETECTIONS_ALLOWED]
        recall = np.reshape(right, (-1, *ap.shape[1:])) / np.maximum(num_objects, 1)
        numbers[f"AP{size}"] = _mean(num_objects, ap)
        if size:
            numbers[f"AR{size}"] = _mean(num_objects, recall[-1:])
        else:
            numbers["AP50"] = _mean(num_objects, ap[:, :1])
            numbers["AP75"] = _mean(num_objects, ap[:, 5:6])
            for i, most in enumerate(DETECTIONS_ALLOWED):
                numbers[f"AR{most}"] = _mean(num_objects, recall[i : i + 1])
            per_class = np.where(num_objects[0] > 0, ap[0].mean(0), np.nan)
    return {name: float(numbers[name][0]) for name in NAMES}, per_class


def resampled_ap(ranked: Ranked, num_classes: int, weight: np.ndarray, thresholds: slice = slice(None)) -> np.ndarray:
    """AP (R,) of R resamples of the images; image i occurs `weight[r, i]` times in resample r, weight (R, images) int.

    `thresholds` chooses among `IOU_THRESHOLDS`. The matching is within images, so it is found once. A copy of a
    detection ties with its original, and the precision is highest when all copies are in: so a curve is that of one
    pass in which each detection counts as often as its image occurs.
    """
    matches = _match_area(ranked, AREAS[""], num_classes)
    points = len(ranked.found.label) + len(matches.curve) + len(IOU_THRESHOLDS) * num_classes
    means = []
    for some in np.array_split(weight, max(1, -(-len(weight) * points // POINTS_AT_ONCE))):
        num_objects, ap = _average_precision(ranked, matches, some, num_classes)
        means.append(_mean(num_objects, ap[:, thresholds]))
    return np.concatenate(means)


class Matches(NamedTuple):
    """The matches of one area range at all thresholds, ordered by threshold, then by detection."""

    wanted: np.ndarray  # (N,) bool, the objects to find
    inside: np.ndarray  # (K,) bool, the detections that are wrong if they match nothing; others do not count
    detection: np.ndarray  # (M,) index into ScoredBoxes
    right: np.ndarray  # (M,) bool, whether the object is to be found; a match with another one does not count
    curve: np.ndarray  # (M,) threshold * C + label, the number of a precision-recall curve


def _match_area(ranked: Ranked, area: tuple[float, float], num_classes: int) -> Matches:
    """Match where the objects within `area` are to be found."""
    objects, found, _, pairs = ranked
    low, high = area
    wanted = ~objects.crowd & (objects.area >= low) & (objects.area <= high)
    size = found.box_xywh[:, 2] * found.box_xywh[:, 3]
    inside = (size >= low) & (size <= high)
    # A detection prefers any object that is to be found to all that are not.
    pairs = take(pairs, np.argsort(2 * pairs.detection + ~wanted[pairs.object], kind="stable"))
    threshold, pair = _match(pairs, objects.crowd, len(found.label))
    detection = pairs.detection[pair]
    curve = threshold * num_classes + found.label[detection]
    return Matches(wanted, inside, detection, wanted[pairs.object[pair]], curve)


def _match(pairs: Pairs, crowd: np.ndarray, num_detections: int) -> tuple[np.ndarray, np.ndarray]:
    """The threshold (M,) and the index (M,) into `pairs` of all matches, ordered by threshold, then by detection."""
    # The detections are ordered by score within a class, the pairs of each detection by its preference.
    threshold, pair = np.nonzero(pairs.iou >= IOU_THRESHOLDS[:, None])
    # Every threshold has detections and objects of its own.
    proposer = threshold * num_detections + pairs.detection[pair]
    target = threshold * len(crowd) + pairs.object[pair]
    shared = crowd[pairs.object[pair]]
    next_proposer = np.append(proposer, -1)
    holder = np.empty(len(IOU_THRESHOLDS) * len(crowd), dtype=np.int64)
    current = np.flatnonzero(np.diff(proposer, prepend=-1))  # each detection proposes to its favourite first
    while True:
        # Of several proposals to an object the one written last stays: in reverse order, that of the best score.
        holder[target[current[::-1]]] = proposer[current[::-1]]
        lost = (holder[target[current]] != proposer[current]) & ~shared[current]
        if not lost.any():
            return threshold[current], pair[current]
        following = current + lost
        # A detection that has no further choice drops out.
        current = following[next_proposer[following] == proposer[current]]


def _average_precision(
    ranked: Ranked, matches: Matches, weight: np.ndarray, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Objects to find (R, C), and the mean (R, T, C) over `RECALLS` of the highest precision there or further on."""
    wanted = take(ranked.objects, matches.wanted)
    place = wanted.image * num_classes + wanted.label
    per_image = np.bincount(place, minlength=weight.shape[1] * num_classes).reshape(-1, num_classes)
    num_objects = weight @ per_image
    ap = np.zeros((len(weight), len(IOU_THRESHOLDS) * num_classes))
    if matches.right.any():
        # Precision is highest at the detections that are right.
        right, seen, curve = _count_along_curves(ranked.found, matches, weight)
        recall = right / np.maximum(num_objects, 1)[:, curve % num_classes]
        precision = right / (seen + np.spacing(1))
        ap[:, np.unique(curve)] = _sum_over_recalls(recall, precision, curve) / len(RECALLS)
    return num_objects, ap.reshape(len(weight), len(IOU_THRESHOLDS), num_classes)


def _count_along_curves(
    found: ScoredBoxes, matches: Matches, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Up to each of the Q detections that are right: the right ones (R, Q), all that count (R, Q); the curve (Q,)."""
    _, inside, detection, right, curve = matches
    times = weight[:, found.image[detection]]  # (R, M) how often each match occurs
    num_right = _running_sum(times * right, curve)
    # Besides the right ones those count that lie inside and match nothing.
    class_start = np.searchsorted(found.label, found.label[detection])
    inside_matched = _running_sum(times * inside[detection], curve)
    ends, place = np.unique(np.concatenate([class_start, detection + 1]), return_inverse=True)
    before_class, up_to = np.split(_count_up_to(ends, found.image, inside, weight)[:, place], 2, axis=1)
    seen = num_right + (up_to - before_class) - inside_matched
    return num_right[:, right], seen[:, right], curve[right]


def _sum_over_recalls(recall: np.ndarray, precision: np.ndarray, curve: np.ndarray) -> np.ndarray:
    """(R, U) of each of U curves, the sum over `RECALLS` of the highest precision from there on.

    `recall` and `precision` are (R, Q), at points of the curves `curve` (Q,), which rises.
    """
    start = np.flatnonzero(np.diff(curve, prepend=-1))
    # The maximum from the end; a shift of 2 a curve keeps it from reaching into the curve before.
    shift = 2.0 * curve
    highest = np.maximum.accumulate((precision - shift)[:, ::-1], axis=1)[:, ::-1] + shift
    # Each point stands for the recalls that it is the first to reach.
    reached = np.searchsorted(RECALLS, recall, "right")
    new = np.diff(reached, axis=1, prepend=0)
    new[:, start] = reached[:, start]
    return np.add.reduceat(highest * new, start, axis=1)


def _count_up_to(ends: np.ndarray, image: np.ndarray, inside: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """(R, E) of the first `ends` (E,), rising, detections: how many lie inside, each as often as its image occurs."""
    # The weights of images are summed from one end to the next, as bags of rows of a table: far fewer sums than
    # detections. In float64, exact.
    last = ends[-1]
    bags = F.embedding_bag(
        torch.from_numpy(image[:last]),
        torch.from_numpy(weight.T.astype(float, order="C")),
        torch.from_numpy(ends - np.diff(ends, prepend=0)),
        mode="sum",
        per_sample_weights=torch.from_numpy(inside[:last].astype(float)),
    )
    return np.cumsum(bags.numpy().T, axis=1).astype(int)


def _running_sum(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Cumulative sum (..., M) that starts anew where `group` (M,) changes."""
    total = np.cumsum(values, axis=-1)
    start = np.flatnonzero(np.diff(group, prepend=-1))
    return total - np.repeat((total - values)[..., start], np.diff(start, append=len(group)), axis=-1)


def _mean(num_objects: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(R,) mean of `values` (R, T, C) over thresholds and the classes with objects, num_objects (R, C); else nan."""
    has_objects = num_objects > 0
    total = np.where(has_objects, values.mean(1), 0.0).sum(1)
    return np.divide(total, has_objects.sum(1), out=np.full(len(total), np.nan), where=has_objects.any(1))
