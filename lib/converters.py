"""The files that `final_train.py --export` writes, and the runtimes that read them: onnxruntime, OpenVINO, LiteRT.

Input and outputs are those of lib.export, but a .tflite file takes one picture at a time and has no NMS inside. The
metadata, JSON by key, are in ONNX's own place for them, of which OpenVINO makes the entry `framework` of its file; in a
.tflite file they are detector.json in a zip archive at its end, where LiteRT keeps what belongs to a model.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, NamedTuple

import torch
from torch import Tensor

from lib import UserError, naming
from lib.config import PostprocessConfig
from lib.detector import Detector, ScoresAndBoxes, check_ids, fuse
from lib.genotype import Genotype
from lib.plain import MOST_BYTES, Bounds, check, parse_json
from lib.postprocess import DETECTIONS, PRIORS, Detections, suppress

if TYPE_CHECKING:
    from onnx import ModelProto

FORMAT = "detector/1"
INSIDE = "detector.json"  # the metadata in a .tflite file
Runner = Callable[[Tensor], dict[str, Tensor]]  # images (B, 3, S, S) uint8 to the outputs of a file, by name


def require(*names: str) -> list[ModuleType]:
    """Import optional packages. Raises UserError with the command that installs the missing ones."""
    packages = dict.fromkeys(name.partition(".")[0] for name in names)
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        command = f"pip install {' '.join(missing)}".replace("_", "-")
        raise UserError(f"exported files need packages that are missing; {command}")
    return [importlib.import_module(name) for name in names]


class Metadata(NamedTuple):
    """What an exported file says about itself, as JSON; its types are checked."""

    classes: list[str]
    category_ids: list[int | None]
    genotype: dict
    image_size: Annotated[int, Bounds(32, 8192)]
    postprocess: PostprocessConfig
    epoch: Annotated[int, Bounds(0)]
    thresholds: list[Annotated[float, Bounds(0, 1)] | None]


def metadata_of(detector: Detector) -> dict[str, str]:
    """What an exported file says about itself: JSON by key, see `Metadata`."""
    metadata = {
        "classes": detector.classes,
        "category_ids": detector.category_ids,
        "genotype": detector.genotype.to_dict(),
        "image_size": detector.model.image_size,
        "postprocess": asdict(detector.config.postprocess),
        "boxes": "xyxy, shares of the picture's width and height",
        "epoch": detector.epoch,
        "thresholds": list(detector.thresholds),
    }
    return {"format": FORMAT, **{key: json.dumps(value) for key, value in metadata.items()}}


def check_metadata(stored: Mapping[str, str], path: Path) -> Metadata:
    """The metadata that `final_train.py --export` stored in the file `path`."""
    if stored.get("format") != FORMAT:
        raise UserError(f"{path}: not a detector of final_train.py --export (its metadata lacks format {FORMAT})")
    parts = {key: parse_json(stored[key], f"{path}: metadata {key}") for key in Metadata._fields if key in stored}
    if isinstance(parts.get("postprocess"), dict):  # an older file may lack a key
        parts["postprocess"] = {**vars(PostprocessConfig()), **parts["postprocess"]}
    found = check({"thresholds": [], **parts}, Metadata, f"{path}: metadata")
    with naming(path):
        check_ids(found.category_ids, found.classes)
        Genotype.from_dict(found.genotype)
    return found


def detections_of(outputs: Mapping[str, Tensor], rules: PostprocessConfig) -> list[Detections]:
    """The detections of each image from a file's outputs, which are those of NMS, or else its inputs."""
    if DETECTIONS[0] not in outputs:
        return suppress(*(outputs[name] for name in PRIORS), rules)
    rows = zip(*(outputs[name] for name in DETECTIONS), strict=True)
    # Label 0 is padding.
    return [Detections(boxes[labels > 0], scores[labels > 0], labels[labels > 0]) for boxes, scores, labels in rows]


