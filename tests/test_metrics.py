"""COCO's AP against pycocotools' file route, VOC's against a slow loop after the VOC devkit, and cases done by hand."""

from __future__ import annotations

import contextlib
import io
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from test_coco_eval import random_case

from lib.coco_eval import NAMES
from lib.metrics import Evaluation, detection_metrics, to_pixels
from lib.postprocess import Detections

CLASSES = 3
BOX, FAR = (10, 10, 50, 50), (100, 100, 140, 140)


def coco_metrics(ground_truth, detections, num_classes, reference=False):
    return Evaluation(num_classes, ground_truth, detections).coco(reference)


def voc_metrics(ground_truth, detections, num_classes):
    return Evaluation(num_classes, ground_truth, detections).voc()


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


def test_tensors_are_accepted():
    ground_truth, detections = random_set(3)
    as_tensors = [[{k: torch.as_tensor(v) for k, v in r.items()} for r in rs] for rs in (ground_truth, detections)]
    np.testing.assert_equal(both(*as_tensors), both(ground_truth, detections))


def box_iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    overlap = width * height
    return overlap / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap)


def slow_voc_ap(ground_truth, detections, label, suffix):
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
        if best_iou < 0.5:
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
    if suffix == "_11point":
        return sum(max((p for r, p in points if 10 * r >= k * num_objects), default=0.0) for k in range(11)) / 11
    # Each further object found is a step of 1 / num_objects, as high as the best precision from there on.
    return sum(max((p for r, p in points if r >= k), default=0.0) for k in range(1, num_objects + 1)) / num_objects


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31))
def test_voc_equals_the_devkits_loop(seed):
    ground_truth, detections = random_set(seed)
    metrics = voc_metrics(ground_truth, detections, CLASSES)
    for suffix in ("", "_11point"):
        expected = [slow_voc_ap(ground_truth, detections, c, suffix) for c in range(1, CLASSES + 1)]
        np.testing.assert_allclose(metrics[f"per_class{suffix}"], expected, rtol=1e-12)
        mean = np.nan if np.isnan(expected).all() else np.nanmean(expected)
        np.testing.assert_allclose(metrics[f"mAP{suffix}"], mean)


def voc_ap(truths, detections, suffix=""):
    return voc_metrics([truth(*truths)], [found(*detections)], 1)[f"mAP{suffix}"]


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
    assert voc_ap([(*BOX, 1)], [(10, 10, 50, 30, 1, 0.9)]) == 1
    assert voc_ap([(*BOX, 1)], [(10, 10, 50, 29.9, 1, 0.9)]) == 0


def test_voc_inclusive_pixels_are_the_readers_business():
    """The devkit's IoU of [1, 1, 4, 4] and [1, 1, 4, 8] in 1-based inclusive pixels is 16 / 32."""
    read = [(0, 0, 4, 4), (0, 0, 4, 8)]
    assert voc_ap([(*read[0], 1)], [(*read[1], 1, 0.9)]) == 1


def test_voc_eleven_points_reach_recalls_that_floats_miss():
    """3 of 10 objects found: recall 0.3 counts, so four points (0, 0.1, 0.2, 0.3) have precision 1."""
    objects = [(20 * i, 0, 20 * i + 10, 10, 1) for i in range(10)]
    detections = [(*o, 0.9) for o in objects[:3]]
    assert voc_ap(objects, detections, "_11point") == pytest.approx(4 / 11)


def test_voc_counts_classes_as_it_should():
    """Class 1 found, class 2 missed (0), class 3 without objects (not counted, for all its false alarms)."""
    ground_truth = [truth((*BOX, 1), (*FAR, 2))]
    metrics = voc_metrics(ground_truth, [found((*BOX, 1, 0.9), (*FAR, 3, 0.9))], 3)
    assert metrics["per_class"][:2] == [1, 0]
    assert math.isnan(metrics["per_class"][2])
    assert metrics["mAP"] == 0.5


@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_a_resample_scores_as_the_repeated_images_do(noise, seed):
    """pycocotools on a data set that holds each image as often as its weight says; VOC's by our own tested metric."""
    ground_truth, detections = random_case(seed, images=7, objects=5, detections=6, classes=CLASSES, noise=noise)
    for i, record in enumerate(detections):  # ties between images stay, those within an image go
        record["scores"] = record["scores"] + 1e-4 * np.random.default_rng(i).permutation(len(record["scores"]))
    weights = np.random.default_rng(seed).multinomial(7, [1 / 7] * 7, size=5)
    evaluation = Evaluation(CLASSES, ground_truth, detections)
    scores = {name: evaluation.resampled(name, weights) for name in ("AP", "AP50", "mAP")}
    for r, weight in enumerate(weights):
        chosen = np.repeat(np.arange(7), weight)
        repeated = Evaluation(CLASSES, [ground_truth[i] for i in chosen], [detections[i] for i in chosen])
        expected = {**repeated.coco(reference=True), **repeated.voc()}
        for name, values in scores.items():
            np.testing.assert_allclose(values[r], expected[name], atol=1e-9, err_msg=name)


def test_many_resamples_are_done_in_turns(monkeypatch):
    evaluation = Evaluation(CLASSES, *random_case(0, images=7, objects=5, detections=6, classes=CLASSES))
    weights = np.random.default_rng(0).multinomial(7, [1 / 7] * 7, size=12)
    expected = evaluation.resampled("AP", weights)
    monkeypatch.setattr("lib.coco_eval.POINTS_AT_ONCE", 1_000)
    np.testing.assert_array_equal(evaluation.resampled("AP", weights), expected)


def test_a_resample_without_objects_has_no_score():
    ground_truth, detections = [truth((*BOX, 1)), truth()], [found((*BOX, 1, 0.9)), found()]
    evaluation = Evaluation(CLASSES, ground_truth, detections)
    for objective in ("AP", "AP50", "mAP"):
        scores = evaluation.resampled(objective, np.array([[1, 1], [0, 2]]))
        assert scores[0] == pytest.approx(1) and np.isnan(scores[1])


def test_a_model_that_detects_nothing_scores_zero_after_one_that_is_right():
    objects = [{"boxes": torch.tensor([[1.0, 1, 9, 9]]), "labels": torch.tensor([1]), "ignore": torch.tensor([False])}]
    right = Detections(torch.tensor([[0.1, 0.1, 0.9, 0.9]]), torch.tensor([0.9]), torch.tensor([1]))
    nothing = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert detection_metrics([right], objects, [(10, 10)], ["cat"])["AP"] == pytest.approx(1)
    assert detection_metrics([nothing], objects, [(10, 10)], ["cat"])["AP"] == 0


def test_to_pixels_scales_width_and_height():
    detections = Detections(torch.tensor([[0.1, 0.2, 0.5, 1.0]]), torch.tensor([0.9]), torch.tensor([1]))
    torch.testing.assert_close(to_pixels(detections, 200, 50)["boxes"], torch.tensor([[20.0, 10, 100, 50]]))
