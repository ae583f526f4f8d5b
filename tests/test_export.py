"""Exported detectors: the graph against torch, NMS, files and metadata, the gate, int8, and the script."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny_data import write_voc
from torch import nn
from torchvision.ops import box_iou

import final_train
from lib import UserError, checkpoint, export
from lib.annotations import Objects
from lib.config import PostprocessConfig
from lib.config_io import to_dict
from lib.converters import check_metadata, detections_of, open_exported, open_session, require, session_runner
from lib.datasets import eval_loader, load_annotations
from lib.detector import SSD, ScoresAndBoxes, fuse
from lib.export import (
    elastic_view,
    export_graph,
    quantize,
    refuse,
    sensitivities,
    update_report,
    with_prior_outputs,
    write,
    write_int8,
)
from lib.genotype import Genotype
from lib.head import Predictors
from lib.metrics import to_pixels
from lib.postprocess import DETECTIONS, PRIORS, add_nms, class_scores, postprocess
from lib.priors import decode

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

SIZE = 64
CLASSES = ["cat", "dog", "eel"]
GOOD = {"supernet_difference": 1e-6, "score_difference": 0.0, "box_difference": 9e-5, "AP": 0.5, "AP_torch": 0.5004}


@pytest.fixture(scope="module", params=["focal", "multibox"])
def exported(request, tiny_trained, tiny_graph):
    """A detector and its graph without NMS."""
    if request.param == "focal":
        return tiny_trained(), tiny_graph
    detector = tiny_trained(loss__type="multibox")
    # What multibox changes lies behind the backbone, so one convolution stands for it: it is exported in a second.
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 16, 16, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
    predictors = Predictors([8], [4], num_classes=3, kinds=["plain"])
    for net in (predictors.classes, predictors.boxes):
        nn.init.normal_(net[0][0].weight, std=0.5)
    model = SSD(SIZE, detector.model.normalize, [backbone], [], predictors, detector.model.priors[:64])
    detector = detector._replace(model=model.eval())
    return detector, export_graph(detector, nms=False)


def run_graph(graph, images):
    """The outputs of a graph, in its order."""
    return list(session_runner(open_session(graph.SerializeToString()))(images).values())


def unpad(*outputs):
    return detections_of(dict(zip(DETECTIONS, outputs, strict=True)), PostprocessConfig())


def pictures(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, SIZE, SIZE), generator=generator).to(torch.uint8)


def expected(detector, images, config=None):
    with torch.no_grad():
        logits, offsets = detector.model(images)
    settings_ = detector.config
    arguments = (config or settings_.postprocess, settings_.loss.type, settings_.head.variances)
    return logits, offsets, postprocess(logits, offsets, detector.model.priors, *arguments)


def assert_same_detections(found, reference):
    assert len(found) == len(reference)
    for mine, theirs in zip(found, reference, strict=True):
        assert len(mine.scores) == len(theirs.scores)
        torch.testing.assert_close(mine.scores, theirs.scores, rtol=0, atol=1e-5)
        # Scores that are equal to the last digits may come in another order; of those that softmax rounds to 1, which
        # enter NMS is anybody's choice.
        for a in (mine.scores < 1).nonzero()[:, 0].tolist():
            near = (theirs.scores - mine.scores[a]).abs() < 1e-5
            same = (theirs.labels == mine.labels[a]) & ((theirs.boxes - mine.boxes[a]).abs().amax(1) < 1e-4)
            assert (near & same).any()


@pytest.mark.parametrize("batch", [1, 3])
def test_scores_and_boxes_of_every_prior_equal_torch(exported, batch):
    detector, graph = exported
    images = pictures(batch)
    scores, boxes = run_graph(graph, images)
    logits, offsets, _ = expected(detector, images)
    priors = len(detector.model.priors)
    assert scores.shape == (batch, priors, 3) and boxes.shape == (batch, priors, 4)
    torch.testing.assert_close(scores, class_scores(logits, detector.config.loss.type), rtol=0, atol=1e-5)
    reference = decode(offsets, detector.model.priors, detector.config.head.variances).clamp(0, 1)
    torch.testing.assert_close(boxes, reference, rtol=0, atol=1e-5)
    assert scores.std() > 0.02 and boxes.std() > 0.1  # not all alike


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "config",
    [
        PostprocessConfig(),
        PostprocessConfig(confidence_threshold=0.2, nms_threshold=0.3, top_k=10),
        PostprocessConfig(pre_nms_top_k=5, top_k=12),
        PostprocessConfig(confidence_threshold=0.9999),
    ],
    ids=["defaults", "strict", "few", "none"],
)
def test_detections_equal_torch(exported, batch, config):
    detector, graph = exported
    images = pictures(batch, seed=1)
    outputs = run_graph(add_nms(graph, config), images)
    boxes, scores, labels = outputs
    assert boxes.shape == (batch, config.top_k, 4) and scores.shape == labels.shape == (batch, config.top_k)
    padding = labels == 0
    assert (scores[padding] == 0).all() and (boxes[padding] == 0).all() and labels.dtype == torch.int64
    _, _, reference = expected(detector, images, config)
    assert_same_detections(unpad(*outputs), reference)
    if config == PostprocessConfig():
        assert min(len(d.scores) for d in reference) > 20 and {int(k) for d in reference for k in d.labels} == {1, 2, 3}


IDENTITY = """
<ir_version: 8, opset_import: ["": 18]>
priors (float[batch, {p}, {c}] a, float[batch, {p}, 4] b) => (float[batch, {p}, {c}] prior_scores, float[batch, {p}, 4] prior_boxes)
{{ prior_scores = Identity (a)
   prior_boxes = Identity (b) }}
