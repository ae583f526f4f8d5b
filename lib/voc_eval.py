"""VOC's evaluation of boxes on arrays, as VOCevaldet.m of the VOC devkit finds it.

A detection belongs to the object of its class that it overlaps most, from a threshold on; the first by score is right,
a second one of the same object is wrong, and one of an ignored object is neither. The devkit counts pixels,
x2 - x1 + 1; a VOC box read as continuous [xmin - 1, ymin - 1, xmax, ymax] has that very size, so nothing is added.
"""

from __future__ import annotations

import numpy as np

from lib.overlaps import Found, Objects, Pairs, iou

IOU_THRESHOLD = 0.5

Curve = tuple[np.ndarray, np.ndarray, np.ndarray]


def evaluate(
    objects: Objects, found: Found, pairs: Pairs, num_classes: int, threshold: float = IOU_THRESHOLD
) -> tuple[np.ndarray, np.ndarray]:
    """AP (C,) of each class over all points, as from VOC 2010 on, and over VOC 2007's 11; nan where no object is."""
    once = np.ones((1, max(objects.image.max(initial=0), found.image.max(initial=0)) + 1), int)
    curves = _curves(objects, found, _claims(objects, found, pairs, threshold), once, num_classes)
    all_points, eleven = (np.array([ap(*c)[0] for c in curves]) for ap in (_all_point, _eleven_point))
    return all_points, eleven


def resampled_map(objects: Objects, found: Found, pairs: Pairs, num_classes: int, weight: np.ndarray) -> np.ndarray:
    """mAP (R,) over all points, as `coco_eval.resampled_ap` finds AP; nan without objects."""
    curves = _curves(objects, found, _claims(objects, found, pairs, IOU_THRESHOLD), weight, num_classes)
    per_class = np.stack([_all_point(*curve) for curve in curves])
    counted = ~np.isnan(per_class)
    total = np.where(counted, per_class, 0).sum(0)
    return np.divide(total, counted.sum(0), out=np.full(len(total), np.nan), where=counted.any(0))


def _claims(objects: Objects, found: Found, pairs: Pairs, threshold: float) -> np.ndarray:
    """(K,) the object that each detection belongs to; -1: none."""
    same_measure = objects._replace(crowd=np.zeros(len(objects.crowd), bool))  # VOC's IoU knows no crowds
    overlap = iou(same_measure, found, pairs.detection, pairs.object)
    best_last = np.lexsort((-pairs.object, overlap))  # at equal IoU the earlier object wins
    best_last = best_last[overlap[best_last] >= threshold]
    claims = np.full(len(found.label), -1)
    claims[pairs.detection[best_last]] = pairs.object[best_last]  # the last one written stays
    return claims


def _curves(objects: Objects, found: Found, claims: np.ndarray, weight: np.ndarray, num_classes: int) -> list[Curve]:
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
