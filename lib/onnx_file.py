"""Exported detectors as files: optional packages, onnxruntime sessions, metadata, detections from the outputs."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from lib.errors import UserError
from lib.postprocess import Detections

FORMAT = "detector/1"
DETECTIONS = ("boxes", "scores", "labels")  # the outputs of a graph with NMS inside
PRIORS = ("prior_scores", "prior_boxes")  # and what NMS works on, the outputs of a graph without


def require(*names: str) -> list[ModuleType]:
    """Import optional packages. Raises UserError with the command that installs what is missing."""
    modules, missing = [], []
    for name in names:
        try:
            modules.append(importlib.import_module(name))
        except ImportError:
            missing.append(name.partition(".")[0])
    if missing:
        raise UserError(f"ONNX files need packages that are missing; pip install {' '.join(dict.fromkeys(missing))}")
    return modules


def open_session(model: Path | bytes):
    """An onnxruntime session on the CPU with as many threads as torch has. `model` is a file or its bytes."""
    (onnxruntime,) = require("onnxruntime")
    if isinstance(model, Path) and not model.is_file():
        raise UserError(f"{model}: no such file")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    source = str(model) if isinstance(model, Path) else model
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no base class of their own
        if not isinstance(model, Path):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{model}: onnxruntime cannot read it: {reason}") from None


def run_session(session, images: Tensor, outputs: Sequence[str]) -> list[Tensor]:
    """The named outputs for images (B, 3, S, S) uint8."""
    return [torch.from_numpy(array) for array in session.run(list(outputs), {"images": images.cpu().numpy()})]


def read_metadata(session, path: Path) -> dict:
    """What `final_train.py --export` noted in the file: classes, category_ids, genotype, image_size, postprocess."""
    stored = session.get_modelmeta().custom_metadata_map
    if stored.get("format") != FORMAT:
        raise UserError(f"{path}: not a detector of final_train.py --export (its metadata lack format {FORMAT})")
    return {key: value if key == "format" else json.loads(value) for key, value in stored.items()}


def unpad(boxes: Tensor, scores: Tensor, labels: Tensor) -> list[Detections]:
    """Boxes (B, K, 4), scores (B, K) and labels (B, K), padded with zeros, to the detections of each image."""
    return [Detections(b[k > 0], s[k > 0], k[k > 0]) for b, s, k in zip(boxes, scores, labels, strict=True)]
