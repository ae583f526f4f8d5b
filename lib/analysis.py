"""Where to cut, and where it fails: the score threshold with the best F1, and analysis.html of a detector's errors.

A detection belongs to the object of its class with the highest IoU, if that is at least 0.5; the best one of an object
is right. Any other has one kind of error, the first that applies, as in TIDE (Bolya et al., ECCV 2020):
    localisation  its best IoU with an object of its class is from 0.1 to below 0.5
    class         its IoU with an object of another class is at least 0.5
    duplicate     it belongs to an object that a better one has found
    background    anything else
An object is missed if nothing finds it, not even with an error of class or localisation.
"""

import base64
import io
import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torchvision.transforms.functional import resize

from lib import checkpoint
from lib.annotations import Annotations
from lib.coco_eval import overlapping_pairs, take
from lib.images import read_picture, write_picture
from lib.inference import DEFAULT_THRESHOLD, draw
from lib.log import finite
from lib.metrics import VOC_IOU, Evaluation, to_pixels
from lib.postprocess import Detections
from lib.report import Html, element, page, svg, table

COUNTED = ("objects", "right", "class", "localisation", "duplicate", "background", "missed")
OBJECTS, RIGHT, CLASS, LOCALISATION, DUPLICATE, BACKGROUND, MISSED = range(len(COUNTED))
TOUCHED_IOU = 0.1
CURVE_POINTS = 200  # of a curve, as it is written and drawn
WORST_PICTURES, PICTURE_SIDE = 12, 480  # pixels
MOST_NAMES = 20  # in a figure
ALL = "all classes"


class ScoreCurve(NamedTuple):
    """Precision, recall and F1 (Q,) of the detections of at least each score (Q,), which falls."""

    score: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    F1: np.ndarray


def score_curves(evaluation: Evaluation) -> list[ScoreCurve]:
    """The curve over all detections, then that of each class; recall and F1 are nan where there are no objects."""
    objects, found, (_, is_right, order) = evaluation.objects, evaluation.found, evaluation.outcomes
    wanted = objects.label[~objects.crowd]
    curves = []
    for label in (None, *range(evaluation.num_classes)):
        chosen = order if label is None else order[found.label[order] == label]
        total = len(wanted) if label is None else (wanted == label).sum()
        # A threshold cannot part equal scores.
        last = np.flatnonzero(np.diff(found.score[chosen], append=-np.inf))
        right, seen = np.cumsum(is_right[chosen])[last], last + 1
        total = total or math.nan
        curves.append(ScoreCurve(found.score[chosen][last], right / seen, right / total, 2 * right / (seen + total)))
    return curves


def best_f1(curve: ScoreCurve) -> dict[str, float]:
    """The highest F1 and its score threshold; nan where nothing is right."""
    if not (curve.F1 > 0).any():
        return {"F1": math.nan, "threshold": math.nan}
    place = int(curve.F1.argmax())
    # Halfway to the next score: a runtime that rounds otherwise does not lose the last detection.
    return {"F1": float(curve.F1[place]), "threshold": float(curve.score[place : place + 2].mean())}


class Errors(NamedTuple):
    """What a detector does at one score threshold, with C classes."""

    counts: np.ndarray  # (C, 7) of `COUNTED`, by the class of the object or of the detection
    confusion: np.ndarray  # (C + 1, C + 1) by true class, then by that of the detection; the last one is the background
    per_image: np.ndarray  # (images,) errors


