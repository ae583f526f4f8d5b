from __future__ import annotations

import json
import sys

import pytest
import torch

from lib.errors import UserError
from lib.export import open_session, read_metadata, require, unpad


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
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    with pytest.raises(UserError, match=r"missing\.onnx: no such file"):
        open_session(tmp_path / "missing.onnx")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no graph")
    with pytest.raises(UserError, match=r"broken\.onnx: onnxruntime cannot read it"):
        open_session(broken)
    text = '<ir_version: 8, opset_import: ["": 18]> other (float[N] x) => (float[N] y) { y = Identity (x) }'
    other = tmp_path / "other.onnx"
    onnx.save(onnx.parser.parse_model(text), other)
    with pytest.raises(UserError, match=r"other\.onnx: not a detector"):
        read_metadata(open_session(other), other)
