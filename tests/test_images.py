from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_data import write_voc
from torchvision.io import write_jpeg, write_png

from lib import datasets
from lib import images as images_file
from lib.annotations import read_voc
from lib.config import AugmentConfig
from lib.datasets import DetectionDataset
from lib.errors import UserError
from lib.images import SUFFIXES, UnreadableImage, find_pictures, read_picture, read_reduced_jpeg, write_picture
from lib.transforms import TrainTransform


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
    with pytest.raises(UserError, match="no picture found") as caught:
        find_pictures([str(folder / "a.png"), str(folder / pattern)])
    assert pattern in str(caught.value)


def test_a_picture_is_written_into_a_new_folder(tmp_path):
    image = torch.full((3, 16, 24), 100, dtype=torch.uint8)
    write_picture(image, tmp_path / "new" / "x.jpg")
    again = read_picture(str(tmp_path / "new" / "x.jpg"))
    assert again.shape == image.shape and (again.int() - 100).abs().max() <= 2


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_suffix_that_is_looked_for_can_be_read(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    Image.new("RGB", (9, 8), (200, 100, 50)).save(path)
    assert find_pictures([str(tmp_path)]) == [path]
    image = read_picture(str(path))
    assert image.shape == (3, 8, 9) and (image[:, 4, 4].int() - torch.tensor([200, 100, 50])).abs().max() <= 4


def test_the_reason_is_named_without_a_place_in_the_source(tmp_path):
    (tmp_path / "empty.jpg").touch()
    for name, reason in (("empty.jpg", "Expected a non empty file"), ("none.jpg", r"\[Errno 2\] No such file")):
        with pytest.raises(UnreadableImage, match=rf"{name}: cannot be read: {reason}"):
            read_picture(str(tmp_path / name))


@pytest.fixture
def photos(tmp_path):
    """Smooth pictures far larger than what is trained on."""
    write_voc(tmp_path, {"p": [("cat", 11, 21, 200, 150), ("dog", 151, 91, 390, 290)]}, size=(400, 300))
    y, x = torch.meshgrid(torch.linspace(0, 3, 300), torch.linspace(0, 5, 400), indexing="ij")
    smooth = torch.stack([x.sin(), y.cos(), (x + y).sin()])
    write_jpeg((127 + 120 * smooth).to(torch.uint8), str(tmp_path / "JPEGImages" / "p.jpg"), quality=95)
    return read_voc(tmp_path, ["trainval"], ["cat", "dog"])


def test_a_large_jpeg_is_decoded_as_small_as_training_shows_it(photos, monkeypatch):
    transform = TrainTransform(32, AugmentConfig(distort=0))
    whole = DetectionDataset(photos, [0], transform, cache=True)
    reduced = DetectionDataset(photos, [0], transform)
    sizes, off, original = [], [], datasets.read_reduced_jpeg
    monkeypatch.setattr(datasets, "read_reduced_jpeg", lambda *a: sizes.append(a[-1]) or original(*a))
    monkeypatch.setattr(images_file, "LARGE_PICTURE", 400 * 300)
    for epoch in range(40):
        (image, boxes, labels, row), expected = reduced[epoch, 0], whole[epoch, 0]
        assert torch.equal(labels, expected[2]) and row == 0 and image.dtype == torch.uint8
        torch.testing.assert_close(boxes, expected[1], atol=1.5 / 32, rtol=0)  # edges lie on whole pixels
        off.append((image.float() - expected[0].float()).abs().mean().item())
    assert max(off) < 10 and sum(off) / len(off) < 2  # one pixel of 32 is some 20 levels here
    assert len(sizes) == 40 and {4, 8} <= set(sizes) <= {1, 2, 4, 8}
    monkeypatch.setattr(images_file, "LARGE_PICTURE", 400 * 300 + 1)
    assert torch.equal(reduced[0, 0][0], whole[0, 0][0]) and len(sizes) == 40


def test_a_reduced_jpeg_has_the_size_that_was_asked_for(photos):
    path = photos.paths[0]
    for by, shape in ((1, (3, 300, 400)), (2, (3, 150, 200)), (4, (3, 75, 100)), (8, (3, 38, 50))):
        assert read_reduced_jpeg(path, 400, 300, by).shape == shape
    with pytest.raises(UnreadableImage, match="is not a JPEG of 300 x 400 pixels"):
        read_reduced_jpeg(path, 300, 400, 2)


def test_a_broken_large_jpeg_is_named_as_any_other(photos, monkeypatch):
    monkeypatch.setattr(images_file, "LARGE_PICTURE", 0)
    Path(photos.paths[0]).write_bytes(Path(photos.paths[0]).read_bytes()[:100])
    dataset = DetectionDataset(photos, [0], TrainTransform(32))
    for epoch in range(10):
        with pytest.raises(UnreadableImage, match=r"p\.jpg: cannot be read"):
            dataset[epoch, 0]