def find_errors(evaluation: Evaluation, threshold: float) -> Errors:
    """The errors of the detections of at least `threshold`.

    In the confusion matrix an object stands once: with the detection that finds it, else with the best class error on
    it, else as background. A detection stands once, too: if it has no object of its own, as found in the background.
    """
    objects, classes, (owner, right, order) = evaluation.objects, evaluation.num_classes, evaluation.outcomes
    kept = order[evaluation.found.score[order] >= threshold]  # best first
    found, owner, right = take(evaluation.found, kept), owner[kept], right[kept]
    # Of each detection the nearest object of the same class, 0, and of another one, 1.
    alike = (rows._replace(label=np.zeros_like(rows.label)) for rows in (objects, found))
    pairs = overlapping_pairs(*alike, TOUCHED_IOU)
    pairs = take(pairs, ~objects.crowd[pairs.object])
    pairs = take(pairs, np.argsort(pairs.iou, kind="stable"))
    place = (objects.label[pairs.object] != found.label[pairs.detection]).astype(int), pairs.detection
    near, iou = np.full((2, len(kept)), -1), np.zeros((2, len(kept)))
    near[place], iou[place] = pairs.object, pairs.iou  # the last one written stays
    located = (iou[0] >= TOUCHED_IOU) & (iou[0] < VOC_IOU)
    cases = [right, located, iou[1] >= VOC_IOU, iou[0] >= VOC_IOU]
    kind = np.select(cases, [RIGHT, LOCALISATION, CLASS, DUPLICATE], BACKGROUND)
    # The confusion matrix: of the detections of one object the right one comes first, then the best.
    target = np.where(right, owner, np.where(kind == CLASS, near[1], -1))
    by_rank = np.argsort(~right, kind="stable")
    first = by_rank[np.unique(target[by_rank], return_index=True)[1]]
    first = first[target[first] >= 0]
    truth = np.full(len(kept), classes)
    truth[first] = objects.label[target[first]]
    confusion = np.zeros((classes + 1, classes + 1), int)
    np.add.at(confusion, (truth, found.label), 1)
    counts = np.zeros((classes, len(COUNTED)), int)
    np.add.at(counts, (found.label, kind), 1)
    counts[:, OBJECTS] = np.bincount(objects.label[~objects.crowd], minlength=classes)
    confusion[:-1, -1] = counts[:, OBJECTS] - confusion[:-1].sum(1)
    # Missed is what no detection is near to.
    missed = ~objects.crowd
    missed[owner[right]] = missed[near[0, kind == LOCALISATION]] = missed[near[1, kind == CLASS]] = False
    counts[:, MISSED] = np.bincount(objects.label[missed], minlength=classes)
    wrong = np.concatenate([found.image[kind != RIGHT], objects.image[missed]])
    return Errors(counts, confusion, np.bincount(wrong, minlength=evaluation.num_images))


def write_analysis(found: Sequence[Detections], test: Annotations, metrics: dict, detector: Path) -> None:
    """analysis.json and analysis.html beside `detector`, of what it finds in all test images, with their metrics."""
    in_pixels = [to_pixels(detections, *size) for detections, size in zip(found, test.sizes.tolist(), strict=True)]
    evaluation = Evaluation(len(test.classes), test.ground_truth(range(len(test))), in_pixels)
    cut = DEFAULT_THRESHOLD if math.isnan(metrics["threshold"]) else metrics["threshold"]
    errors = find_errors(evaluation, cut)
    worst = [i for i in np.argsort(-errors.per_image, kind="stable")[:WORST_PICTURES].tolist() if errors.per_image[i]]
    counts, curves = {}, {}
    rows = (errors.counts.sum(0), *errors.counts)
    for name, row, curve in zip((ALL, *test.classes), rows, score_curves(evaluation), strict=True):
        counts[name] = dict(zip(COUNTED, row.tolist(), strict=True))
        # Dense where the scores are high, since most detections have low ones.
        points = np.unique(np.geomspace(1, len(curve.score) + 1, CURVE_POINTS).astype(int))[:-1] - 1
        curves[name] = {key: column[points].tolist() for key, column in curve._asdict().items()}
    content = {"format": "analysis/1", "detector": str(detector), "images": len(test), "data": test.fingerprint()}
    content |= {"threshold": cut, "metrics": metrics, "errors": counts, "curves": curves}
    content["confusion"] = {"classes": [*test.classes, "background"], "true_by_found": errors.confusion.tolist()}
    content["worst"] = [{"image": test.image_id(i), "errors": int(errors.per_image[i])} for i in worst]
    checkpoint.write_text(detector.with_name("analysis.json"), json.dumps(finite(content), indent=1) + "\n")
    sections = _figures_and_tables(content)
    sections[f"The {len(worst)} pictures with the most errors"] = [_picture(test, i, found[i], cut) for i in worst]
    checkpoint.write_text(detector.with_name("analysis.html"), page(f"{detector}: where it fails", sections))


