"""The objects and the detections of all images as arrays, and which of them overlap how much.

COCO's evaluation of boxes on arrays, all images, classes and thresholds at once; the numbers are pycocotools'.

Two observations make it fast. Only pairs of a detection and an object that overlap by 0.5 matter, and they are few. And
COCO's matching, in which the detections choose one after the other, best score first, is the stable matching of
detections that prefer the object they overlap most and objects that all prefer the best score; so the detections can
propose all at once, in rounds (Gale and Shapley, "College Admissions and the Stability of Marriage", 1962).
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch.nn import functional as F


class GroundTruth(NamedTuple):
    """The ground truth of all images, N objects. A crowd is not asked for, and may match any number of detections."""

    image: np.ndarray  # (N,) from 0, rising
    label: np.ndarray  # (N,) from 0
    box_xywh: np.ndarray  # (N, 4) float64, pixels
    area: np.ndarray  # (N,) float64, pixels^2
    crowd: np.ndarray  # (N,) bool


class ScoredBoxes(NamedTuple):
    """The detections of all images, K of them."""

    image: np.ndarray  # (K,) from 0, rising
    label: np.ndarray  # (K,) from 0
    box_xywh: np.ndarray  # (K, 4) float64, pixels
    score: np.ndarray  # (K,)


class Pairs(NamedTuple):
    """P pairs of a detection and an object of the same image and class, ordered by detection, then by object."""

    detection: np.ndarray  # (P,) index into ScoredBoxes
    object: np.ndarray  # (P,) index into GroundTruth
    iou: np.ndarray  # (P,)


Rows = TypeVar("Rows", GroundTruth, ScoredBoxes, Pairs)


def take(rows: Rows, chosen: np.ndarray) -> Rows:
    return type(rows)(*(column[chosen] for column in rows))


def joined(first: Rows, second: Rows) -> Rows:
    return type(first)(*(np.concatenate(columns) for columns in zip(first, second, strict=True)))


def overlapping(objects: GroundTruth, found: ScoredBoxes, least_iou: float) -> Pairs:
    """Pairs of one image and class with an IoU of at least `least_iou`; a crowd's is over the detection's area."""
    images = max(objects.image.max(initial=0), found.image.max(initial=0)) + 1
    object_group, group = (rows.label * images + rows.image for rows in (objects, found))
    by_group = np.argsort(object_group, kind="stable")
    first, end = (np.searchsorted(object_group[by_group], group, side) for side in ("left", "right"))
    count = end - first
    detection = np.repeat(np.arange(len(group)), count)
    other = by_group[np.arange(len(detection)) + np.repeat(first - np.cumsum(count) + count, count)]
    pairs = Pairs(detection, other, iou(objects, found, detection, other))
    return take(pairs, pairs.iou >= least_iou)


def iou(objects: GroundTruth, found: ScoredBoxes, detection: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(P,) of detections and objects given by their indices (P,); a crowd's is over the detection's area.

    Rounded as pycocotools rounds: an IoU may equal a threshold exactly.
    """
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


NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
DETECTIONS_ALLOWED = (1, 10, 100)  # of one image and class; the best by score
POINTS_AT_ONCE = 2_000_000  # of all resamples together; more are done in turns
AREAS = ((0, 1e10), (0, 32**2), (32**2, 96**2), (96**2, 1e10))  # pixels^2: all, small, medium, large; both ends belong


class Ranked(NamedTuple):
    """What the matching starts from. At most 100 detections of an image and class, the best."""

    objects: GroundTruth
    found: ScoredBoxes  # by class, then by falling score
    rank: np.ndarray  # (K,) from 0, within an image and class
    pairs: Pairs  # by detection, then by falling IoU


class Matches(NamedTuple):
    """Of one area range: the M matches of all thresholds, ordered by threshold, then by detection."""

    asked: np.ndarray  # (N,) bool, the objects to find
    inside: np.ndarray  # (K,) bool, the detections that count where they match nothing
    detection: np.ndarray  # (M,) index into ScoredBoxes
    right: np.ndarray  # (M,) bool: of an object that is asked for
    curve: np.ndarray  # (M,) threshold * number of classes + label