"""  # noqa: E501


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 4),
    priors=st.integers(1, 40),
    classes=st.integers(1, 5),
    confidence=st.sampled_from([1e-5, 0.01, 0.3, 0.8]),
    iou=st.floats(0.05, 0.95),
    pre=st.integers(1, 50),
    top_k=st.integers(1, 60),
)
def test_nms_equals_postprocess(seed, batch, priors, classes, confidence, iou, pre, top_k):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(batch, priors, classes + 1, generator=generator)
    offsets = torch.randn(batch, priors, 4, generator=generator)
    centres, sizes = torch.rand(priors, 2, generator=generator), 0.1 + 0.4 * torch.rand(priors, 2, generator=generator)
    prior_boxes = torch.cat((centres, sizes), 1)
    config = PostprocessConfig(confidence, iou, pre, top_k)
    scores, boxes = class_scores(logits, "focal"), decode(offsets, prior_boxes, (0.1, 0.2)).clamp(0, 1)
    # Torch finds overlaps in float64, onnxruntime in float32; of equal scores, either may come first.
    assume(not any(((box_iou(image, image) - iou).abs() < 1e-5).any() for image in boxes))
    assume(scores.flatten(1).sort().values.diff().all())
    reference = postprocess(logits, offsets, prior_boxes, config, "focal", (0.1, 0.2))
    graph = add_nms(onnx.parser.parse_model(IDENTITY.format(p=priors, c=classes)), config)
    onnx.checker.check_model(graph, full_check=True)
    inputs = {"a": scores.numpy(), "b": boxes.numpy()}
    outputs = open_session(graph.SerializeToString()).run(list(DETECTIONS), inputs)
    assert_same_detections(unpad(*map(torch.from_numpy, outputs)), reference)


def test_every_norm_is_folded(exported):
    detector, graph = exported
    assert [m for m in detector.model.modules() if isinstance(m, nn.BatchNorm2d)]  # the detector is left as it was
    operations = {node.op_type for node in graph.graph.node}
    assert "Conv" in operations and "BatchNormalization" not in operations
    convolutions = [m for m in detector.model.modules() if isinstance(m, nn.Conv2d)]
    assert sum(node.op_type == "Conv" for node in graph.graph.node) == len(convolutions)


def test_the_file_says_what_it_holds(exported):
    detector, raw = exported
    graph = add_nms(raw, detector.config.postprocess)
    onnx.checker.check_model(graph, full_check=True)
    session = open_session(graph.SerializeToString())
    metadata = check_metadata(session.get_modelmeta().custom_metadata_map, "detector.onnx")
    assert metadata.classes == ["cat", "dog", "eel"] and metadata.category_ids == [1, 7, 9]
    assert Genotype.from_dict(metadata.genotype) == detector.genotype
    assert metadata.image_size == SIZE and metadata.epoch == 5
    assert metadata.postprocess == detector.config.postprocess and metadata.thresholds == list(detector.thresholds)
    (images,) = session.get_inputs()
    assert (images.name, images.type, images.shape) == ("images", "tensor(uint8)", ["batch", 3, SIZE, SIZE])
    shapes = {output.name: output.shape for output in session.get_outputs()}
    assert shapes == {"boxes": ["batch", 200, 4], "scores": ["batch", 200], "labels": ["batch", 200]}
    assert b".py" not in graph.SerializeToString()  # no trace of whose files it was made from


def test_the_inputs_of_nms_are_outputs_of_either_variant(exported):
    detector, raw = exported
    images = pictures(2)
    results = []
    for graph, names in ((raw, PRIORS), (add_nms(raw, detector.config.postprocess), (*DETECTIONS, *PRIORS))):
        before = graph.SerializeToString()
        session = open_session(with_prior_outputs(graph).SerializeToString())
        assert [output.name for output in session.get_outputs()] == list(names)
        found = session_runner(session)(images)
        results.append([found[name] for name in PRIORS])
        assert graph.SerializeToString() == before
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_missing_packages_are_named_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"pip install onnxscript onnxruntime$"):
        require("json", "onnxscript", "onnxruntime.quantization", "onnxruntime")
    assert require("json") == [json]


def test_padding_is_cut_off_image_by_image():
    boxes = torch.rand(3, 4, 4)
    scores = torch.tensor([[0.9, 0.5, 0, 0], [0, 0, 0, 0], [0.8, 0.7, 0.6, 0.5]])
    labels = torch.tensor([[2, 1, 0, 0], [0, 0, 0, 0], [1, 1, 3, 2]])
    found = unpad(boxes, scores, labels)
    assert [len(d.scores) for d in found] == [2, 0, 4]
    assert found[1].boxes.shape == (0, 4) and torch.equal(found[0].boxes, boxes[0, :2])
    assert torch.equal(found[2].labels, labels[2]) and found[0].scores.tolist() == scores[0, :2].tolist()


def test_files_that_are_no_detectors_are_named(tmp_path):
    with pytest.raises(UserError, match=r"missing\.onnx: no such file"):
        open_exported(tmp_path / "missing.onnx")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no graph")
    with pytest.raises(UserError, match=r"broken\.onnx: onnxruntime cannot read it"):
        open_session(broken)
    text = '<ir_version: 8, opset_import: ["": 18]> other (float[N] x) => (float[N] y) { y = Identity (x) }'
    other = tmp_path / "other.onnx"
    onnx.save(onnx.parser.parse_model(text), other)
    with pytest.raises(UserError, match=r"other\.onnx: not a detector"):
        open_exported(other)


@pytest.fixture(scope="module")
def data(tiny_config, tmp_path_factory):
    """The configuration of a few pictures of noise, and the test set's annotations."""
    folder = tmp_path_factory.mktemp("voc")
    for name, count in (("trainval", 8), ("test", 8)):
        objects = {f"{name}_{i}": [(CLASSES[i % 3], 5, 5, 30, 25)] for i in range(count)}
        write_voc(folder, objects, name)
    changes = {"data__root": folder, "data__workers": 0, "data__classes": CLASSES}
    config = tiny_config(data__dataset_type="voc", **changes)
    return config, load_annotations(config.data, "test")


