"""Files of OpenVINO and LiteRT: the gate, what they find beside torch, the samples of docs/, exports without data."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.ops import batched_nms

import final_train
from lib import UserError, checkpoint, export
from lib.annotations import without_objects
from lib.config import PostprocessConfig
from lib.config_io import to_dict
from lib.converters import open_exported, require, save_litert, save_openvino
from lib.detector import SSD
from lib.export import write
from lib.head import Predictors
from lib.images import read_picture, write_picture
from lib.inference import load
from lib.labels import Faults
from lib.postprocess import add_nms, postprocess, suppress
from lib.transforms import EvalTransform

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
DOCS = Path(__file__).parent.parent / "docs/flags.md"
needs_openvino = pytest.mark.skipif(not importlib.util.find_spec("openvino"), reason="openvino is not installed")
needs_litert = pytest.mark.skipif(not importlib.util.find_spec("litert_torch"), reason="litert-torch is not installed")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(3):
        noise = torch.randint(0, 256, (3, 70, 90), generator=torch.Generator().manual_seed(i)).to(torch.uint8)
        write_picture(noise, folder / f"{i}.jpg")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def detector(tiny_trained, tiny_config):
    return tiny_trained()._replace(config=tiny_config(data__workers=0))


@pytest.fixture(scope="module")
def unlabelled(detector, pictures):
    """Pictures as a test set."""
    return without_objects(pictures, detector.classes, Faults())


@pytest.fixture(scope="module")
def graph(detector, tiny_graph):
    return add_nms(tiny_graph, detector.config.postprocess)


def seen_by_torch(detector, picture):
    """What the detector finds in a picture, from the parts."""
    small, *_ = EvalTransform(detector.model.image_size)(read_picture(str(picture)), torch.zeros(0, 4), torch.zeros(0))
    config, priors = detector.config, detector.model.priors
    with torch.no_grad():
        logits, offsets = detector.model(small[None])
    return postprocess(logits, offsets, priors, config.postprocess, config.loss.type, config.head.variances)[0]


def assert_finds_the_same(file, detector, picture):
    found, reference = load(file), seen_by_torch(detector, picture)
    assert found.classes == detector.classes and found.category_ids == detector.category_ids
    assert found.threshold == detector.thresholds[0] and found.image_size == detector.model.image_size
    boxes, scores, names = found(picture)
    torch.testing.assert_close(scores, reference.scores, rtol=0, atol=1e-5)
    near = (boxes / torch.tensor([90, 70, 90, 70]) - reference.boxes).abs().amax(1) < 1e-4
    same = near & torch.tensor(
        [detector.classes[k - 1] == name for k, name in zip(reference.labels, names, strict=True)]
    )
    assert len(scores) > 20 and same.float().mean() > 0.95  # equal scores may change places


@needs_openvino
@pytest.mark.parametrize("name", ["detector.xml", "detector_raw.xml"])
def test_an_openvino_file_passes_the_gate_and_finds_the_same(
    name, detector, graph, tiny_graph, unlabelled, pictures, tmp_path
):
    model = tiny_graph if "raw" in name else graph
    report = write(model, tmp_path / name, detector, unlabelled, save=save_openvino)
    assert {p.suffix for p in tmp_path.iterdir()} == {".xml", ".bin"}
    assert report["bytes"] == sum(p.stat().st_size for p in tmp_path.iterdir()) and report["images"] == 3
    assert max(report[name] for name in export.DIFFERENCES) < 1e-5
    assert_finds_the_same(tmp_path / name, detector, pictures[0])


@needs_openvino
def test_half_is_smaller_and_not_gated(detector, graph, unlabelled, tmp_path):
    path, save = tmp_path / "detector_half.xml", partial(save_openvino, half=True)
    report = write(graph, path, detector, unlabelled, float("nan"), save)
    weights = sum(p.numel() for p in detector.model.parameters())
    assert path.with_suffix(".bin").stat().st_size < 3 * weights
    assert 1e-5 < report["score_difference"] < 0.05
    with pytest.raises(UserError, match="not written, since its score difference"):
        write(graph, tmp_path / "other.xml", detector, unlabelled, save=save)
    assert {p.name for p in tmp_path.iterdir()} == {"detector_half.xml", "detector_half.bin"}


@needs_openvino
@pytest.mark.parametrize("content", ["<net/>", "no network", "strange"])
def test_an_openvino_file_that_is_none_of_ours_is_named(content, tmp_path):
    path = tmp_path / "detector.xml"
    path.write_text(content)
    if content == "strange":
        text = '<ir_version: 8, opset_import: ["": 18]> g (float[N] x) => (float[N] y) { y = Relu (x) }'
        save_openvino(onnx.parser.parse_model(text), path)
    with pytest.raises(UserError, match=r"detector\.xml: (OpenVINO cannot read it|not a detector)") as caught:
        load(path)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def litert(detector, pictures, unlabelled, tmp_path_factory):
    """A detector of one convolution and its file: the converter takes a minute for a whole one."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 16, 16, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
    predictors = Predictors([8], [4], num_classes=3, kinds=["plain"])
    for net in (predictors.classes, predictors.boxes):
        nn.init.normal_(net[0][0].weight, std=0.5)
    model = SSD(64, detector.model.normalize, [backbone], [], predictors, detector.model.priors[:64]).eval()
    small = detector._replace(model=model)
    path = tmp_path_factory.mktemp("litert") / "detector_raw.tflite"
    with pytest.MonkeyPatch.context() as patch:  # it has no place in the supernet
        patch.setattr(export, "elastic_view", lambda detector: lambda images, genotype: detector.model(images))
        return small, path, write(small, path, small, unlabelled, save=save_litert)