def rank_found(objects: GroundTruth, found: ScoredBoxes, pairs: Pairs) -> Ranked:
    """`pairs` are all that overlap by at least 0.5; others do no harm."""
    order = np.lexsort((-found.score, found.label))  # stable: at equal scores the earlier image is first
    rank = _rank(take(found, order))
    order, rank = (column[rank < DETECTIONS_ALLOWED[-1]] for column in (order, rank))
    place = np.full(len(found.label), -1)
    place[order] = np.arange(len(order))
    pairs = pairs._replace(detection=place[pairs.detection])
    by_choice = np.lexsort((-pairs.object, -pairs.iou, pairs.detection))  # at equal IoU the later object wins
    return Ranked(objects, take(found, order), rank, take(pairs, by_choice[pairs.detection[by_choice] >= 0]))


def coco_numbers(ranked: Ranked, num_classes: int) -> tuple[dict[str, float], np.ndarray]:
    """The twelve numbers under `NAMES`, and AP (C,) of each class; nan where there are no objects to ask for."""
    objects, found = ranked.objects, ranked.found
    once = np.ones((1, max(objects.image.max(initial=0), found.image.max(initial=0)) + 1), int)
    counts, aps, recalls = [], [], []
    for area in AREAS:
        matches = _matches(ranked, area, num_classes)
        counts.append(_num_objects(objects, matches, once, num_classes))
        aps.append(_average_precision(found, matches, counts[-1], once))
        recalls.append(_recall(ranked.rank, matches, counts[-1][0]))
    every = aps[0]
    values = [_mean(counts[0], ap) for ap in (every, every[:, :1], every[:, 5:6])]  # all thresholds, 0.5, 0.75
    values += [_mean(n, ap) for n, ap in zip(counts[1:], aps[1:], strict=True)]
    values += [_mean(counts[0], recalls[0][None, i]) for i in range(len(DETECTIONS_ALLOWED))]
    values += [_mean(n, recall[None, -1]) for n, recall in zip(counts[1:], recalls[1:], strict=True)]
    per_class = np.where(counts[0][0] > 0, every[0].mean(0), np.nan)
    return {name: float(value[0]) for name, value in zip(NAMES, values, strict=True)}, per_class