@pytest.fixture(scope="module")
def trained(data, tiny_trained, tiny_graph):
    """A detector, its graph, and annotations whose objects are what the detector finds best, so that its AP is high."""
    detector, test = tiny_trained()._replace(config=data[0]), data[1]
    loader = eval_loader(test, range(len(test)), SIZE, 8, detector.config.data)
    images = torch.cat([batch.images for batch in loader])
    with torch.no_grad():
        logits, offsets = detector.model(images)
    arguments = (detector.config.postprocess, detector.config.loss.type, detector.config.head.variances)
    found = postprocess(logits, offsets, detector.model.priors, *arguments)
    best = [to_pixels(d, *size) for d, size in zip(found, test.sizes.tolist(), strict=True)]
    boxes, labels = (torch.cat([d[name][:6] for d in best]) for name in ("boxes", "labels"))
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    nothing_ignored = torch.zeros(len(boxes), dtype=torch.bool)
    objects = Objects(boxes, labels, nothing_ignored, area, offsets=torch.arange(0, len(boxes) + 1, 6))
    return (
        detector,
        add_nms(tiny_graph, detector.config.postprocess),
        dataclasses.replace(test, objects=objects, truth=objects),
    )


def tampered(graph, change):
    """A copy with one of its constants changed."""
    spoiled = onnx.ModelProto.FromString(graph.SerializeToString())
    change({initializer.name: initializer for initializer in spoiled.graph.initializer})
    return spoiled