@needs_litert
def test_a_litert_file_passes_the_gate_and_finds_the_same(litert, pictures):
    detector, path, report = litert
    assert [p.name for p in path.parent.iterdir()] == [path.name] and report["bytes"] == path.stat().st_size
    assert max(report[name] for name in export.DIFFERENCES) < 1e-5
    assert_finds_the_same(path, detector, pictures[0])


@needs_litert
def test_a_litert_file_that_is_none_of_ours_is_named(litert, tmp_path):
    whole = litert[1].read_bytes()
    for content in (b"no network", whole[: len(whole) // 2], whole[:9] + bytes(99) + whole[108:]):
        (tmp_path / "detector.tflite").write_bytes(content)
        with pytest.raises(UserError, match=r"detector\.tflite: LiteRT cannot read it"):
            load(tmp_path / "detector.tflite")


def sample(word):
    """The Python of the block of docs/flags.md that imports `word`."""
    blocks = re.findall(r"^  ```python\n(.*?)^  ```", DOCS.read_text(), re.MULTILINE | re.DOTALL)
    (block,) = (block for block in blocks if word in block)
    return re.sub("^  ", "", block, flags=re.MULTILINE)


@needs_openvino
def test_the_openvino_sample_of_the_docs_runs(detector, graph, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(pictures[0], "photo.jpg")
    save_openvino(graph, Path("detector.xml"))
    names = {}
    exec(sample("import openvino"), names)
    boxes, scores, _ = load("detector.xml")("photo.jpg")
    assert len(names["scores"]) == (scores >= 0.4).sum() > 0
    assert abs(names["boxes"][0] - boxes[0].numpy()).max() < 0.5 and abs(names["scores"][0] - float(scores[0])) < 0.01


@needs_litert
def test_the_litert_sample_of_the_docs_runs(litert, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(pictures[0], "photo.jpg")
    shutil.copy(litert[1], "detector_raw.tflite")
    names = {}
    exec(sample("ai_edge_litert"), names)
    boxes, scores, _ = load("detector_raw.tflite")("photo.jpg")
    assert abs(names["box"] - boxes[0].numpy()).max() < 0.5 and abs(names["score"] - float(scores[0])) < 0.01


@pytest.mark.parametrize("seed", range(3))
def test_suppress_is_torchvisions_nms_of_each_class(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(2, 60, 3, generator=generator)
    corner, side = torch.rand(2, 60, 2, generator=generator), torch.rand(2, 60, 2, generator=generator) / 3
    boxes = torch.cat((corner, corner + side), -1)
    rules = PostprocessConfig(confidence_threshold=0.3, nms_threshold=0.4, pre_nms_top_k=60, top_k=25)
    for found, s, b in zip(suppress(scores, boxes, rules), scores, boxes, strict=True):
        prior, label = (s > 0.3).nonzero().T
        keep = batched_nms(b[prior].double(), s[prior, label].double(), label, 0.4)[:25]
        assert torch.equal(found.scores, s[prior, label][keep]) and torch.equal(found.labels, label[keep] + 1)
        assert torch.equal(found.boxes, b[prior][keep])


def test_missing_packages_are_named_with_the_command(monkeypatch):
    with pytest.raises(UserError, match=r"packages that are missing; pip install not-here also-missing$"):
        require("json", "not_here.part", "also_missing")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("litert") else True)
    with pytest.raises(UserError, match=r"pip install litert-torch$"):
        final_train.main(["--export", "litert", "--load", "best.pt"])


def test_without_data_outputs_are_compared_and_ap_is_left_out(
    detector, graph, tiny_checkpoint, pictures, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    config = to_dict(detector.config)
    config["data"] |= {"root": str(tmp_path / "gone"), "dataset_type": "voc"}
    checkpoint.save(tmp_path / "best.pt", {**checkpoint.read(tiny_checkpoint), "config": config})
    monkeypatch.setattr(export, "export_graph", lambda detector, nms: graph)
    final_train.main(["--export", "onnx", "--int8", "--calibrate", str(pictures[0].parent), "--load", "best.pt"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all("on 3 pictures; without objects, no AP" in line for line in lines)
    exact, small = json.loads(Path("export.json").read_text()).values()
    assert exact["AP"] is exact["AP_torch"] is small["AP"] is None
    assert exact["score_difference"] < 1e-5 < small["score_difference"]
    assert open_exported(Path("detector_int8.onnx"))[0].classes == ["cat", "dog", "eel"]
    # No newer than opset 18 needs, which onnxruntime 1.14 was the first to read.
    for name in ("detector.onnx", "detector_int8.onnx"):
        written = onnx.load(name)
        assert written.ir_version == 8
        assert [(entry.domain, entry.version) for entry in written.opset_import] == [("", 18)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--calibrate", "x.jpg"], "--calibrate: goes with --export"),
        (["--export", "onnx", "--half"], "--half: goes with --export openvino"),
        (["--export", "litert", "--int8"], "--int8: goes with --export onnx or openvino"),
    ],
)
def test_flags_that_do_not_go_together(arguments, words):
    with pytest.raises(UserError, match=words):
        final_train.main(arguments)
