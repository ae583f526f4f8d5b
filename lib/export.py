"""A detector as an ONNX graph: uint8 pictures in, detections out, with normalisation, decoding and NMS inside.

The network, scores and decoded boxes come from torch's exporter; NMS is a graph of its own behind them, since what
torchvision's NMS becomes on export depends on the versions of both.

Input: `images` (B, 3, S, S) uint8 RGB, resized as lib.transforms.eval_transform does. B is free.
Outputs, best first, padded with zeros to K = postprocess.top_k detections an image:
    boxes   (B, K, 4) float32  xyxy as shares of the picture's width and height: times them, pixels of any size
    scores  (B, K)    float32
    labels  (B, K)    int64    from 1, the label of the first class; 0 is padding
Without NMS, of each of the P prior boxes and C classes:
    prior_scores (B, P, C), prior_boxes (B, P, 4) in the same frame
"""

from __future__ import annotations

import copy
import json
import tempfile
import warnings
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from lib.config import PostprocessConfig
from lib.detector import ScoresAndBoxes
from lib.fuse import fuse
from lib.models import Detector
from lib.onnx_file import FORMAT, PRIORS, require

if TYPE_CHECKING:
    from onnx import ModelProto

OPSET = 18

# lib.postprocess, step for step. N = C * k candidates of an image: k of each class, (image, class) one after the other.
NMS = """
nms (float[batch, P, C] prior_scores, float[batch, P, 4] prior_boxes)
    => (float[batch, {top_k}, 4] boxes, float[batch, {top_k}] scores, int64[batch, {top_k}] labels)
<
    int64[1] nms_k = {{{k}}}, int64[1] nms_kept = {{{kept}}}, int64[1] nms_one = {{1}}, int64[1] nms_two = {{2}},
    float nms_iou = {{{iou}}}, float nms_confidence = {{{confidence}}}, float nms_zero = {{0}},
    int64[2] nms_per_image = {{-1, {n}}}, int64[2] nms_per_class = {{-1, {k}}}, int64[3] nms_four = {{1, 1, 4}},
    int64[3] nms_scores_shape = {{-1, 1, {k}}}, int64[3] nms_boxes_shape = {{-1, {k}, 4}},
    int64[2] nms_columns = {{0, 2}},
    int64[4] nms_padding = {{0, 0, 0, {padding}}}, int64[6] nms_box_padding = {{0, 0, 0, 0, {padding}, 0}}
>
{{
    nms_by_class = Transpose <perm = [0, 2, 1]> (prior_scores)
    nms_top, nms_prior = TopK <axis = -1> (nms_by_class, nms_k)
    nms_flat_prior = Reshape (nms_prior, nms_per_image)
    nms_prior_column = Unsqueeze (nms_flat_prior, nms_two)
    nms_prior_index = Expand (nms_prior_column, nms_four)
    nms_candidates = GatherElements <axis = 1> (prior_boxes, nms_prior_index)
    nms_group_boxes = Reshape (nms_candidates, nms_boxes_shape)
    nms_group_scores = Reshape (nms_top, nms_scores_shape)
    nms_triples = NonMaxSuppression (nms_group_boxes, nms_group_scores, nms_k, nms_iou, nms_confidence)
    nms_survivors = Gather <axis = 1> (nms_triples, nms_columns)
    nms_table = Reshape (nms_top, nms_per_class)
    nms_survivor_scores = GatherND (nms_table, nms_survivors)
    nms_shape = Shape (nms_table)
    nms_empty = ConstantOfShape (nms_shape)
    nms_scattered = ScatterND (nms_empty, nms_survivors, nms_survivor_scores)
    nms_flat_scores = Reshape (nms_scattered, nms_per_image)
    nms_best, nms_place = TopK <axis = 1> (nms_flat_scores, nms_kept)
    nms_class = Div (nms_place, nms_k)
    nms_label = Add (nms_class, nms_one)
    nms_found = Greater (nms_best, nms_zero)
    nms_found_int = Cast <to = 7> (nms_found)
    nms_true_label = Mul (nms_label, nms_found_int)
    nms_found_float = Cast <to = 1> (nms_found)
    nms_found_column = Unsqueeze (nms_found_float, nms_two)
    nms_place_column = Unsqueeze (nms_place, nms_two)
    nms_place_index = Expand (nms_place_column, nms_four)
    nms_best_boxes = GatherElements <axis = 1> (nms_candidates, nms_place_index)
    nms_true_boxes = Mul (nms_best_boxes, nms_found_column)
    scores = Pad (nms_best, nms_padding)
    labels = Pad (nms_true_label, nms_padding)
    boxes = Pad (nms_true_boxes, nms_box_padding)
}}
"""