def test_a_faithful_graph_is_written_and_measured(trained, tmp_path):
    detector, graph, test = trained
    report = write(graph, tmp_path / "detector.onnx", detector, test)
    assert [p.name for p in tmp_path.iterdir()] == ["detector.onnx"]
    assert report["AP"] == pytest.approx(report["AP_torch"], abs=5e-4) and report["AP_torch"] > 0.5
    assert all(0 <= report[f"{name}_difference"] < 1e-5 for name in ("supernet", "score", "box"))
    assert report["bytes"] == (tmp_path / "detector.onnx").stat().st_size and report["images"] == 8
    assert onnx.load(tmp_path / "detector.onnx").SerializeToString() == graph.SerializeToString()


def scale_a_weight(initializers):
    name = next(name for name in initializers if name.endswith("predictors.boxes.1.3.weight"))
    array = onnx.numpy_helper.to_array(initializers[name])
    initializers[name].CopyFrom(onnx.numpy_helper.from_array(array * 1.01, name))


def shift_the_labels(initializers):
    initializers["nms_one"].CopyFrom(onnx.numpy_helper.from_array(torch.tensor([2]).numpy(), "nms_one"))


def suppress_more(initializers):
    initializers["nms_iou"].CopyFrom(onnx.numpy_helper.from_array(torch.tensor(0.01).numpy(), "nms_iou"))


def move_a_bias(initializers):
    name = next(name for name in initializers if name.endswith("predictors.classes.1.3.bias"))
    array = onnx.numpy_helper.to_array(initializers[name])
    initializers[name].CopyFrom(onnx.numpy_helper.from_array(array + 0.01, name))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (scale_a_weight, "box difference"),
        (move_a_bias, "score difference"),
        (shift_the_labels, "its AP is"),
        (suppress_more, "its AP is"),
    ],
)
def test_a_tampered_graph_leaves_no_file(trained, tmp_path, change, words):
    detector, graph, test = trained
    with pytest.raises(UserError, match=f"detector.onnx: not written, since .*{words}"):
        write(tampered(graph, change), tmp_path / "detector.onnx", detector, test)
    assert list(tmp_path.iterdir()) == []


