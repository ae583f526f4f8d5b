"""Errors and thresholds against slow loops after their definitions, and the page that shows them."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import xml.etree.ElementTree as ET
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from test_metrics import CLASSES, FAR, found, random_set, truth
from tiny_data import read_voc, write_voc
from torchvision.ops import box_iou

from lib.analysis import COUNTED, best_f1, find_errors, score_curves, write_analysis
from lib.final_training import measure
from lib.metrics import Evaluation
from lib.postprocess import Detections


def judge(objects, detections, threshold):
    """The kind of each detection of one image, best first, which object it is about, and the objects found."""
    iou = box_iou(torch.tensor(detections["boxes"]), torch.tensor(objects["boxes"])).numpy()
    judged, taken = [], set()
    for d in np.argsort(-detections["scores"]):
        if detections["scores"][d] < threshold:
            continue
        label, wanted = detections["labels"][d], ~objects["ignore"]
        own = np.where(objects["labels"] == label, iou[d], 0)
        best = int(own.argmax()) if len(own) else None
        if best is not None and own[best] >= 0.5 and objects["ignore"][best]:
            continue
        if best is not None and own[best] >= 0.5 and best not in taken:
            taken.add(best)
            judged.append((label, "right", best))
            continue
        own = np.where(wanted, own, 0)
        other = np.where((objects["labels"] != label) & wanted, iou[d], 0)
        if 0.1 <= own.max(initial=0) < 0.5:
            judged.append((label, "localisation", int(own.argmax())))
        elif other.max(initial=0) >= 0.5:
            judged.append((label, "class", int(other.argmax())))
        else:
            judged.append((label, "duplicate" if own.max(initial=0) >= 0.5 else "background", None))
    return judged, taken


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_errors_are_those_of_a_slow_loop(seed, threshold):
    ground_truth, detections = random_set(seed, images=12)
    errors = find_errors(Evaluation(CLASSES, ground_truth, detections), threshold)
    counts, confusion, per_image = Counter(), Counter(), []
    for objects, boxes in zip(ground_truth, detections, strict=True):
        judged, taken = judge(objects, boxes, threshold)
        covered, confused = {place for _, _, place in judged}, {}
        for label, kind, place in judged:
            counts[label - 1, kind] += 1
            if kind == "right":
                confusion[label - 1, label - 1] += 1
            elif kind == "class" and place not in taken and place not in confused:
                confused[place] = label
                confusion[objects["labels"][place] - 1, label - 1] += 1
            else:
                confusion[CLASSES, label - 1] += 1
        missed = 0
        for k, label in enumerate(objects["labels"]):
            if not objects["ignore"][k]:
                counts[label - 1, "objects"] += 1
                counts[label - 1, "missed"] += k not in covered
                missed += k not in covered
                confusion[label - 1, CLASSES] += k not in taken and k not in confused
        per_image.append(missed + sum(kind != "right" for _, kind, _ in judged))
    expected = [[counts[label, kind] for kind in COUNTED] for label in range(CLASSES)]
    assert errors.counts.tolist() == expected and errors.per_image.tolist() == per_image
    size = range(CLASSES + 1)
    assert errors.confusion.tolist() == [[confusion[row, column] for column in size] for row in size]


def test_every_kind_of_error_by_hand():
    ground_truth = [truth((0, 0, 40, 40, 1), (*FAR, 2), (200, 0, 240, 40, 1), (300, 0, 340, 40, 3))]
    right, again = (0, 0, 40, 40, 1, 0.9), (0, 0, 40, 38, 1, 0.8)
    as_another, beside, nothing = (*FAR, 3, 0.7), (220, 0, 260, 40, 1, 0.6), (400, 0, 440, 40, 2, 0.5)
    errors = find_errors(Evaluation(3, ground_truth, [found(right, again, as_another, beside, nothing)]), 0.5)
    total = dict(zip(COUNTED, errors.counts.sum(0).tolist(), strict=True))
    assert total == dict.fromkeys(COUNTED, 1) | {"objects": 4}
    assert errors.confusion.tolist() == [[1, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, 1], [2, 1, 0, 0]]


@pytest.mark.parametrize("seed", range(3))
def test_the_threshold_with_the_best_f1_is_that_of_a_slow_loop(seed):
    """Every threshold is tried, by cutting the detections and counting again."""
    ground_truth, detections = random_set(seed)
    for boxes in detections:  # ties, too
        boxes["scores"] = boxes["scores"].round(1)
    curves = score_curves(Evaluation(CLASSES, ground_truth, detections))
    for curve, label in zip(curves, (None, 1, 2, 3), strict=True):
        f1 = {}
        for threshold in np.unique(np.concatenate([boxes["scores"] for boxes in detections])):
            right = seen = total = 0
            for objects, boxes in zip(ground_truth, detections, strict=True):
                judged = [kind for own, kind, _ in judge(objects, boxes, threshold)[0] if label in (None, own)]
                right, seen = right + judged.count("right"), seen + len(judged)
                wanted = objects["labels"][~objects["ignore"]]
                total += len(wanted) if label is None else (wanted == label).sum()
            f1[threshold] = 2 * right / max(seen + total, 1)
        best = best_f1(curve)
        if not any(f1.values()):
            assert math.isnan(best["F1"])
            continue
        assert best["F1"] == pytest.approx(max(f1.values()))
        # Between the lowest score of the best cut and the next one.
        cut = min(score for score in f1 if score >= best["threshold"])
        assert f1[cut] == pytest.approx(best["F1"]) and all(abs(s - best["threshold"]) > 0.01 for s in f1 if s < cut)


def test_without_a_right_detection_there_is_no_threshold():
    for objects, boxes in ((truth(), found()), (truth((*FAR, 1)), found()), (truth(), found((*FAR, 1, 0.9)))):
        evaluation = Evaluation(1, [objects], [boxes])
        assert all(math.isnan(value) for curve in score_curves(evaluation) for value in best_f1(curve).values())
        assert find_errors(evaluation, 0.4).confusion.sum() == len(objects["labels"]) + len(boxes["labels"])


class Parsed(HTMLParser):
    """The tags of a page, each with its attributes."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_the_page_is_self_contained_and_says_what_the_json_says(tmp_path):
    objects = [("cat", 5, 5, 20, 20), ("dog", 25, 5, 40, 25)]
    write_voc(tmp_path / "data", {"a&b": objects, "c": objects, "d": objects[:1]})
    test = read_voc(tmp_path / "data", ["trainval"])
    cat = torch.tensor([[5, 5, 20, 20.0]]) / torch.tensor([48, 32, 48, 32])
    detections = [Detections(cat, torch.tensor([score]), torch.tensor([1])) for score in (0.9, 0.7, 0.8)]
    metrics = measure(detections, test)
    assert metrics["F1"] == pytest.approx(2 * 3 / (3 + 5)) and metrics["threshold"] == pytest.approx(0.7)
    assert metrics["per_class"]["cat"]["F1"] == 1 and math.isnan(metrics["per_class"]["dog"]["threshold"])
    write_analysis(detections, test, metrics, tmp_path / "best.pt")
    content = json.loads((tmp_path / "analysis.json").read_text())
    assert content["errors"]["dog"] == dict.fromkeys(COUNTED, 0) | {"objects": 2, "missed": 2}
    assert content["confusion"] == {
        "classes": ["cat", "dog", "background"],
        "true_by_found": [[3, 0, 0], [0, 0, 2], [0, 0, 0]],
    }
    assert content["worst"] == [{"image": "a&b", "errors": 1}, {"image": "c", "errors": 1}]
    assert content["curves"]["cat"]["score"] == pytest.approx([0.9, 0.8, 0.7])
    assert content["curves"]["cat"]["recall"] == pytest.approx([1 / 3, 2 / 3, 1])
    page = (tmp_path / "analysis.html").read_text()
    tags = Parsed(page).tags
    pictures = [attributes for tag, attributes in tags if tag == "img"]
    assert [attributes["alt"] for attributes in pictures[:2]] == ["objects of a&b", "detections of a&b"]
    assert len(pictures) == 4
    for attributes in pictures:
        kind, _, data = attributes["src"].partition(",")
        width, height = Image.open(io.BytesIO(base64.b64decode(data))).size
        assert kind == "data:image/jpeg;base64" and (width, height) == (480, 320)
    assert pictures[0]["src"] != pictures[1]["src"]  # a dog is missing
    # Nothing is loaded from elsewhere, and each figure says in words what it shows.
    assert not any({"src", "href"} & attributes.keys() for tag, attributes in tags if tag in ("link", "script"))
    figures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(figures) == 2 and all(ET.fromstring(figure).attrib["aria-label"] for figure in figures)
    assert "<h3>a&amp;b: its objects, and what is found</h3>" in page
