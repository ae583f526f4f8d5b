"""The objects and the detections of all images as arrays, and which of them overlap how much."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import numpy as np


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


Rows = TypeVar("Rows", Objects, Found, Pairs)


def take(rows: Rows, chosen: np.ndarray) -> Rows:
    return type(rows)(*(column[chosen] for column in rows))


def joined(first: Rows, second: Rows) -> Rows:
    return type(first)(*(np.concatenate(columns) for columns in zip(first, second, strict=True)))


def overlapping(objects: Objects, found: Found, least_iou: float) -> Pairs:
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


def iou(objects: Objects, found: Found, detection: np.ndarray, other: np.ndarray) -> np.ndarray:
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
