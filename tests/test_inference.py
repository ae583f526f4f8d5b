from __future__ import annotations

import contextlib
import io
import json

import pytest
import torch
from pycocotools.coco import COCO
from tiny_data import write_picture

from lib.detector import load_detector
from lib.errors import UserError
from lib.export import add_nms
from lib.images import UnreadableImage, read_picture
from lib.inference import SMALLEST_TEXT, class_colours, coco_results, draw, draw_pictures, load
from lib.postprocess import Detections, postprocess
from lib.transforms import EvalTransform

FOUND = Detections(
    torch.tensor([[0.1, 0.1, 0.5, 0.9], [0.6, 0.1, 0.9, 0.4]]), torch.tensor([0.9, 0.3]), torch.tensor([2, 1])
)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "photo.jpg"
    write_picture(path, 120, 90)
    return path


@pytest.fixture(scope="module")
def exported(tiny_trained, tiny_graph, tmp_path_factory):
    """A folder with an exported detector, with and without NMS."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    folder = tmp_path_factory.mktemp("exported")
    onnx.save(tiny_graph, folder / "detector_raw.onnx")
    onnx.save(add_nms(tiny_graph, tiny_trained().config.postprocess), folder / "detector.onnx")
    return folder


def test_a_picture_gives_boxes_in_its_pixels_scores_and_names(tiny_checkpoint, picture):
    boxes, scores, names = load(tiny_checkpoint)(picture)
    assert len(boxes) == len(scores) == len(names) > 5 and set(names) <= {"cat", "dog", "eel"}
    assert boxes[:, 0::2].max() <= 120 and boxes[:, 1::2].max() <= 90 and boxes[:, 2].max() > 90
    # step by step, from the parts
    detector = load_detector(tiny_checkpoint)
    image = read_picture(str(picture))
    small, *_ = EvalTransform(64)(image, torch.zeros(0, 4), torch.zeros(0))
    with torch.no_grad():
        logits, offsets = detector.model(small[None])
    arguments = (detector.config.postprocess, detector.config.loss.type, detector.config.head.variances)
    (found,) = postprocess(logits, offsets, detector.model.priors, *arguments)
    torch.testing.assert_close(boxes, found.boxes * torch.tensor([120.0, 90.0, 120.0, 90.0]))
    torch.testing.assert_close(scores, found.scores)
    assert names == [detector.classes[k - 1] for k in found.labels]


def test_a_folder_a_string_and_a_tensor_do_as_well(tiny_checkpoint, picture):
    detector = load(str(tiny_checkpoint.parent), device="cpu")
    image = read_picture(str(picture))
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


def test_pictures_are_drawn_and_their_detections_written(tiny_checkpoint, picture, tmp_path, capsys):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no picture")
    detector = load(tiny_checkpoint)
    draw_pictures(detector, [bad, picture], tmp_path / "out", 0.1)
    printed = capsys.readouterr()
    assert "bad.jpg" in printed.out + printed.err and "wrote 1 pictures" in printed.out
    assert read_picture(str(tmp_path / "out" / "photo.jpg")).shape == read_picture(str(picture)).shape
    results = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert len(results) == len(detector(picture).scores) and {r["category_id"] for r in results} <= {1, 7, 9}
    assert {r["image_id"] for r in results} == {"photo"}


@pytest.mark.parametrize("count", [1, 2, 5, 20, 80])
def test_every_class_has_its_colour(count):
    colours = class_colours(count)
    assert len(set(colours)) == count and all(0 <= c <= 255 for colour in colours for c in colour)


def test_drawing_leaves_the_picture_alone_and_shows_what_is_above_the_threshold():
    image = torch.full((3, 240, 320), 40, dtype=torch.uint8)
    before = image.clone()
    some, all_of_them = draw(image, FOUND, ["cat", "dog"], 0.4), draw(image, FOUND, ["cat", "dog"], 0.2)
    assert torch.equal(image, before) and some.shape == image.shape and some.dtype == torch.uint8
    right = slice(180, 300)  # where the second box is
    assert torch.equal(some[:, :100, right], image[:, :100, right])
    assert not torch.equal(all_of_them[:, :100, right], image[:, :100, right])
    cat, dog = (torch.tensor(colour, dtype=torch.uint8) for colour in class_colours(2))
    assert torch.equal(some[:, 160, 32], dog) and torch.equal(all_of_them[:, 80, 192], cat)


@pytest.mark.parametrize("side", [100, 400, 1200])
@pytest.mark.parametrize("top", [0.0, 0.5])
@pytest.mark.parametrize("left", [0.0, 0.9])
def test_a_label_is_whole_within_the_picture_and_grows_with_it(side, top, left):
    """Were it cut off, it would have fewer pixels than where there is room."""

    def label(x, y):
        """Number of pixels of the label's own, none of them the box's: fill, letters and what blends between."""
        one = Detections(torch.tensor([[x, y, x + 0.1, y + 0.3]]), torch.tensor([0.9]), torch.tensor([2]))
        drawn = draw(torch.full((3, side, side), 9, dtype=torch.uint8), one, ["cat", "dog"], 0.4)
        changed = (drawn != 9).any(0)
        rows = changed.sum(1) > 0.12 * side  # wider than the box
        return int(changed[rows].sum()), int(rows.sum())

    (pixels, rows), (expected, height) = label(left, top), label(0.3, 0.5)
    assert rows == pytest.approx(height, abs=1 + side // 150) and pixels == pytest.approx(expected, rel=0.1)
    assert rows >= max(SMALLEST_TEXT, side // 28)


def test_a_label_is_read_on_bright_and_dark_colours():
    image = torch.full((3, 200, 200), 90, dtype=torch.uint8)
    for count in (1, 3):
        names, palette = [f"class {i}" for i in range(count)], class_colours(count)
        for k, colour in enumerate(palette, start=1):
            one = Detections(torch.tensor([[0.1, 0.5, 0.9, 0.9]]), torch.tensor([0.9]), torch.tensor([k]))
            drawn = draw(image, one, names, 0.5)
            dark, bright = (drawn < 40).all(0).sum(), (drawn > 215).all(0).sum()
            light_label = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 128
            assert (dark if light_label else bright) > 20 and (bright if light_label else dark) == 0


def test_drawing_nothing_is_the_picture():
    image = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    assert torch.equal(draw(image, FOUND, ["cat", "dog"], 0.95), image)


def test_pycocotools_reads_the_results():
    boxes = FOUND.boxes * torch.tensor([80.0, 60, 80, 60])
    results = coco_results("dog_1", boxes, FOUND.scores, [18, 17])
    truth = COCO()
    truth.dataset = {
        "images": [{"id": "dog_1"}],
        "categories": [{"id": 17}, {"id": 18}],
        "annotations": [],
        "info": {},
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        loaded = truth.loadRes(results)
    annotations = loaded.loadAnns(loaded.getAnnIds(imgIds=["dog_1"]))
    assert [a["category_id"] for a in annotations] == [18, 17]
    assert annotations[0]["bbox"] == pytest.approx([8, 6, 32, 48]) and annotations[0]["area"] == pytest.approx(32 * 48)
    assert annotations[0]["score"] == pytest.approx(0.9, abs=1e-5)
