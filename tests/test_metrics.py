"""Average precision against pycocotools' own file route, images in parts, and cases done by hand."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from lib.coco_eval import NAMES
from lib.metrics import Evaluation, coco_metrics, voc_metrics

CLASSES = 3
BOX, FAR = (10, 10, 50, 50), (100, 100, 140, 140)


def truth(*objects):
    """One image; an object is (x1, y1, x2, y2, label) or, to be ignored, (x1, y1, x2, y2, label, True)."""
    return {
        "boxes": np.array([o[:4] for o in objects], dtype=np.float64).reshape(-1, 4),
        "labels": np.array([o[4] for o in objects], dtype=np.int64),
        "ignore": np.array([len(o) > 5 for o in objects], dtype=bool),
    }


def found(*objects):
    """One image; a detection is (x1, y1, x2, y2, label, score)."""
    return {
        "boxes": np.array([o[:4] for o in objects], dtype=np.float64).reshape(-1, 4),
        "labels": np.array([o[4] for o in objects], dtype=np.int64),
        "scores": np.array([o[5] for o in objects], dtype=np.float64),
    }


def random_set(seed, images=6, classes=CLASSES):
    """Ground truth, and detections: jittered copies of it, doubles, wrong classes and clutter; empty images too."""
    rng = np.random.default_rng(seed)
    ground_truth, detections = [], []
    for _ in range(images):
        corner, size = rng.uniform(0, 150, (rng.integers(0, 6), 2)), rng.uniform(5, 150, 2)
        boxes = np.concatenate([corner, corner + size], 1).round()
        labels = rng.integers(1, classes + 1, len(boxes))
        ground_truth.append({"boxes": boxes, "labels": labels, "ignore": rng.random(len(boxes)) < 0.25})
        copies = rng.integers(0, len(boxes), rng.integers(0, 10)) if len(boxes) else np.zeros(0, int)
        jittered = boxes[copies] + rng.normal(0, 8, (len(copies), 4))
        jittered[:, 2:] = np.maximum(jittered[:, 2:], jittered[:, :2] + 1)
        clutter = rng.uniform(0, 150, (3, 2))
        detections.append(
            {
                "boxes": np.concatenate([jittered, np.concatenate([clutter, clutter + 40], 1)]),
                "labels": np.concatenate([labels[copies], rng.integers(1, classes + 1, 3)]),
                "scores": rng.permutation(1000)[: len(copies) + 3] / 1000 + rng.random() / 1e4,
            }
        )
    return ground_truth, detections


def coco_from_files(ground_truth, detections, folder):
    """The twelve numbers as a user of pycocotools gets them from JSON files."""
    dataset = {"images": [{"id": i + 1} for i in range(len(ground_truth))], "annotations": [], "info": {}}
    dataset["categories"] = [{"id": c, "name": str(c)} for c in range(1, CLASSES + 1)]
    results = []
    for i, (objects, boxes) in enumerate(zip(ground_truth, detections, strict=True)):
        for (x1, y1, x2, y2), label, ignore in zip(
            objects["boxes"].tolist(), objects["labels"], objects["ignore"], strict=True
        ):
            annotation = {"id": len(dataset["annotations"]) + 1, "image_id": i + 1, "category_id": int(label)}
            geometry = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": int(ignore)}
            dataset["annotations"].append(annotation | geometry)
        for (x1, y1, x2, y2), label, score in zip(
            boxes["boxes"].tolist(), boxes["labels"], boxes["scores"], strict=True
        ):
            result = {"image_id": i + 1, "category_id": int(label), "bbox": [x1, y1, x2 - x1, y2 - y1]}
            results.append(result | {"score": float(score)})
    (folder / "truth.json").write_text(json.dumps(dataset))
    (folder / "results.json").write_text(json.dumps(results))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(folder / "truth.json"))
        evaluation = COCOeval(coco, coco.loadRes(str(folder / "results.json")), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


@pytest.mark.parametrize("reference", [False, True])
def test_coco_equals_pycocotools_from_files(tmp_path, capsys, reference):
    ground_truth, detections = random_set(3, images=20)
    metrics = coco_metrics(ground_truth, detections, CLASSES, reference)
    assert capsys.readouterr().out == ""
    expected = coco_from_files(ground_truth, detections, tmp_path)
    assert (expected > 0).sum() == 12  # all sizes are there, nothing is compared with nothing
    np.testing.assert_allclose([metrics[name] for name in NAMES], expected, rtol=1e-12)
    assert metrics["AP"] == pytest.approx(np.mean(metrics["per_class"]))


def test_coco_per_class_is_the_ap_of_that_class_alone():
    ground_truth, detections = random_set(3, images=20)

    def only(record, label):
        keep = record["labels"] == label
        return {key: value[keep] for key, value in record.items()}

    for label, ap in enumerate(coco_metrics(ground_truth, detections, CLASSES)["per_class"], 1):
        alone = [[only(record, label) for record in records] for records in (ground_truth, detections)]
        assert coco_metrics(*alone, CLASSES)["AP"] == pytest.approx(ap)


def test_coco_takes_the_area_that_is_given():
    """A box of 60 x 60 is medium, its 20-pixel mask is small."""
    record = truth((0, 0, 60, 60, 1))
    detections = [found((0, 0, 60, 60, 1, 0.9))]
    boxed, masked = (coco_metrics([r], detections, 1) for r in (record, record | {"area": np.array([20.0])}))
    assert [boxed["APm"], masked["APs"]] == pytest.approx([1, 1])
    assert math.isnan(boxed["APs"])
    assert math.isnan(masked["APm"])


def test_coco_crowds_are_neither_asked_for_nor_wrong():
    ground_truth = [truth((*BOX, 1), (*FAR, 1, True))]
    metrics = coco_metrics(ground_truth, [found((*FAR, 1, 0.9), (*BOX, 1, 0.8))], 1)
    assert metrics["AP"] == pytest.approx(1)


def test_coco_counts_classes_as_it_should():
    metrics = coco_metrics([truth((*BOX, 1), (*FAR, 2))], [found((*BOX, 1, 0.9), (*FAR, 3, 0.9))], 3)
    assert metrics["per_class"][:2] == pytest.approx([1, 0])
    assert math.isnan(metrics["per_class"][2])
    assert metrics["AP"] == pytest.approx(0.5)


def both(ground_truth, detections):
    coco, voc = (metric(ground_truth, detections, CLASSES) for metric in (coco_metrics, voc_metrics))
    return [coco["AP"], coco["AP50"], coco["AR100"], voc["mAP"], *coco["per_class"], *voc["per_class"]]


def test_nothing_detected_is_zero_and_inherits_nothing():
    """A candidate that detects nothing once took over the AP of the one before it."""
    ground_truth, detections = random_set(3, images=20)
    good = both(ground_truth, detections)
    assert min(good) > 0
    assert both(ground_truth, [found()] * 20) == [0] * len(good)
    assert both(ground_truth, detections) == good


@pytest.mark.parametrize("images", [0, 2])
def test_no_objects_at_all_is_not_a_number(images):
    for detections in ([found()] * images, [found((*BOX, 1, 0.9))] * images):
        assert np.isnan(both([truth()] * images, detections)).all()


def test_voc_and_coco_agree_where_they_mean_the_same():
    """Objects far apart and none ignored; COCO reads the curve at 101 recalls, hence the tolerance."""
    rng = np.random.default_rng(0)
    corner = np.stack(np.meshgrid(np.arange(0, 300, 60), np.arange(0, 300, 60)), -1).reshape(-1, 2)
    ground_truth, detections = [], []
    for _ in range(8):
        boxes, labels = np.concatenate([corner, corner + 40], 1).astype(float), rng.integers(1, CLASSES + 1, 25)
        ground_truth.append({"boxes": boxes, "labels": labels, "ignore": np.zeros(25, bool)})
        guessed = np.where(rng.random(25) < 0.8, labels, rng.integers(1, CLASSES + 1, 25))
        boxes = boxes + rng.normal(0, 5, boxes.shape)
        detections.append({"boxes": boxes, "labels": guessed, "scores": rng.random(25)})
    coco, voc = (metric(ground_truth, detections, CLASSES) for metric in (coco_metrics, voc_metrics))
    assert 0.3 < voc["mAP"] < 0.9
    assert voc["mAP"] == pytest.approx(coco["AP50"], abs=0.01)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), cuts=st.lists(st.integers(0, 8), max_size=3))
def test_images_added_in_parts_are_those_added_at_once(seed, cuts):
    """Looked at after each part, as a race does; labels 3 are no class here."""
    ground_truth, detections = random_set(seed, images=8)
    evaluation, weight = Evaluation(2), np.random.default_rng(seed).integers(0, 3, (5, 8))
    for start, end in itertools.pairwise([0, *sorted(cuts), 8]):
        evaluation.add(ground_truth[start:end], detections[start:end])
        once = Evaluation(2)
        once.add(ground_truth[:end], detections[:end])
        assert evaluation.num_images == end
        np.testing.assert_equal([evaluation.coco(), evaluation.voc()], [once.coco(), once.voc()])
        for objective in ("AP", "AP50", "mAP"):
            drawn = (e.resampled(objective, weight[:, :end]) for e in (evaluation, once))
            np.testing.assert_equal(*drawn)
    np.testing.assert_equal(evaluation.coco(), coco_metrics(ground_truth, detections, 2))


def test_pycocotools_sees_all_parts():
    ground_truth, detections = random_set(3, images=8)
    evaluation = Evaluation(CLASSES)
    for part in (slice(0, 3), slice(3, 8)):
        evaluation.add(ground_truth[part], detections[part])
    at_once = coco_metrics(ground_truth, detections, CLASSES, reference=True)
    np.testing.assert_equal(evaluation.coco(reference=True), at_once)


def test_what_an_evaluation_cannot_know_is_refused():
    with pytest.raises(ValueError, match=r"0\.3, but least_iou is 0\.5"):
        Evaluation(CLASSES).voc(iou=0.3)
    for metric in (Evaluation.coco, lambda e: e.resampled("mAP", np.zeros((2, 0), int))):
        with pytest.raises(ValueError, match=r"0\.5, but least_iou is 0\.75"):
            metric(Evaluation(CLASSES, least_iou=0.75))
    with pytest.raises(ValueError, match="weights of 3 images, but 0 are here"):
        Evaluation(CLASSES).resampled("AP", np.ones((2, 3), int))


def test_tensors_are_accepted():
    ground_truth, detections = random_set(3)
    as_tensors = [[{k: torch.as_tensor(v) for k, v in r.items()} for r in rs] for rs in (ground_truth, detections)]
    np.testing.assert_equal(both(*as_tensors), both(ground_truth, detections))


def test_lists_of_different_length_are_refused():
    for metric in (coco_metrics, voc_metrics):
        with pytest.raises(ValueError, match="2 images of ground truth, but 1"):
            metric([truth(), truth()], [found()], 1)