def test_a_graph_of_other_weights_is_refused(trained, tmp_path):
    detector, graph, test = trained
    other = copy.deepcopy(detector.model)
    with torch.no_grad():
        other.predictors.classes[0][-1].bias.add_(0.01)
    with pytest.raises(UserError, match="not written, since its score difference"):
        write(graph, tmp_path / "detector.onnx", detector._replace(model=other), test)


@pytest.mark.parametrize(
    "change",
    [
        {"supernet_difference": 2e-4},
        {"score_difference": float("nan")},
        {"box_difference": float("inf")},
        {"AP": 0.4998},
        {"AP": float("nan")},
    ],
)
def test_each_tolerance_refuses(change, tmp_path):
    refuse(GOOD, tmp_path)
    refuse({**GOOD, "AP": float("nan"), "AP_torch": float("nan")}, tmp_path)  # no object to find: nothing to compare
    with pytest.raises(UserError):
        refuse({**GOOD, **change}, tmp_path)


def test_the_elastic_view_is_extract_backwards(trained):
    detector, _, _ = trained
    elastic = elastic_view(detector)
    weights, extracted = detector.model.state_dict(), elastic.extract(detector.genotype).state_dict()
    assert weights.keys() == extracted.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(extracted[name], tensor, rtol=1e-6, atol=1e-7)
    sizes = {block.kernel for stage in detector.genotype.stages for block in stage}
    assert len(sizes) > 1  # centres of larger kernels are among them
    images = torch.randint(0, 256, (2, 3, 64, 64)).to(torch.uint8)
    with torch.no_grad():
        pairs = zip(elastic(images, detector.genotype), detector.model(images), strict=True)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)


def test_an_elastic_layer_that_computes_something_else_is_seen(trained, monkeypatch, tmp_path):
    detector, graph, test = trained

    def spoiled(trained_detector):
        elastic = elastic_view(trained_detector)
        with torch.no_grad():
            elastic.backbone.stem[0].weight.mul_(1.01)
        return elastic

    monkeypatch.setattr("lib.export.elastic_view", spoiled)
    with pytest.raises(UserError, match="supernet difference"):
        write(graph, tmp_path / "detector.onnx", detector, test)


def test_a_measured_graph_is_written_whatever_its_ap(trained, tmp_path):
    detector, graph, test = trained
    same, worse = tmp_path / "same.onnx", tmp_path / "detector_int8.onnx"
    exact = write(graph, same, detector, test)["AP"]
    assert write(graph, same, detector, test, exact)["AP_loss"] == 0
    report = write(tampered(graph, suppress_more), worse, detector, test, exact)
    assert report["AP_loss"] == exact - report["AP"] > 0.01 and worse.is_file()


def test_reports_of_other_files_stay(tmp_path):
    update_report({"a.onnx": {"AP": 0.5}, "b.onnx": {"AP": 0.4}}, tmp_path)
    update_report({"b.onnx": {"AP": float("nan")}}, tmp_path)
    assert json.loads((tmp_path / "export.json").read_text()) == {"a.onnx": {"AP": 0.5}, "b.onnx": {"AP": None}}


@pytest.fixture(scope="module")
def graphs(tiny_graph):
    """A graph without NMS, its int8 version, and images."""
    before = tiny_graph.SerializeToString()
    batches = [pictures(4, seed) for seed in (0, 1)]
    quantized = quantize(tiny_graph, batches)
    assert tiny_graph.SerializeToString() == before
    return tiny_graph, quantized, batches[0]


def test_int8_is_near_float_and_not_float(graphs):
    exact, small, images = graphs
    outputs = [run_graph(g, images) for g in (exact, small)]
    for a, b in zip(*outputs, strict=True):
        assert 0 < (a - b).abs().mean() < 0.05
        assert torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1] > 0.9


