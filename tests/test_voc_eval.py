"""VOC's average precision against a slow loop after the VOC devkit, and cases done by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_metrics import BOX, CLASSES, FAR, found, random_set, truth

from lib.metrics import voc_metrics

SUFFIX = {"all": "", "11point": "_11point"}


def box_iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    overlap = width * height
    return overlap / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap)


def slow_voc_ap(ground_truth, detections, label, threshold, method):
    """VOCevaldet.m, line by line."""
    rows = []
    for image, record in enumerate(detections):
        for box, score, own in zip(record["boxes"], record["scores"], record["labels"], strict=True):
            if own == label:
                rows.append((-score, image, box))
    rows.sort(key=lambda row: row[0])
    num_objects = sum(
        own == label and not ignore
        for record in ground_truth
        for own, ignore in zip(record["labels"], record["ignore"], strict=True)
    )
    taken, tp, fp = set(), [], []
    for _, image, box in rows:
        record, best, best_iou = ground_truth[image], None, -math.inf
        for j, (object_box, own) in enumerate(zip(record["boxes"], record["labels"], strict=True)):
            if own == label and (overlap := box_iou(box, object_box)) > best_iou:
                best, best_iou = j, overlap
        right = wrong = 0
        if best_iou < threshold:
            wrong = 1
        elif not record["ignore"][best]:
            right = (image, best) not in taken
            wrong = 1 - right
            taken.add((image, best))
        tp.append(right)
        fp.append(wrong)
    if num_objects == 0:
        return math.nan
    points, right, wrong = [], 0, 0
    for t, f in zip(tp, fp, strict=True):
        right, wrong = right + t, wrong + f
        if right + wrong:
            points.append((right, right / (right + wrong)))
    if method == "11point":
        return sum(max((p for r, p in points if 10 * r >= k * num_objects), default=0.0) for k in range(11)) / 11
    # Each further object found is a step of 1 / num_objects, as high as the best precision from there on.
    return sum(max((p for r, p in points if r >= k), default=0.0) for k in range(1, num_objects + 1)) / num_objects


@settings(max_examples=40)
@given(seed=st.integers(0, 2**31), threshold=st.sampled_from([0.3, 0.5, 0.75]))
@pytest.mark.parametrize("method", SUFFIX)
def test_voc_equals_the_devkits_loop(method, seed, threshold):
    ground_truth, detections = random_set(seed)
    metrics, suffix = voc_metrics(ground_truth, detections, CLASSES, threshold), SUFFIX[method]
    expected = [slow_voc_ap(ground_truth, detections, c, threshold, method) for c in range(1, CLASSES + 1)]
    np.testing.assert_allclose(metrics[f"per_class{suffix}"], expected, rtol=1e-12)
    mean = np.nan if np.isnan(expected).all() else np.nanmean(expected)
    np.testing.assert_allclose(metrics[f"mAP{suffix}"], mean)


def voc_ap(truths, detections, method="all", **options):
    return voc_metrics([truth(*truths)], [found(*detections)], 1, **options)[f"mAP{SUFFIX[method]}"]


def test_voc_second_detection_of_an_object_is_wrong():
    once, twice = (*BOX, 1, 0.9), (*BOX, 1, 0.8)
    other = (*FAR, 1, 0.7)
    assert voc_ap([(*BOX, 1), (*FAR, 1)], [once, other]) == 1
    assert voc_ap([(*BOX, 1), (*FAR, 1)], [once, twice, other]) == pytest.approx((1 + 2 / 3) / 2)


def test_voc_detection_belongs_to_its_best_object_only():
    """The second detection overlaps both objects, the taken one more: it is wrong, and the other stays unfound."""
    near = (10, 10, 50, 46)
    assert voc_ap([(*BOX, 1), (*near, 1)], [(*BOX, 1, 0.9), (10, 10, 50, 49, 1, 0.8)]) == 0.5


def test_voc_ignored_objects_are_neither_asked_for_nor_wrong():
    ignored = [(*BOX, 1), (*FAR, 1, True)]
    assert voc_ap(ignored, [(*BOX, 1, 0.5)]) == 1
    assert voc_ap(ignored, [(*FAR, 1, 0.9), (*FAR, 1, 0.8), (*BOX, 1, 0.5)]) == 1
    assert math.isnan(voc_ap([(*FAR, 1, True)], [(*FAR, 1, 0.9)]))


def test_voc_threshold_is_reached_at_equality():
    half = (10, 10, 50, 30)
    assert voc_ap([(*BOX, 1)], [(*half, 1, 0.9)], iou=0.5) == 1
    assert voc_ap([(*BOX, 1)], [(*half, 1, 0.9)], iou=0.51) == 0


def test_voc_inclusive_pixels_are_the_readers_business():
    """The devkit's IoU of [1, 1, 4, 4] and [1, 1, 4, 8] in 1-based inclusive pixels is 16 / 32."""
    read = [(0, 0, 4, 4), (0, 0, 4, 8)]
    assert voc_ap([(*read[0], 1)], [(*read[1], 1, 0.9)], iou=0.5) == 1


def test_voc_eleven_points_reach_recalls_that_floats_miss():
    """3 of 10 objects found: recall 0.3 counts, so four points (0, 0.1, 0.2, 0.3) have precision 1."""
    objects = [(20 * i, 0, 20 * i + 10, 10, 1) for i in range(10)]
    detections = [(*o, 0.9) for o in objects[:3]]
    assert voc_ap(objects, detections, method="11point") == pytest.approx(4 / 11)


def test_voc_counts_classes_as_it_should():
    """Class 1 found, class 2 missed (0), class 3 without objects (not counted, for all its false alarms)."""
    ground_truth = [truth((*BOX, 1), (*FAR, 2))]
    metrics = voc_metrics(ground_truth, [found((*BOX, 1, 0.9), (*FAR, 3, 0.9))], 3)
    assert metrics["per_class"][:2] == [1, 0]
    assert math.isnan(metrics["per_class"][2])
    assert metrics["mAP"] == 0.5
