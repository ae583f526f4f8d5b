from __future__ import annotations

from collections import Counter

import pytest
import torch

from lib.export import PRIORS, export_graph, open_session, quantize, read_metadata, run_session

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


@pytest.fixture(scope="module")
def graphs(tiny_trained):
    """A graph without NMS, and in int8."""
    graph = export_graph(tiny_trained(), nms=False)
    before = graph.SerializeToString()
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, 256, (4, 3, 64, 64), generator=generator).to(torch.uint8) for _ in range(2)]
    quantized = quantize(graph, batches)
    assert graph.SerializeToString() == before
    return graph, quantized, batches[0]


def test_int8_is_near_float_and_not_float(graphs):
    exact, small, images = graphs
    outputs = [run_session(open_session(g.SerializeToString()), images, PRIORS) for g in (exact, small)]
    for a, b in zip(*outputs, strict=True):
        assert 0 < (a - b).abs().mean() < 0.05
        assert torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1] > 0.9


def test_convolutions_alone_are_quantised(graphs):
    exact, small, _ = graphs
    producers = {name: node for node in small.graph.node for name in node.output}
    for node in small.graph.node:
        inputs = [producers[name].op_type for name in node.input if name in producers]
        if node.op_type == "Conv":
            assert inputs[:2] == ["DequantizeLinear"] * 2
    counts = [Counter(node.op_type for node in graph.graph.node) for graph in (exact, small)]
    fused = {"Relu", "Clip", "QuantizeLinear", "DequantizeLinear"}  # what the range of an activation stands for
    assert all(counts[0][name] == counts[1][name] for name in counts[0].keys() | counts[1].keys() if name not in fused)


def test_the_weights_take_a_byte_each(graphs):
    exact, small, _ = graphs
    types = {initializer.name: initializer.data_type for initializer in small.graph.initializer}
    stored = [name for node in small.graph.node if node.op_type == "DequantizeLinear" for name in node.input[:1]]
    convolutions = sum(node.op_type == "Conv" for node in exact.graph.node)
    assert [types[name] for name in stored if name in types].count(onnx.TensorProto.INT8) == convolutions


def test_the_metadata_stay(graphs):
    a, b = (read_metadata(open_session(g.SerializeToString()), "x") for g in graphs[:2])
    assert a == b