def test_all_convolutions_but_the_first_are_quantised_and_nothing_after_them(graphs):
    _, small, _ = graphs
    producers = {name: node for node in small.graph.node for name in node.output}
    first = next(node for node in small.graph.node if node.op_type == "Conv")
    after_last = False
    for node in reversed(small.graph.node):
        inputs = [producers[name].op_type for name in node.input if name in producers]
        if node.op_type == "Conv":
            assert (inputs[:2] == ["DequantizeLinear"] * 2) == (node is not first)
            after_last = True
        elif not after_last and node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            # What reads a quantised convolution's output has it back in float.
            assert "QuantizeLinear" not in inputs


def test_the_weights_take_a_byte_each(graphs):
    exact, small, _ = graphs
    types = {initializer.name: initializer.data_type for initializer in small.graph.initializer}
    stored = [name for node in small.graph.node if node.op_type == "DequantizeLinear" for name in node.input[:1]]
    convolutions = sum(node.op_type == "Conv" for node in exact.graph.node)
    assert [types[name] for name in stored if name in types].count(onnx.TensorProto.INT8) == convolutions - 1


def test_the_metadata_stay(graphs):
    a, b = ({entry.key: entry.value for entry in graph.metadata_props} for graph in graphs[:2])
    assert a == b and check_metadata(a, "x").image_size == SIZE


@pytest.fixture(scope="module")
def folder(data, tiny_checkpoint, tmp_path_factory):
    """A folder with a detector's checkpoint and the pictures that its configuration names."""
    folder = tmp_path_factory.mktemp("export")
    checkpoint.save(folder / "best.pt", {**checkpoint.read(tiny_checkpoint), "config": to_dict(data[0])})
    return folder


def test_the_script_exports_and_predicts_the_same(folder, data, tiny_graph, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(export, "export_graph", lambda detector, nms: add_nms(tiny_graph, detector.config.postprocess))
    final_train.main(["--export", "onnx", "--int8", "--load", "best.pt"])
    printed = capsys.readouterr().out
    assert {p.name for p in folder.iterdir()} == {"best.pt", "detector.onnx", "detector_int8.onnx", "export.json"}
    reports = json.loads((folder / "export.json").read_text())
    assert reports.keys() == {"detector.onnx", "detector_int8.onnx"}
    for name, report in reports.items():
        assert report["bytes"] == (folder / name).stat().st_size and report["images"] == 8
        assert f"wrote {name}, " in printed
    assert reports["detector.onnx"]["score_difference"] < 1e-4 and "AP_loss" in reports["detector_int8.onnx"]
    found = []
    for name in ("best.pt", "detector.onnx"):
        pictures = f"{data[0].data.root}/JPEGImages/test_*.jpg"
        final_train.main(["--predict", pictures, "--load", name, "--out", f"seen_{name}"])
        assert len(list((folder / f"seen_{name}").glob("*.jpg"))) == 8
        found.append(json.loads((folder / f"seen_{name}" / "detections.json").read_text()))
    assert len(found[0]) == len(found[1]) > 100 and {d["category_id"] for d in found[1]} == {1, 7, 9}
    for mine, theirs in zip(*(sorted(f, key=lambda d: (d["image_id"], d["score"])) for f in found), strict=True):
        assert mine["image_id"] == theirs["image_id"] and abs(mine["score"] - theirs["score"]) < 2e-5


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["--int8"], "--int8: goes with --export onnx or openvino"),
        (["--eval-only", "--load", "detector.onnx"], r"detector\.onnx: an exported detector; expected .*best\.pt"),
        (["--predict", "best.pt", "--load", "missing.onnx"], r"missing\.onnx: no such file"),
    ],
)
def test_mistakes_are_named(folder, arguments, pattern, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=pattern) as caught:
        final_train.main(arguments)
    assert "\n" not in str(caught.value)


def weights_in_int8(graph):
    """Of each convolution, whether its weights are stored in int8."""
    made = {name: node.op_type for node in graph.graph.node for name in node.output}
    return [made.get(node.input[1]) == "DequantizeLinear" for node in graph.graph.node if node.op_type == "Conv"]


