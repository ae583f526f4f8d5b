"""COCO's evaluation against pycocotools, on cases full of ties: boxes on a coarse grid, few scores, crowds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou

from lib.coco_eval import (
    NAMES,
    GroundTruth,
    ScoredBoxes,
    coco_numbers,
    overlapping_pairs,
    rank_detections,
    resampled_ap,
)
from lib.metrics import Evaluation

CLASSES = 3
LABELS = st.integers(1, CLASSES)
SCORES = st.sampled_from([0.1, 0.5, 0.9])


@st.composite
def boxes(draw):
    """On a grid of 8 or 32 pixels: IoUs equal thresholds, and areas equal the ends of the ranges, 32^2 and 96^2."""
    unit = draw(st.sampled_from([8, 32]))
    x, y, width, height = (draw(st.integers(low, high)) for low, high in ((0, 2), (0, 2), (1, 5), (1, 5)))
    return [unit * x, unit * y, unit * (x + width), unit * (y + height)]


OBJECTS = st.lists(st.tuples(boxes(), LABELS, st.booleans(), st.sampled_from([1.0, 0.5])), max_size=6)
FOUND = st.lists(st.tuples(boxes(), LABELS, SCORES), max_size=12)


def truth_record(objects, with_area=False):
    record = {
        "boxes": np.array([o[0] for o in objects], dtype=float).reshape(-1, 4),
        "labels": np.array([o[1] for o in objects], dtype=int),
        "ignore": np.array([o[2] for o in objects], dtype=bool),
    }
    if with_area:  # a mask fills some of its box
        sides = record["boxes"][:, 2:] - record["boxes"][:, :2]
        record["area"] = sides.prod(1) * np.array([o[3] for o in objects], dtype=float)
    return record


def found_record(found):
    return {
        "boxes": np.array([d[0] for d in found], dtype=float).reshape(-1, 4),
        "labels": np.array([d[1] for d in found], dtype=int),
        "scores": np.array([d[2] for d in found], dtype=float),
    }


def random_case(seed, images, objects, detections, classes, noise=0.0):
    """As many objects and detections as a list of hypothesis seldom has; detections repeat objects, or are random."""
    rng = np.random.default_rng(seed)

    def grid(count):
        corner, size = rng.integers(0, 6, (count, 2)), rng.integers(1, 6, (count, 2))
        return 16.0 * np.concatenate([corner, corner + size], 1)

    truth, found = [], []
    for _ in range(images):
        n, k = rng.integers(0, objects + 1), rng.integers(0, detections + 1)
        labels = rng.integers(1, classes + 1, n)
        truth.append({"boxes": grid(n), "labels": labels, "ignore": rng.random(n) < 0.15})
        choice = rng.integers(0, n, k) if n else np.zeros(0, int)
        near = truth[-1]["boxes"][choice] + 16 * rng.integers(0, 2, (len(choice), 4)) * [0, 0, 1, 1]
        near += rng.uniform(-noise, noise, near.shape)
        record = {"boxes": np.concatenate([near, grid(k)]), "scores": rng.integers(0, 8, len(choice) + k) / 8}
        found.append(record | {"labels": np.concatenate([labels[choice], rng.integers(1, classes + 1, k)])})
    return truth, found


def assert_same_numbers(truth, found, classes=CLASSES):
    evaluation = Evaluation(classes, truth, found)
    own, reference = evaluation.coco(), evaluation.coco(reference=True)
    assert own.keys() == reference.keys() == {*NAMES, "per_class"}
    for name, value in reference.items():
        np.testing.assert_allclose(own[name], value, rtol=0, atol=1e-9, err_msg=name)
    return own


@settings(max_examples=50)
@given(images=st.lists(st.tuples(OBJECTS, FOUND), min_size=1, max_size=4), with_area=st.booleans())
def test_equals_pycocotools_where_much_is_tied(images, with_area):
    truth = [truth_record(objects, with_area) for objects, _ in images]
    assert_same_numbers(truth, [found_record(found) for _, found in images])


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31), classes=st.integers(1, CLASSES), noise=st.sampled_from([0, 4]))
def test_equals_pycocotools_where_objects_are_dense(seed, classes, noise):
    case = random_case(seed, images=4, objects=15, detections=20, classes=classes, noise=noise)
    assert_same_numbers(*case, classes)


@pytest.mark.parametrize("seed", range(2))
def test_equals_pycocotools_beyond_100_detections_of_a_class(seed):
    truth, found = random_case(seed, images=6, objects=30, detections=150, classes=1)
    assert max(len(record["labels"]) for record in found) > 150
    own = assert_same_numbers(truth, found, 1)
    assert 0 < own["AR1"] < own["AR10"] < own["AR100"] < 1


def test_labels_that_are_no_class_count_nowhere():
    truth, found = random_case(0, images=4, objects=8, detections=10, classes=CLASSES)
    kept = [{key: value[r["labels"] < 3] for key, value in r.items()} for r in found]
    own = assert_same_numbers(truth, found, 2)
    assert own["AP"] == Evaluation(2, truth, kept).coco()["AP"] > 0


def flat(boxes_xyxy):
    boxes = np.array(boxes_xyxy, dtype=float).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)


def test_the_later_choice_gives_way_and_may_free_a_third():
    """Best scores choose first: 1 takes A from 2, which takes B from 3, which is left with nothing at 0.5."""
    a, b = (0, 0, 100, 100), (0, 20, 100, 120)
    first, second, third = (0, 1, 100, 100), (0, 8, 100, 108), (0, 20, 100, 121)
    objects = GroundTruth(np.zeros(2, int), np.zeros(2, int), flat([a, b]), np.full(2, 1e4), np.zeros(2, bool))
    found = ScoredBoxes(np.zeros(3, int), np.zeros(3, int), flat([third, second, first]), np.array([0.7, 0.8, 0.9]))
    numbers, per_class = coco_numbers(rank_detections(objects, found, overlapping_pairs(objects, found, 0.5)), 1)
    assert numbers["AP50"] == pytest.approx(1) and numbers["AR1"] == pytest.approx(0.5)
    assert per_class.tolist() == [numbers["AP"]]
    assert np.isnan(numbers["APs"])


def test_overlapping_pairs_are_of_one_image_and_class_and_crowds_count_the_detection_only():
    box, half, inner = (0, 0, 40, 40), (0, 0, 40, 20), (0, 0, 10, 10)
    objects = GroundTruth(
        image=np.array([0, 0, 1, 1]),
        label=np.array([0, 1, 0, 1]),
        box_xywh=flat([box, box, box, box]),
        area=np.full(4, 1600.0),
        crowd=np.array([False, False, False, True]),
    )
    found = ScoredBoxes(np.array([0, 1, 1, 2]), np.array([0, 0, 1, 0]), flat([half, inner, inner, box]), np.ones(4))
    pairs = overlapping_pairs(objects, found, 0.05)
    assert [list(column) for column in pairs] == [[0, 1, 2], [0, 2, 3], [0.5, 0.0625, 1.0]]
    assert list(overlapping_pairs(objects, found, 0.5).detection) == [0, 2]


def test_pairs_and_their_iou_are_those_of_a_loop_over_torchvisions_iou():
    rng = np.random.default_rng(0)

    def random_rows(count):
        corner = rng.uniform(0, 60, (count, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(1, 60, (count, 2))], 1)
        return np.sort(rng.integers(0, 4, count)), rng.integers(0, 3, count), boxes

    (image, label, truth), (at, kind, boxes) = random_rows(30), random_rows(90)
    objects = GroundTruth(image, label, flat(truth), np.ones(30), np.zeros(30, bool))
    iou = box_iou(torch.from_numpy(boxes), torch.from_numpy(truth)).numpy()
    expected = [
        (d, o) for d in range(90) for o in range(30) if at[d] == image[o] and kind[d] == label[o] and iou[d, o] >= 0.2
    ]
    pairs = overlapping_pairs(objects, ScoredBoxes(at, kind, flat(boxes), np.ones(90)), 0.2)
    assert list(zip(pairs.detection, pairs.object, strict=True)) == expected and len(expected) > 20
    np.testing.assert_allclose(pairs.iou, [iou[pair] for pair in expected], rtol=1e-12)


def test_the_worked_example_of_average_precision():
    """One image with two objects, both found, one without any, where the second-best detection is."""
    first, second = (0, 0, 40, 40), (100, 100, 140, 140)
    objects = GroundTruth(
        np.zeros(2, int), np.zeros(2, int), flat([first, second]), np.full(2, 1600.0), np.zeros(2, bool)
    )
    scores = np.array([0.9, 0.7, 0.8])
    found = ScoredBoxes(np.array([0, 0, 1]), np.zeros(3, int), flat([first, second, first]), scores)
    ranked = rank_detections(objects, found, overlapping_pairs(objects, found, 0.5))
    ap = resampled_ap(ranked, 1, np.array([[1, 1], [2, 0]]))
    np.testing.assert_allclose(ap, [(51 + 50 * 2 / 3) / 101, 1])
