"""A detector as an ONNX file: the graph, the gate that compares it with the trained detector, and its int8 version.

Input: `images` (B, 3, S, S) uint8 RGB, resized as lib.transforms.eval_transform does. B is free.
Outputs, best first, padded with zeros to K = postprocess.top_k detections an image:
    boxes   (B, K, 4) float32  xyxy in [0, 1]: multiply by the width and height of a picture to get its pixels
    scores  (B, K)    float32
    labels  (B, K)    int64    from 1, the label of the first class; 0 is padding
Without NMS, for P prior boxes and C classes:
    prior_scores (B, P, C), prior_boxes (B, P, 4) xyxy in [0, 1]

torch's exporter converts resizing, network, scores and decoding. NMS is a graph written by hand (lib.postprocess),
because the export of torchvision's NMS depends on the versions of both libraries.
"""

from __future__ import annotations

import bisect
import copy
import json
import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lib import UserError, checkpoint
from lib.annotations import Annotations
from lib.checkpoint import write_text
from lib.config_io import to_dict
from lib.converters import (
    Runner,
    detections_of,
    metadata_of,
    open_exported,
    open_session,
    require,
    save_onnx,
    session_runner,
)
from lib.datasets import eval_loader
from lib.detector import Detector, ElasticSSD, ScoresAndBoxes, fuse
from lib.log import finite, progress
from lib.metrics import detection_metrics
from lib.plain import check, read_json
from lib.postprocess import PRIORS, add_nms, postprocess
from lib.pretrained import embed
from lib.sources import recognise

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto

OPSET = 18  # the least that torch's exporter writes
IR_VERSION = 8  # that of opset 18; onnxruntime reads the exporter's own from 1.18 on only
TOLERANCE = 1e-4  # of logits, offsets, scores and normalised boxes
AP_TOLERANCE = 5e-4
DIFFERENCES = ("supernet_difference", "score_difference", "box_difference")
Save = Callable[..., None]  # one of the functions save_* of lib.converters


def export_graph(detector: Detector, nms: bool = True) -> ModelProto:
    """The ONNX model of a detector on the CPU, with its classes, genotype and image size in the metadata."""
    onnx, *_ = require("onnx", "onnxscript", "onnxruntime")  # all that the export needs, to name all missing ones
    size = detector.model.image_size
    # A batch size of 1 would become a constant of the graph.
    example = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # deprecations within the exporter
        path = f"{folder}/network.onnx"
        # `dynamo` is not set: torch up to 2.8 traces by default, later versions use torch.export.
        torch.onnx.export(
            ScoresAndBoxes(fuse(detector.model), detector.config),
            (example,),
            path,
            input_names=["images"],
            output_names=list(PRIORS),
            opset_version=OPSET,
            dynamic_axes={name: {0: "batch"} for name in ("images", *PRIORS)},
            verbose=False,
        )
        model = onnx.load(path)
    # The exporter notes the path and line of the source of each node.
    graph = model.graph
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.initializer, *graph.value_info):
        del part.metadata_props[:]
        part.doc_string = ""
    if nms:
        model = add_nms(model, detector.config.postprocess)
    model.ir_version = IR_VERSION
    onnx.helper.set_model_props(model, metadata_of(detector))
    return model


def with_prior_outputs(model: ModelProto) -> ModelProto:
    """A copy of a graph, exported with or without NMS, whose outputs include the inputs of NMS."""
    helper, onnx = require("onnx.helper", "onnx")
    model = copy.deepcopy(model)
    given = [output.name for output in model.graph.output]
    missing = [name for name in PRIORS if name not in given]
    model.graph.output.extend(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in missing)
    return model


def write(
    model: ModelProto,
    path: Path,
    detector: Detector,
    test: Annotations,
    exact_ap: float | None = None,
    save: Save = save_onnx,
) -> dict:
    """Write `model` to `path` if it passes the gate, and return the report of `compare`. Else raise UserError.

    The check reads the written bytes. A file that fails does not stay. An int8 or fp16 file differs from the detector:
    with `exact_ap`, that of the exact file, there is no gate, and the report has the loss of AP.
    """
    with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as folder:
        draft = Path(folder) / path.name
        save(model, draft)
        if draft.suffix == ".onnx":
            compared = with_prior_outputs(require("onnx")[0].load(draft))
            run = session_runner(open_session(compared.SerializeToString()))
        else:
            _, run = open_exported(draft)
        report = compare(run, detector, test, parity=exact_ap is None or math.isnan(exact_ap))
        if exact_ap is None:
            refuse(report, path)
        else:
            report["AP_loss"] = exact_ap - report["AP"]
        parts = sorted(Path(folder).iterdir())  # OpenVINO's are a .bin and an .xml
        report["bytes"] = sum(part.stat().st_size for part in parts)
        for part in parts:
            part.replace(path.with_name(part.name))
    return report