def _figures_and_tables(content: dict) -> dict[str, list[Html]]:
    """The page without its pictures, from the content of analysis.json."""
    metrics, cut, confusion = content["metrics"], content["threshold"], content["confusion"]

    def draw_curves(axis, x: str, y: str) -> None:
        for name, curve in content["curves"].items():
            axis.plot(curve[x], curve[y], label=name, **({"color": "black", "linewidth": 2} if name == ALL else {}))
        if x == "score":
            axis.axvline(cut, color="0.5", linestyle="--", label=f"{cut:.3g}")
        axis.set(xlabel=x, ylabel=y, xlim=(0, 1), ylim=(0, 1.02))
        if len(content["curves"]) <= MOST_NAMES:
            axis.legend(fontsize=8)

    classes = [("class", "AP", "best F1", "at score", *COUNTED)]
    scores = {ALL: metrics, **metrics["per_class"]}
    for name, counts in content["errors"].items():
        classes.append((name, *(f"{scores[name][key]:.3f}" for key in ("AP", "F1", "threshold")), *counts.values()))
    matrix = [(r"true \ found as", *confusion["classes"])]
    matrix += [(name, *row) for name, row in zip(confusion["classes"], confusion["true_by_found"], strict=True)]
    sizes = [("objects", "AP", "AR")]
    for name, suffix in (("up to 32 x 32 pixels", "s"), ("up to 96 x 96", "m"), ("larger", "l")):
        sizes.append((name, f"{metrics['AP' + suffix]:.3f}", f"{metrics['AR' + suffix]:.3f}"))
    summary = f"{content['images']} test pictures. Errors are those of a score of at least {cut:.4g}, at an IoU of 0.5."
    recall = svg(lambda axis: draw_curves(axis, "recall", "precision"), "precision against recall")
    f1 = svg(lambda axis: draw_curves(axis, "score", "F1"), "F1 against the score, and the best threshold")
    return {
        "Summary": [element("p", summary)],
        "Precision and recall": [recall],
        "F1 against the score": [f1],
        "Classes and kinds of error": [table(classes), element("pre", __doc__.partition("\n\n")[2])],
        "Confusion matrix": [table(matrix)],
        "AP by size": [table(sizes)],
    }


def _picture(test: Annotations, i: int, found: Detections, cut: float) -> Html:
    """A picture with its objects, beside the same with its detections."""
    size, objects, name = test.sizes[i].tolist(), test.truth.of(i), str(test.image_id(i))
    height, width = (max(1, round(side * PICTURE_SIDE / max(size))) for side in reversed(size))
    image = resize(read_picture(test.paths[i], tuple(size)), [height, width])
    truth = Detections(objects["boxes"] / torch.tensor(size * 2), torch.ones(len(objects["labels"])), objects["labels"])
    parts = [element("h3", f"{name}: its objects, and what is found")]
    for alt, shown, threshold in (("objects", truth, None), ("detections", found, cut)):
        file = io.BytesIO()
        write_picture(draw(image, shown, test.classes, threshold), file)
        data = base64.b64encode(file.getvalue()).decode()
        parts.append(Html(f'<img width="49%" alt="{alt} of {escape(name)}" src="data:image/jpeg;base64,{data}">\n'))
    return element("article", *parts)
