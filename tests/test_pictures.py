from __future__ import annotations

import contextlib
import io

import pytest
import torch
from pycocotools.coco import COCO
from torchvision.io import decode_image, read_file, write_png

from lib.errors import UserError
from lib.images import find_pictures, write_picture
from lib.inference import SMALLEST_TEXT, class_colours, coco_results, draw
from lib.postprocess import Detections

FOUND = Detections(
    torch.tensor([[0.1, 0.1, 0.5, 0.9], [0.6, 0.1, 0.9, 0.4]]), torch.tensor([0.9, 0.3]), torch.tensor([2, 1])
)


@pytest.fixture
def folder(tmp_path):
    for name in ("b.png", "a.png", "sub/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_png(torch.zeros(3, 8, 8, dtype=torch.uint8), str(tmp_path / name))
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def test_files_folders_and_globs_are_found_once_and_in_order(folder):
    names = ["a.png", "b.png"]
    assert [p.name for p in find_pictures([str(folder)])] == names
    assert [p.name for p in find_pictures([str(folder / "*.png"), str(folder / "a.png"), str(folder)])] == names
    assert [p.name for p in find_pictures([str(folder / "**" / "*.png")])] == [*names, "c.png"]


@pytest.mark.parametrize("pattern", ["missing.jpg", "empty", "*.webp"])
def test_what_matches_nothing_is_named(folder, pattern):
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match="no picture here") as caught:
        find_pictures([str(folder / "a.png"), str(folder / pattern)])
    assert pattern in str(caught.value)


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


@pytest.mark.parametrize("side", [100, 400, 2000])
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


def test_a_picture_is_written_into_a_new_folder(tmp_path):
    image = torch.full((3, 16, 24), 100, dtype=torch.uint8)
    write_picture(image, tmp_path / "new" / "x.jpg")
    again = decode_image(read_file(str(tmp_path / "new" / "x.jpg")))
    assert again.shape == image.shape and (again.int() - 100).abs().max() <= 2


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
