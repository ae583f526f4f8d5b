from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.ops import box_iou

from lib.config import PostprocessConfig
from lib.export import (
    DETECTIONS,
    PRIORS,
    add_nms,
    export_graph,
    open_session,
    read_metadata,
    run_session,
    unpad,
    with_every_output,
)
from lib.genotype import Genotype
from lib.postprocess import class_scores, postprocess
from lib.priors import decode

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

SIZE = 64
VARIANTS = {
    "focal": {},
    "multibox, mbv2": {"loss__type": "multibox", "backbone__backbone_type": "mbv2_backbone"},
}
MBV2 = {
    "search_space__num_cell_groups": [1, 2, 2, 2, 2, 2, 2],
    "search_space__expansions": [1, 6, 6, 6, 6, 6, 6],
    "head__predictor": "plain",
}


@pytest.fixture(scope="module", params=VARIANTS)
def exported(request, tiny_trained):
    """A detector and its graph without NMS."""
    changes = VARIANTS[request.param]
    detector = tiny_trained(**changes, **(MBV2 if "backbone__backbone_type" in changes else {}))
    return detector, export_graph(detector, nms=False)


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
    scores, boxes = run_session(open_session(graph.SerializeToString()), images, PRIORS)
    logits, offsets, _ = expected(detector, images)
    assert scores.shape == (batch, 84, 3) and boxes.shape == (batch, 84, 4)
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
    outputs = run_session(open_session(add_nms(graph, config).SerializeToString()), images, DETECTIONS)
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


@settings(max_examples=60)
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
    metadata = read_metadata(session, "detector.onnx")
    assert metadata["classes"] == ["cat", "dog", "eel"] and metadata["category_ids"] == [1, 7, 9]
    assert Genotype.from_dict(metadata["genotype"]) == detector.genotype
    assert metadata["image_size"] == SIZE and metadata["epoch"] == 5
    assert PostprocessConfig(**metadata["postprocess"]) == detector.config.postprocess
    (images,) = session.get_inputs()
    assert (images.name, images.type, images.shape) == ("images", "tensor(uint8)", ["batch", 3, SIZE, SIZE])
    shapes = {output.name: output.shape for output in session.get_outputs()}
    assert shapes == {"boxes": ["batch", 200, 4], "scores": ["batch", 200], "labels": ["batch", 200]}
    assert b".py" not in graph.SerializeToString()  # no trace of whose files it was made from


def test_every_output_of_either_variant(exported):
    detector, raw = exported
    config = detector.config.postprocess
    images = pictures(2)
    results = []
    for graph in (raw, add_nms(raw, config)):
        before = graph.SerializeToString()
        session = open_session(with_every_output(graph, config).SerializeToString())
        results.append(run_session(session, images, [*DETECTIONS, *PRIORS]))
        assert graph.SerializeToString() == before
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