def update_report(reports: dict[str, dict], folder: Path) -> None:
    """Put reports, by file name, into the folder's export.json. Reports of other files stay."""
    path = folder / "export.json"
    known = check(read_json(path), dict, str(path)) if path.is_file() else {}
    write_text(path, json.dumps(finite({**known, **reports}), indent=1) + "\n")


def refuse(report: dict, path: Path) -> None:
    """Raise UserError if a difference in a report of `compare` exceeds its tolerance or is NaN."""
    for name in DIFFERENCES:
        if not report[name] <= TOLERANCE:
            found = f"its {name.replace('_', ' ')} from the torch detector is {report[name]:.2g}"
            raise UserError(f"{path}: not written, since {found}")
    exported, trained = report["AP"], report["AP_torch"]
    both_undefined = math.isnan(exported) and math.isnan(trained)  # without any object in the test set
    if not both_undefined and not abs(exported - trained) <= AP_TOLERANCE:
        raise UserError(f"{path}: not written, since its AP is {exported:.4f}, the torch detector's {trained:.4f}")


def describe(report: dict) -> str:
    """A report in one line."""
    worst = f"largest difference of an output {max(report.get(name, 0.0) for name in DIFFERENCES):.1g}"
    if math.isnan(report["AP"]):
        return f"{worst} on {report['images']} pictures; without objects, no AP"
    text = f"AP {report['AP']:.4f} on {report['images']} test images"
    if "AP_loss" in report:
        kept = report.get("float_layers", [])
        return f"{text}, a loss of {report['AP_loss']:.4f}{'; in float: ' * bool(kept)}{', '.join(kept)}"
    return f"{text}, the torch detector's {report['AP_torch']:.4f}; {worst}"


@torch.inference_mode()
def compare(run: Runner, detector: Detector, test: Annotations, parity: bool = True) -> dict:
    """AP, AP50 and, with `parity`, the differences of an exported file from its detector, on every test image.

    Three paths must agree: the elastic network (see `elastic_view`), the plain network, and the file in its runtime.
    `supernet_difference` is the largest absolute one of logits and offsets between the first two, `score_difference`
    and `box_difference` are those of all priors, before NMS, between the last two. `AP_torch` is the detector's AP.
    """
    config, network = detector.config, detector.model
    rules = config.postprocess
    deployed = ScoresAndBoxes(network, config)
    elastic = elastic_view(detector) if parity else None
    worst = dict.fromkeys(DIFFERENCES, 0.0)
    exported, trained = [], []
    # One pass over the images serves both comparisons: tensors image by image, AP at the end.
    loader = eval_loader(test, range(len(test)), network.image_size, config.final.batch_size, config.data)
    for batch in progress(loader, "evaluate"):
        images = batch.images  # (B, 3, S, S)
        outputs = run(images)
        exported += detections_of(outputs, rules)
        if not parity:
            continue
        logits, offsets = network(images)  # (B, P, C + 1), (B, P, 4)
        scores, boxes = deployed.decode(logits, offsets)  # (B, P, C), (B, P, 4)
        raw = torch.cat((logits, offsets), -1)
        elastic_raw = torch.cat(elastic(images, detector.genotype), -1)
        pairs = ((elastic_raw, raw), (outputs[PRIORS[0]], scores), (outputs[PRIORS[1]], boxes))
        for name, (a, b) in zip(DIFFERENCES, pairs, strict=True):
            # max() would lose a NaN that is not the first argument, so NaN counts as infinite.
            worst[name] = max(worst[name], float((a - b).abs().nan_to_num(nan=math.inf).max()))
        trained += postprocess(logits, offsets, network.priors, rules, config.loss.type, config.head.variances)
    objects, sizes = test.ground_truth(range(len(test))), test.sizes.tolist()
    metrics = detection_metrics(exported, objects, sizes, test.classes)
    report = {"AP": metrics["AP"], "AP50": metrics["AP50"], "images": len(test)}
    if parity:
        report |= {**worst, "AP_torch": detection_metrics(trained, objects, sizes, test.classes)["AP"]}
    return report


def elastic_view(detector: Detector) -> ElasticSSD:
    """An ElasticSSD whose sub-network `detector.genotype` has the detector's weights: the inverse of `extract`.

    Final training changed the weights, so they are no longer a slice of the supernet's.
    """
    elastic = ElasticSSD(detector.config, len(detector.classes)).eval()
    # `embed` already knows how to write a detector into a supernet, centred kernels included.
    payload = {
        "format": checkpoint.FORMAT,
        "config": to_dict(detector.config),
        "model": detector.model.state_dict(),
        "genotype": detector.genotype.to_dict(),
    }
    embed(elastic, recognise(payload, "the detector"))
    return elastic