@pytest.mark.parametrize("exported", ["multibox"], indirect=True)
def test_convolutions_that_are_kept_stay_in_float(exported):
    _, graph = exported
    names, images = export.convolutions(graph), pictures(2)
    assert len(names) == 3 and weights_in_int8(quantize(graph, [images])) == [False, True, True]
    assert weights_in_int8(quantize(graph, [images], names[1:2])) == [False, False, True]
    float_again = quantize(graph, [images], names)
    assert not {"QuantizeLinear", "DequantizeLinear"} & {node.op_type for node in float_again.graph.node}
    outputs = [run_graph(g, images) for g in (graph, float_again)]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*outputs, strict=True))


def fake_unsigned(x):
    """A tensor in 256 steps from its minimum to its maximum, which hold 0."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = (high - low) / 255
    return torch.fake_quantize_per_tensor_affine(x, scale, round(-low / scale), 0, 255)


def exact_session(model):
    """A session without fused int8 kernels, which saturate on a processor without VNNI."""
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("exported", ["multibox"], indirect=True)
@torch.no_grad()
def test_sensitivity_is_the_change_by_one_quantised_layer(exported, monkeypatch):
    """The same with torch's fake quantisation of weights, input and output (after the activation)."""
    monkeypatch.setattr(export, "open_session", exact_session)
    detector, graph = exported
    images, expected_change = pictures(4), []
    exact = ScoresAndBoxes(detector.model, detector.config)(images)
    for number in (1, 2):
        model = fuse(detector.model)
        layer = [m for m in model.modules() if isinstance(m, nn.Conv2d)][number]
        scales = layer.weight.detach().flatten(1).abs().amax(1) / 127
        zeros = torch.zeros(len(scales), dtype=torch.int32)
        layer.weight.data = torch.fake_quantize_per_channel_affine(layer.weight.data, scales, zeros, 0, -127, 127)
        # Both predictors read the tensor that the backbone's activation gives.
        for module in (layer, model.backbone[0]):
            module.register_forward_hook(lambda _, inputs, output: fake_unsigned(output))
        found = ScoresAndBoxes(model, detector.config)(images)
        expected_change.append(sum(float((a - b).abs().mean()) for a, b in zip(exact, found, strict=True)))
    change = sensitivities(graph, images)
    assert list(change) == export.convolutions(graph)[1:]
    assert list(change.values()) == pytest.approx(expected_change, rel=0.02)


@pytest.mark.parametrize("needed", [0, 1, 5, 6, 20])
def test_as_few_layers_as_suffice_stay_in_float(needed, monkeypatch, tmp_path, trained):
    """Stand-ins for quantisation and AP: the loss is within the bound once the `needed` most sensitive are kept."""
    detector, graph, test = trained
    names = [f"model.layer{i}.weight" for i in range(20)]
    change = {name: (7 * i) % 20 for i, name in enumerate(names)}
    ordered = sorted(names, key=change.get, reverse=True)
    monkeypatch.setattr(export, "convolutions", lambda model: names)
    monkeypatch.setattr(export, "sensitivities", lambda model, images: change)
    monkeypatch.setattr(export, "quantize", lambda model, batches, kept: kept)
    loss = lambda kept: 0.01 if len(kept) >= needed else 0.011  # noqa: E731
    monkeypatch.setattr(export, "write", lambda kept, *_: {"AP": 0.5, "images": 8, "AP_loss": loss(kept)})
    report = write_int8(graph, tmp_path / "a.onnx", detector, test, 0.51, [pictures(2)], 0.01)
    assert report["float_layers"] == [name[6:-7] for name in ordered[:needed]]
    assert ("in float: " + ", ".join(report["float_layers"]) in export.describe(report)) == (needed > 0)
    unbounded = write_int8(graph, tmp_path / "a.onnx", detector, test, 0.51, [pictures(2)])
    assert unbounded["float_layers"] == []