def resampled_ap(ranked: Ranked, num_classes: int, weight: np.ndarray, thresholds: slice = slice(None)) -> np.ndarray:
    """AP (R,) of R resamples of the images: image i stands `weight[r, i]` times in resample r, weight (R, N) int.

    A copy of a detection ties with its original, and the precision at which all copies are in is the highest of
    theirs: so the curves are those of one pass in which a detection counts as often as its image stands there (but for
    the order of two detections of one image and class with equal scores). The matching, which is within images, is
    found once. `thresholds` chooses among `IOU_THRESHOLDS`.
    """
    matches = _matches(ranked, AREAS[0], num_classes)
    found_ap = np.empty(len(weight))
    points = len(ranked.found.label) + len(matches.curve) + len(IOU_THRESHOLDS) * num_classes
    step = max(1, POINTS_AT_ONCE // points)
    for some in (slice(i, i + step) for i in range(0, len(weight), step)):
        num_objects = _num_objects(ranked.objects, matches, weight[some], num_classes)
        ap = _average_precision(ranked.found, matches, num_objects, weight[some])
        found_ap[some] = _mean(num_objects, ap[:, thresholds])
    return found_ap


def _rank(found: ScoredBoxes) -> np.ndarray:
    """(K,) 0, 1, ... within an image and class, in the order of the detections."""
    group = found.label * (found.image.max(initial=0) + 1) + found.image
    order = np.argsort(group, kind="stable")
    rank = np.empty(len(group), dtype=np.int64)
    rank[order] = _running_sum(np.ones(len(group), dtype=np.int64), group[order]) - 1
    return rank


def _matches(ranked: Ranked, area: tuple[float, float], num_classes: int) -> Matches:
    """The matches where objects within `area` are asked for."""
    objects, found, _, pairs = ranked
    low, high = area
    asked = ~objects.crowd & (objects.area >= low) & (objects.area <= high)
    size = found.box_xywh[:, 2] * found.box_xywh[:, 3]
    # An object that is asked for is preferred to all that are not.
    preferred = take(pairs, np.argsort(2 * pairs.detection + ~asked[pairs.object], kind="stable"))
    threshold, pair = _match(preferred, objects.crowd, len(found.label))
    detection = preferred.detection[pair]
    right, curve = asked[preferred.object[pair]], threshold * num_classes + found.label[detection]
    return Matches(asked, (size >= low) & (size <= high), detection, right, curve)


def _num_objects(objects: GroundTruth, matches: Matches, weight: np.ndarray, num_classes: int) -> np.ndarray:
    """(R, C) objects to find."""
    shape = weight.shape[1], num_classes
    place = objects.image[matches.asked] * num_classes + objects.label[matches.asked]
    return weight @ np.bincount(place, minlength=shape[0] * shape[1]).reshape(shape)


def _average_precision(found: ScoredBoxes, matches: Matches, num_objects: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """(R, T, C) mean over `RECALLS` of the highest precision at that recall or a higher one."""
    inside, detection, right, curve = matches[1:]
    label, first = found.label[detection], np.searchsorted(found.label, found.label[detection])
    ends, place = np.unique(np.concatenate([first, detection + 1]), return_inverse=True)
    before_class, up_to = np.split(_sums_up_to(ends, weight, found.image, inside)[:, place], 2, axis=1)
    times = weight[:, found.image[detection]]  # (R, M)
    # Of the matched detections those of objects that are asked for count, of the others those inside.
    seen = up_to - before_class + _running_sum(times * (right - inside[detection].astype(int)), curve)
    hits = _running_sum(times * right, curve)
    ap = np.zeros((len(weight), len(IOU_THRESHOLDS), num_objects.shape[1]))
    if right.any():
        hits, seen, curve, label = hits[:, right], seen[:, right], curve[right], label[right]
        recall = hits / np.maximum(num_objects, 1)[:, label]
        areas = _area(curve, _levels(recall), hits / (seen + np.spacing(1)))
        ap.reshape(len(weight), -1)[:, np.unique(curve)] = areas / len(RECALLS)
    return ap


def _area(curve: np.ndarray, levels: np.ndarray, precision: np.ndarray) -> np.ndarray:
    """(R, U) of each curve, the sum over `RECALLS` of its highest precision from there on.

    The points (R, P) are those at which a detection is right, where precision is highest; `curve` (P,) rises.
    """
    start = np.flatnonzero(np.diff(curve, prepend=-1))
    apart = 2.0 * curve  # so that no curve's maximum reaches into the curve before it
    highest = np.maximum.accumulate((precision - apart)[:, ::-1], axis=1)[:, ::-1] + apart
    new_levels = np.diff(levels, axis=1, prepend=0)
    new_levels[:, start] = levels[:, start]
    return np.add.reduceat(highest * new_levels, start, axis=1)


def _levels(recall: np.ndarray) -> np.ndarray:
    """How many of `RECALLS` are at most `recall`, as floating-point numbers compare."""
    below = (recall * (len(RECALLS) - 1)).astype(int)
    below -= RECALLS[below] > recall
    return below + 1 + (np.append(RECALLS, np.inf)[below + 1] <= recall)


def _sums_up_to(ends: np.ndarray, weight: np.ndarray, image: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """(R, E) of the first `ends` (E,) detections, rising, how many lie inside, each as often as its image is there.

    Sums of an image's weights over the detections from one end to the next: bags of rows of a table. In float64, exact.
    """
    last, starts = ends.max(initial=0), ends - np.diff(ends, prepend=0)
    columns = image[:last], weight.T.astype(float, order="C"), starts, inside[:last].astype(float)
    rows, table, starts, counts = (torch.from_numpy(column) for column in columns)
    sums = F.embedding_bag(rows, table, starts, mode="sum", per_sample_weights=counts)
    return np.cumsum(sums.numpy().T, axis=1).astype(int)


def _recall(rank: np.ndarray, matches: Matches, num_objects: np.ndarray) -> np.ndarray:
    """(3, T, C) by the number of detections allowed in an image."""
    shape = len(IOU_THRESHOLDS), len(num_objects)
    rank, curve = rank[matches.detection[matches.right]], matches.curve[matches.right]
    hits = [np.bincount(curve[rank < most], minlength=shape[0] * shape[1]) for most in DETECTIONS_ALLOWED]
    return np.stack(hits).reshape(-1, *shape) / np.maximum(num_objects, 1)


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
    """Cumulative sum (..., M) that begins anew where `group` (M,) changes."""
    total = np.cumsum(values, axis=-1)
    start = np.flatnonzero(np.diff(group, prepend=-1))
    return total - np.repeat((total - values)[..., start], np.diff(start, append=len(group)), axis=-1)


def _mean(num_objects: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(R,) mean of `values` (R, T, C) over the classes that have objects, `num_objects` (R, C); else nan."""
    has_objects = num_objects > 0
    total = np.where(has_objects, values.mean(1), 0.0).sum(1)
    return np.divide(total, has_objects.sum(1), out=np.full(len(total), np.nan), where=has_objects.any(1))