def open_exported(path: Path) -> tuple[Metadata, Runner]:
    """The metadata of an exported file, and a function that runs it on torch's CPU threads. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix == ".xml":
        return _open_openvino(path)
    if path.suffix == ".tflite":
        return _open_litert(path)
    session = open_session(path)
    return check_metadata(session.get_modelmeta().custom_metadata_map, path), session_runner(session)


def open_session(model: Path | bytes):
    """An onnxruntime session on the CPU with torch's number of threads. `model` is a file or its bytes."""
    (onnxruntime,) = require("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        source = str(model) if isinstance(model, Path) else model
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no base class of their own
        name = model if isinstance(model, Path) else "the exported graph"
        raise UserError(f"{name}: onnxruntime cannot read it: {' '.join(str(error).split())[:200]}") from None


def session_runner(session) -> Runner:
    """A function that runs a session of `open_session`."""
    names = [output.name for output in session.get_outputs()]

    def run(images: Tensor) -> dict[str, Tensor]:
        arrays = session.run(names, {"images": images.numpy()})
        return {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}

    return run


def save_onnx(model: ModelProto, path: Path) -> None:
    """Write a graph. Quantisation declares operators that no node uses, of versions that older runtimes refuse."""
    used = {node.domain for node in model.graph.node}
    for unused in [entry for entry in model.opset_import if entry.domain not in used]:
        model.opset_import.remove(unused)
    path.write_bytes(model.SerializeToString())


def save_openvino(model: ModelProto, path: Path, half: bool = False) -> None:
    """Convert an ONNX graph to `path`, an .xml, and a .bin beside it. With `half`, weights are stored in fp16."""
    (openvino,) = require("openvino")
    network = openvino.Core().read_model(model.SerializeToString())
    openvino.save_model(network, path, compress_to_fp16=half)


def _open_openvino(path: Path) -> tuple[Metadata, Runner]:
    """An OpenVINO file, with the inputs of NMS among its outputs."""
    (openvino,) = require("openvino")
    core = openvino.Core()
    # On CPUs that compute in bf16 or fp16, OpenVINO would do so, and lose digits.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    try:
        network = core.read_model(path)
        framework = network.get_rt_info()["framework"].items() if network.has_rt_info("framework") else ()
        metadata = check_metadata({key: value.astype(str) for key, value in framework}, path)
        found = {name for output in network.outputs for name in output.get_names()}
        network.add_outputs([name for name in PRIORS if name not in found])
        compiled = core.compile_model(network, "CPU", settings)
    except (RuntimeError, AttributeError) as error:  # the latter of metadata that are no texts
        raise UserError(f"{path}: OpenVINO cannot read it: {' '.join(str(error).split())[:200]}") from None
    names = [name for name in (*DETECTIONS, *PRIORS) if name in found.union(PRIORS)]

    def run(images: Tensor) -> dict[str, Tensor]:
        outputs = compiled({"images": images.numpy()})
        return {name: torch.from_numpy(outputs[name]) for name in names}

    return metadata, run


def save_litert(detector: Detector, path: Path) -> None:
    """Convert a detector on the CPU to `path`, a .tflite file with its metadata."""
    (litert_torch,) = require("litert_torch")
    size = detector.model.image_size
    network = ScoresAndBoxes(fuse(detector.model), detector.config).eval()
    example = {"images": torch.zeros(1, 3, size, size, dtype=torch.uint8)}
    with contextlib.redirect_stdout(io.StringIO()):  # the converter prints each of its steps
        path.write_bytes(litert_torch.convert(network, sample_kwargs=example).model_content())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(INSIDE, json.dumps(metadata_of(detector), indent=1))


def _open_litert(path: Path) -> tuple[Metadata, Runner]:
    (runtime,) = require("ai_edge_litert.interpreter")
    try:
        with zipfile.ZipFile(path).open(INSIDE) as file:
            texts = parse_json(file.read(MOST_BYTES), str(path))
        metadata = check_metadata(check(texts, dict[str, str], f"{path}: {INSIDE}"), path)
        signature = runtime.Interpreter(str(path), num_threads=torch.get_num_threads()).get_signature_runner()
    except (zipfile.BadZipFile, zlib.error, KeyError, ValueError, RuntimeError, OSError) as error:
        raise UserError(f"{path}: LiteRT cannot read it, or it is not from --export litert: {error}") from None

    def run(images: Tensor) -> dict[str, Tensor]:
        found = [signature(images=image[None].numpy()) for image in images]
        # The outputs have the converter's names.
        return {name: torch.cat([torch.from_numpy(o[f"output_{i}"]) for o in found]) for i, name in enumerate(PRIORS)}

    return metadata, run
