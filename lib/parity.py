"""The gate of the export: a file is left only if it gives what the trained detector gives, on the test pictures.

Three paths must agree: the supernet's way of running the genotype, the plain network, and the exported graph. A final
detector's weights are no longer a slice of the supernet it started from, so the first path is a fresh ElasticSSD into
which they are written back (`elastic_view`): the elastic layers must then compute what the exported graph does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lib.boxes import decode
from lib.checkpoint import FORMAT, replacing, write_text
from lib.config import to_dict
from lib.datasets import eval_loader
from lib.detector import ElasticSSD
from lib.engine import measure
from lib.errors import UserError
from lib.export import with_every_output
from lib.models import Detector
from lib.onnx_file import DETECTIONS, PRIORS, open_session, require, run_session, unpad
from lib.postprocess import Detections, class_scores, postprocess
from lib.pretrained import embed
from lib.records import Records
from lib.runlog import finite, progress
from lib.sources import recognise

if TYPE_CHECKING:
    from onnx import ModelProto

TOLERANCE = 1e-4  # of logits, offsets, scores and normalised boxes
AP_TOLERANCE = 5e-4
DIFFERENCES = ("supernet_difference", "score_difference", "box_difference")


def write_verified(model: ModelProto, path: Path, detector: Detector, test: Records) -> dict:
    """Write `model` to `path` if it passes the gate, and return `compare`'s report; else raise UserError.

    What is checked are the bytes on the disk, under a temporary name. Of a graph that fails nothing is left.
    """
    with replacing(path) as file:
        file.write(model.SerializeToString())
        file.flush()
        report = compare(Path(file.name), detector, test)
        refuse(report, path)
    return {**report, "bytes": path.stat().st_size}


def write_measured(model: ModelProto, path: Path, detector: Detector, test: Records, exact_ap: float) -> dict:
    """Write a graph that need not equal the detector, being in int8. The report has its loss from `exact_ap`."""
    report = average_precision(model, detector, test)
    report["AP_loss"] = exact_ap - report["AP"]
    with replacing(path) as file:
        file.write(model.SerializeToString())
    return {**report, "bytes": path.stat().st_size}


def record(reports: dict[str, dict], folder: Path) -> None:
    """Put reports, by file name, into the folder's export.json; those of other files stay."""
    path = folder / "export.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_text(path, json.dumps(finite({**known, **reports}), indent=1) + "\n")


def refuse(report: dict, path: Path) -> None:
    """Raise UserError if a report of `compare` shows a difference above the tolerances."""
    for name in DIFFERENCES:
        if not report[name] <= TOLERANCE:
            what = name.replace("_", " ")
            raise UserError(f"{path}: not written, since its {what} from the torch detector is {report[name]:.2g}")
    exported, trained = report["AP"], report["AP_torch"]
    both_undefined = math.isnan(exported) and math.isnan(trained)
    if not both_undefined and not abs(exported - trained) <= AP_TOLERANCE:
        raise UserError(f"{path}: not written, since its AP is {exported:.4f}, the torch detector's {trained:.4f}")


def describe(report: dict) -> str:
    """A report in a few words."""
    text = f"AP {report['AP']:.4f} on {report['images']} test images"
    if "AP_loss" in report:
        return f"{text}, a loss of {report['AP_loss']:.4f}"
    worst = max(report[name] for name in DIFFERENCES)
    return f"{text}, the torch detector's {report['AP_torch']:.4f}; largest difference of an output {worst:.1g}"


@torch.inference_mode()
def compare(path: Path, detector: Detector, test: Records) -> dict:
    """An exported file against its detector on every test image: the largest differences, and AP of both.

    `supernet_difference` is of logits and offsets, between the elastic and the plain network; `score_difference` and
    `box_difference` are of all priors before NMS, between the plain network and onnxruntime.
    """
    (onnx,) = require("onnx")
    config, network = detector.config, detector.model
    session = open_session(with_every_output(onnx.load(path), config.postprocess).SerializeToString())
    elastic = elastic_view(detector)
    worst = dict.fromkeys(DIFFERENCES, 0.0)
    exported, trained = [], []
    for images in test_images(detector, test):
        logits, offsets = network(images)
        boxes = decode(offsets, network.priors, config.head.variances).clamp(0, 1)
        *detections, prior_scores, prior_boxes = run_session(session, images, [*DETECTIONS, *PRIORS])
        pairs = (
            (torch.cat(elastic(images, detector.genotype), -1), torch.cat((logits, offsets), -1)),
            (prior_scores, class_scores(logits, config.loss.type)),
            (prior_boxes, boxes),
        )
        for name, (a, b) in zip(DIFFERENCES, pairs, strict=True):
            worst[name] = largest(worst[name], a, b)
        exported += unpad(*detections)
        trained += postprocess(
            logits, offsets, network.priors, config.postprocess, config.loss.type, config.head.variances
        )
    scores, reference = (metrics(found, test) for found in (exported, trained))
    return {**worst, "AP": scores["AP"], "AP50": scores["AP50"], "AP_torch": reference["AP"], "images": len(test)}


def largest(so_far: float, a: Tensor, b: Tensor) -> float:
    """The larger of `so_far` and the largest difference of two tensors; NaN counts as infinite."""
    return max(so_far, float((a - b).abs().nan_to_num(nan=math.inf).max()))


@torch.inference_mode()
def average_precision(model: ModelProto, detector: Detector, test: Records) -> dict:
    """AP and AP50 of a graph on the test images, without comparing: what is left of them in int8."""
    session = open_session(with_every_output(model, detector.config.postprocess).SerializeToString())
    batches = (run_session(session, images, DETECTIONS) for images in test_images(detector, test))
    scores = metrics([found for batch in batches for found in unpad(*batch)], test)
    return {"AP": scores["AP"], "AP50": scores["AP50"], "images": len(test)}


def test_images(detector: Detector, test: Records) -> Iterator[Tensor]:
    """Batches (B, 3, S, S) of all test images."""
    data, batch_size = detector.config.data, detector.config.final.batch_size
    options = {"workers": data.workers, "on_error": data.on_error}
    loader = eval_loader(test, range(len(test)), detector.model.image_size, batch_size, **options)
    return (batch.images for batch in progress(loader, "evaluate"))


def metrics(found: list[Detections], test: Records) -> dict:
    return measure(found, test.ground_truth(range(len(test))), test.sizes.tolist(), test.classes)


def elastic_view(detector: Detector) -> ElasticSSD:
    """An ElasticSSD whose sub-network `detector.genotype` has the detector's weights: `extract` backwards."""
    elastic = ElasticSSD(detector.config, len(detector.classes)).eval()
    content = {"model": detector.model.state_dict(), "genotype": detector.genotype.to_dict()}
    embed(elastic, recognise({"format": FORMAT, "config": to_dict(detector.config), **content}, "the detector"))
    return elastic