def export_graph(detector: Detector, nms: bool = True) -> ModelProto:
    """The ONNX model of a detector on the CPU, with its classes, genotype and image size in the metadata."""
    onnx, *_ = require("onnx", "onnxscript", "onnxruntime")  # all at once: the gate needs the last one
    size = detector.model.image_size
    example = torch.zeros(2, 3, size, size, dtype=torch.uint8)  # a batch of 1 would be taken for a constant
    free = {name: {0: "batch"} for name in ("images", *PRIORS)}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporters' talk of their own future
        path = f"{folder}/network.onnx"
        # No `dynamo`: each version's own default exporter, traced up to torch 2.8, torch.export from then on.
        torch.onnx.export(
            ScoresAndBoxes(fuse(detector.model), detector.config),
            (example,),
            path,
            input_names=["images"],
            output_names=list(PRIORS),
            opset_version=OPSET,
            dynamic_axes=free,
            verbose=False,
        )
        model = onnx.load(path)
    _forget_sources(model)
    if nms:
        model = add_nms(model, detector.config.postprocess)
    onnx.helper.set_model_props(model, _metadata(detector))
    return model


def add_nms(model: ModelProto, config: PostprocessConfig) -> ModelProto:
    """A graph without NMS and NMS behind it, as lib.postprocess does it: boxes, scores and labels of the best."""
    compose, parser = require("onnx.compose", "onnx.parser")
    shapes = {output.name: output.type.tensor_type.shape.dim for output in model.graph.output}
    priors, classes = (dim.dim_value for dim in shapes[PRIORS[0]][1:])
    k = min(config.pre_nms_top_k, priors)
    kept = min(config.top_k, classes * k)
    text = NMS.format(
        k=k,
        n=classes * k,
        kept=kept,
        top_k=config.top_k,
        padding=config.top_k - kept,
        iou=float(config.nms_threshold),
        confidence=float(config.confidence_threshold),
    )
    joined = copy.deepcopy(model)
    joined.graph.CopyFrom(
        compose.merge_graphs(model.graph, parser.parse_graph(text), [(name, name) for name in PRIORS])
    )
    return joined


def with_every_output(model: ModelProto, config: PostprocessConfig) -> ModelProto:
    """The same graph with all five outputs, whichever it was exported with: what is needed to check it."""
    helper, onnx = require("onnx.helper", "onnx")
    if any(output.name in PRIORS for output in model.graph.output):
        model = add_nms(model, config)
    else:
        model = copy.deepcopy(model)
    outputs = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in PRIORS]
    model.graph.output.extend(outputs)
    return model


def _metadata(detector: Detector) -> dict[str, str]:
    content = {
        "classes": detector.classes,
        "category_ids": detector.category_ids,
        "genotype": detector.genotype.to_dict(),
        "image_size": detector.model.image_size,
        "postprocess": asdict(detector.config.postprocess),
        "boxes": "xyxy, shares of the picture's width and height",
        "epoch": detector.epoch,
    }
    return {"format": FORMAT, **{key: json.dumps(value) for key, value in content.items()}}


def _forget_sources(model: ModelProto) -> None:
    """Drop the exporter's notes, which hold the paths and lines of the source that each node came from."""
    graph = model.graph
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.initializer, *graph.value_info):
        del part.metadata_props[:]
        part.doc_string = ""
