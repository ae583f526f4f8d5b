import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from tiny_data import read_voc
from torchvision.ops import masks_to_boxes

from lib import UserError, shapes
from lib.shapes import CLASSES, SHAPES, draw_picture, place, write_shapes


def hashes(root):
    return {
        file.relative_to(root).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(root.rglob("*"))
        if file.is_file()
    }


def test_the_same_seed_gives_the_same_files_and_another_seed_others(tmp_path):
    write_shapes(tmp_path / "a", 2, 1, seed=7)
    write_shapes(tmp_path / "b", 2, 1, seed=7)
    write_shapes(tmp_path / "c", 2, 1, seed=8)
    first, second, other = (hashes(tmp_path / name) for name in "abc")
    assert first == second
    pictures = [name for name in first if name.endswith(".jpg")]
    assert len(pictures) == 3
    assert len({first[name] for name in pictures} | {other[name] for name in pictures}) == 6


def test_more_pictures_leave_the_first_ones_as_they_were(tmp_path):
    write_shapes(tmp_path / "few", 2, 1, seed=0)
    write_shapes(tmp_path / "more", 3, 2, seed=0)
    few, more = hashes(tmp_path / "few"), hashes(tmp_path / "more")
    assert all(more[name] == few[name] for name in few if name.endswith((".jpg", ".xml")))


def test_its_annotations_are_read_without_a_fault(tmp_path):
    """Its two folders must not be one where the file system ignores case."""
    write_shapes(tmp_path, 8, 1, seed=0)
    voc = read_voc(tmp_path, ["trainval"], CLASSES)
    assert voc.classes == CLASSES and not voc.notes and len(voc) == 8 and len(voc.objects.boxes) > 8
    names = [path.name.lower() for path in tmp_path.iterdir()]
    assert len(names) == len(set(names))


def test_an_interrupted_writing_is_done_again(tmp_path, monkeypatch):
    write_shapes(tmp_path / "whole", 2, 2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        drawings = [draw_picture(np.random.default_rng(i)) for i in range(3)]

        def draw_three(rng):
            if not drawings:
                raise KeyboardInterrupt
            return drawings.pop()

        patch.setattr(shapes, "draw_picture", draw_three)
        write_shapes(tmp_path / "cut", 2, 2)
    write_shapes(tmp_path / "cut", 2, 2)
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")


def test_what_another_process_drew_meanwhile_is_kept(tmp_path, monkeypatch):
    """Of two that start at once, the second one gets the lock when the first has drawn everything."""
    first, both = tmp_path / "first", tmp_path / "both"
    write_shapes(first, 2, 1)

    def wait_for_the_first(file, wait):
        assert wait
        shutil.copytree(first, both, dirs_exist_ok=True)

    monkeypatch.setattr(shapes, "lock", wait_for_the_first)
    monkeypatch.setattr(shapes, "draw_picture", None)
    write_shapes(both, 2, 1)
    assert hashes(both) == hashes(first)


def test_what_is_there_is_kept_and_other_settings_rewrite_it(tmp_path):
    write_shapes(tmp_path, 3, 1)
    picture = tmp_path / "JPEGImages" / "trainval_00001.jpg"
    before = picture.stat().st_mtime_ns
    write_shapes(tmp_path, 3, 1)
    assert picture.stat().st_mtime_ns == before
    write_shapes(tmp_path, 2, 1, seed=1)
    assert {p.name for p in (tmp_path / "JPEGImages").iterdir()} == {
        "trainval_00001.jpg",
        "trainval_00002.jpg",
        "test_00001.jpg",
    }
    assert json.loads((tmp_path / shapes.MARKER).read_text())["seed"] == 1


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "JPEGImages").mkdir()
    (tmp_path / "JPEGImages" / "mine.jpg").write_text("precious")
    with pytest.raises(UserError, match=r"data\.root"):
        write_shapes(tmp_path, 1, 1)
    assert (tmp_path / "JPEGImages" / "mine.jpg").read_text() == "precious"


def test_a_folder_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/shapes: the built-in pictures cannot be written here: Not a directory"):
        write_shapes(tmp_path / "file" / "shapes", 1, 1)


@pytest.mark.parametrize("name", CLASSES)
def test_boxes_are_the_tight_boxes_of_the_masks(name):
    for seed in range(5):
        alpha, box = place(np.random.default_rng(seed), SHAPES[name], 40, (160, 200), [])
        x1, y1, x2, y2 = masks_to_boxes(torch.from_numpy(alpha >= 0.5)[None])[0].tolist()  # inclusive corners
        assert box == (x1, y1, x2 + 1, y2 + 1)
        assert 25 <= max(box[2] - box[0], box[3] - box[1]) <= 50


@pytest.fixture(scope="module")
def drawings():
    return [draw_picture(np.random.default_rng([3, i])) for i in range(80)]


def test_pictures_vary_as_promised(drawings):
    sizes = [pixels.shape[:2] for pixels, _ in drawings]
    counts = [len(objects) for _, objects in drawings]
    assert len(set(sizes)) > 50 and all(160 <= side <= 224 for size in sizes for side in size)
    assert {name for _, objects in drawings for name, _ in objects} == set(CLASSES)
    assert min(counts) == 0 and max(counts) > 2
    shares = []
    for (height, width), (_, objects) in zip(sizes, drawings, strict=True):
        for _, (x1, y1, x2, y2) in objects:
            assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
            shares.append(max(x2 - x1, y2 - y1) / min(height, width))
    assert 0.2 < min(shares) < 0.3 and 0.6 < max(shares) < 0.8


def test_colours_do_not_tell_the_classes(drawings):
    """The mean colour of each class's pixels lies near the mean of all, compared to the spread within a class."""
    colours = {name: [] for name in CLASSES}
    for pixels, objects in drawings:
        for name, (x1, y1, x2, y2) in objects:
            colours[name].append(pixels[(y1 + y2) // 2, (x1 + x2) // 2])
    means = np.array([np.mean(found, axis=0) for found in colours.values()])
    spread = np.mean([np.std(found, axis=0) for found in colours.values()])
    assert np.abs(means - means.mean(0)).max() < spread / 2
