from __future__ import annotations

import pytest
import torch
from tiny_data import write_picture
from torchvision.io import decode_image, read_file

from lib.detector import load_detector
from lib.errors import UserError
from lib.export import add_nms, export_graph
from lib.images import UnreadableImage
from lib.inference import load
from lib.postprocess import postprocess
from lib.transforms import eval_transform


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "photo.jpg"
    write_picture(path, 120, 90)
    return path


@pytest.fixture(scope="module")
def exported(tiny_checkpoint, tmp_path_factory):
    """The paths of an exported detector, with and without NMS."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    folder, detector = tmp_path_factory.mktemp("exported"), load_detector(tiny_checkpoint)
    raw = export_graph(detector, nms=False)
    onnx.save(raw, folder / "detector_raw.onnx")
    onnx.save(add_nms(raw, detector.config.postprocess), folder / "detector.onnx")
    return folder


def test_a_picture_gives_boxes_in_its_pixels_scores_and_names(tiny_checkpoint, picture):
    boxes, scores, names = load(tiny_checkpoint)(picture)
    assert len(boxes) == len(scores) == len(names) > 5 and set(names) <= {"cat", "dog", "eel"}
    assert boxes[:, 0::2].max() <= 120 and boxes[:, 1::2].max() <= 90 and boxes[:, 2].max() > 90
    # step by step, from the parts
    detector = load_detector(tiny_checkpoint)
    image = decode_image(read_file(str(picture)))
    small, *_ = eval_transform(64)(image, torch.zeros(0, 4), torch.zeros(0))
    with torch.no_grad():
        logits, offsets = detector.model(small[None])
    arguments = (detector.config.postprocess, detector.config.loss.type, detector.config.head.variances)
    (found,) = postprocess(logits, offsets, detector.model.priors, *arguments)
    torch.testing.assert_close(boxes, found.boxes * torch.tensor([120.0, 90.0, 120.0, 90.0]))
    torch.testing.assert_close(scores, found.scores)
    assert names == [detector.classes[k - 1] for k in found.labels]


def test_a_folder_a_string_and_a_tensor_do_as_well(tiny_checkpoint, picture):
    detector = load(str(tiny_checkpoint.parent), device="cpu")
    image = decode_image(read_file(str(picture)))
    for one, other in zip(detector(str(picture)), detector(image), strict=True):
        assert one == other if isinstance(one, list) else torch.equal(one, other)


def test_an_exported_file_gives_the_same(tiny_checkpoint, exported, picture):
    theirs, mine = load(tiny_checkpoint)(picture), load(exported / "detector.onnx")(picture)
    assert len(mine.scores) == len(theirs.scores)
    torch.testing.assert_close(mine.scores, theirs.scores, rtol=0, atol=1e-5)
    same = (mine.boxes - theirs.boxes).abs().amax(1) < 1e-2  # equal scores may change places
    assert same.float().mean() > 0.95
    assert [a for a, s in zip(mine.names, same, strict=True) if s] == [
        b for b, s in zip(theirs.names, same, strict=True) if s
    ]
    assert load(exported / "detector.onnx").category_ids == (1, 7, 9)


def test_a_file_without_nms_is_refused(exported):
    with pytest.raises(UserError, match=r"detector_raw\.onnx: was exported with --no-nms"):
        load(exported / "detector_raw.onnx")


def test_what_cannot_be_read_is_named(tiny_checkpoint, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no picture")
    with pytest.raises(UnreadableImage, match=r"bad\.jpg"):
        load(tiny_checkpoint)(bad)
    with pytest.raises(UserError, match=r"none\.pt: no such checkpoint"):
        load(tmp_path / "none.pt")
