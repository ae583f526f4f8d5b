from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from tiny_data import write_voc
from tiny_runs import run

import final_train
from lib import checkpoint, export
from lib.config_io import to_dict
from lib.datasets import load_annotations
from lib.errors import UserError
from lib.export import (
    average_precision,
    compare,
    elastic_view,
    export_graph,
    refuse,
    update_report,
    write_measured,
    write_verified,
)
from lib.metrics import to_pixels
from lib.postprocess import postprocess

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

CLASSES = ["cat", "dog", "eel"]
GOOD = {"supernet_difference": 1e-6, "score_difference": 0.0, "box_difference": 9e-5, "AP": 0.5, "AP_torch": 0.5004}


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
def trained(data, tiny_trained):
    """A detector, its graph, and annotations whose objects are what the detector finds best, so that its AP is high."""
    detector, test = tiny_trained()._replace(config=data[0]), data[1]
    images = torch.cat(list(export.test_images(detector, test)))
    with torch.no_grad():
        logits, offsets = detector.model(images)
    arguments = (detector.config.postprocess, detector.config.loss.type, detector.config.head.variances)
    found = postprocess(logits, offsets, detector.model.priors, *arguments)
    best = [to_pixels(d, *size) for d, size in zip(found, test.sizes.tolist(), strict=True)]
    boxes, labels = (torch.cat([d[name][:6] for d in best]) for name in ("boxes", "labels"))
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    objects = {"boxes": boxes, "labels": labels, "area": area, "ignore": torch.zeros(len(boxes), dtype=torch.bool)}
    offsets = torch.arange(0, len(boxes) + 1, 6)
    return detector, export_graph(detector), dataclasses.replace(test, **objects, offsets=offsets)


def tampered(graph, change):
    """A copy with one of its constants changed."""
    spoiled = onnx.ModelProto.FromString(graph.SerializeToString())
    change({initializer.name: initializer for initializer in spoiled.graph.initializer})
    return spoiled


def test_a_faithful_graph_is_written_and_measured(trained, tmp_path):
    detector, graph, test = trained
    report = write_verified(graph, tmp_path / "detector.onnx", detector, test)
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
        write_verified(tampered(graph, change), tmp_path / "detector.onnx", detector, test)
    assert list(tmp_path.iterdir()) == []


def test_a_graph_of_other_weights_is_refused(trained, tmp_path):
    detector, graph, test = trained
    other = copy.deepcopy(detector.model)
    with torch.no_grad():
        other.predictors.classes[0][-1].bias.add_(0.01)
    with pytest.raises(UserError, match="not written, since its score difference"):
        write_verified(graph, tmp_path / "detector.onnx", detector._replace(model=other), test)


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
        write_verified(graph, tmp_path / "detector.onnx", detector, test)


def test_a_measured_graph_is_written_whatever_its_ap(trained, tmp_path):
    detector, graph, test = trained
    exact = average_precision(graph, detector, test)
    onnx.save(graph, tmp_path / "same.onnx")
    assert exact["AP"] == compare(tmp_path / "same.onnx", detector, test)["AP"]
    worse = tampered(graph, suppress_more)
    report = write_measured(worse, tmp_path / "detector_int8.onnx", detector, test, exact["AP"])
    assert report["AP_loss"] == exact["AP"] - report["AP"] > 0.01 and (tmp_path / "detector_int8.onnx").is_file()


def test_reports_of_other_files_stay(tmp_path):
    update_report({"a.onnx": {"AP": 0.5}, "b.onnx": {"AP": 0.4}}, tmp_path)
    update_report({"b.onnx": {"AP": float("nan")}}, tmp_path)
    assert json.loads((tmp_path / "export.json").read_text()) == {"a.onnx": {"AP": 0.5}, "b.onnx": {"AP": None}}


# --------------------------------------------------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def folder(data, tiny_checkpoint, tmp_path_factory):
    """A folder with a detector's checkpoint and the pictures that its configuration names."""
    folder = tmp_path_factory.mktemp("export")
    checkpoint.save(folder / "best.pt", {**checkpoint.read(tiny_checkpoint), "config": to_dict(data[0])})
    return folder


def test_the_script_exports_and_predicts_the_same(folder, data):
    printed = run(folder, "final_train.py", "--export", "onnx", "--int8", "--load", "best.pt")
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
        run(folder, "final_train.py", "--predict", pictures, "--load", name, "--out", f"seen_{name}")
        assert len(list((folder / f"seen_{name}").glob("*.jpg"))) == 8
        found.append(json.loads((folder / f"seen_{name}" / "detections.json").read_text()))
    assert len(found[0]) == len(found[1]) > 100 and {d["category_id"] for d in found[1]} == {1, 7, 9}
    for mine, theirs in zip(*(sorted(f, key=lambda d: (d["image_id"], d["score"])) for f in found), strict=True):
        assert mine["image_id"] == theirs["image_id"] and abs(mine["score"] - theirs["score"]) < 2e-5


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["--int8"], "--no-nms and --int8 go with --export"),
        (["--eval-only", "--load", "detector.onnx"], r"detector\.onnx: an exported detector; expected .*best\.pt"),
        (["--predict", "best.pt", "--load", "missing.onnx"], r"missing\.onnx: no such file"),
    ],
)
def test_mistakes_are_named(folder, arguments, pattern, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=pattern) as caught:
        final_train.main(arguments)
    assert "\n" not in str(caught.value)