def write_int8(
    model: ModelProto,
    path: Path,
    detector: Detector,
    test: Annotations,
    exact_ap: float,
    batches: Sequence[Tensor],
    bound: float | None = None,
    save: Save = save_onnx,
) -> dict:
    """Write the int8 version of an exported graph, calibrated on `batches`, and return its report.

    If it loses more AP than `bound`, layers stay in float in the order of `sensitivities`, as few as bisection finds
    to suffice: with all of them in float nothing is lost.
    """

    def attempt(kept: Sequence[str], target: Path) -> dict:
        report = write(quantize(model, batches, kept), target, detector, test, exact_ap, save)
        return {**report, "float_layers": [name.removeprefix("model.").removesuffix(".weight") for name in kept]}

    kept: Sequence[str] = []
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / path.name  # an interruption leaves no attempt in the place of the file
        if bound is not None and attempt(kept, draft)["AP_loss"] > bound:
            change = sensitivities(model, batches[0][:8])
            order = sorted(change, key=change.get, reverse=True)
            enough = lambda count: attempt(order[:count], draft)["AP_loss"] <= bound  # noqa: E731
            kept = order[: bisect.bisect_left(range(len(order)), True, lo=1, key=enough)]
    return attempt(kept, path)


def convolutions(model: ModelProto) -> list[str]:
    """The convolutions of a graph, by the names of their weights, from the picture on."""
    return [node.input[1] for node in model.graph.node if node.op_type == "Conv"]


def sensitivities(model: ModelProto, images: Tensor) -> dict[str, float]:
    """Mean absolute change of scores and boxes of all priors if a convolution alone is in int8, by its name."""
    model = with_prior_outputs(model)
    exact = session_runner(open_session(model.SerializeToString()))(images)
    names = convolutions(model)
    change = {}
    for name in progress(names[1:], "sensitivity of each layer"):
        alone = quantize(model, [images], [other for other in names if other != name])
        found = session_runner(open_session(alone.SerializeToString()))(images)
        change[name] = sum(float((found[output] - exact[output]).abs().mean()) for output in PRIORS)
    return change


def float_nodes(graph: GraphProto, kept: Collection[str]) -> list[str]:
    """The nodes that stay in float: convolutions `kept`, sums that follow none in int8, and what comes after them all.

    A Clip or Relu is in int8 where its convolution is, and then needs no way back to float and forth.
    """
    last = max(i for i, node in enumerate(graph.node) if node.op_type == "Conv")
    in_int8 = {node.output[0] for node in graph.node if node.op_type == "Conv" and node.input[1] not in kept}
    left = []
    for i, node in enumerate(graph.node):
        beside_none = node.op_type == "Add" and in_int8.isdisjoint(node.input)
        if i > last or beside_none or (node.op_type == "Conv" and node.output[0] not in in_int8):
            left.append(node.name)
    return left


def quantize(model: ModelProto, batches: Iterable[Tensor], kept: Collection[str] = ()) -> ModelProto:
    """A copy of `model` with int8 convolutions (post-training quantisation, Jacob et al., CVPR 2018).

    Weights are quantised per channel, activations to the range seen on `batches` of unaugmented training images,
    (B, 3, S, S) uint8. The convolutions `kept`, and what follows the last one (scores, decoding, NMS), stay in float.
    So does the first one, which works on few channels and by itself cost 0.03 to 0.04 AP in int8 (docs/performance.md).
    """
    kept = {*kept, convolutions(model)[0]}
    onnx, quantization, shapes = require("onnx", "onnxruntime.quantization", "onnxruntime.quantization.shape_inference")
    feeds = ({"images": batch.numpy()} for batch in batches)
    with tempfile.TemporaryDirectory() as folder:
        # Saved first, because quantize_static changes a model in memory.
        onnx.save(model, f"{folder}/exported.onnx")
        # It warns that BatchNorm should be fused before, which is the case here.
        logging.disable(logging.WARNING)
        try:
            shapes.quant_pre_process(f"{folder}/exported.onnx", f"{folder}/float.onnx", skip_symbolic_shape=True)
            quantization.quantize_static(
                f"{folder}/float.onnx",
                f"{folder}/int8.onnx",
                SimpleNamespace(get_next=lambda: next(feeds, None)),  # a CalibrationDataReader
                quant_format=quantization.QuantFormat.QDQ,
                activation_type=quantization.QuantType.QUInt8,  # unsigned ones have kernels of their own
                op_types_to_quantize=["Conv", "Clip", "Relu", "Add"],
                nodes_to_exclude=float_nodes(onnx.load(f"{folder}/float.onnx").graph, kept),
                per_channel=True,
            )
        finally:
            logging.disable(logging.NOTSET)
        quantized = onnx.load(f"{folder}/int8.onnx")
    # Quantisation drops the metadata.
    onnx.helper.set_model_props(quantized, {entry.key: entry.value for entry in model.metadata_props})
    return quantized
