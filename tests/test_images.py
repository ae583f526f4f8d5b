from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_data import write_voc
from torchvision.io import write_jpeg

from lib import datasets
from lib import images as images_file
from lib.annotations import read_voc
from lib.config import AugmentConfig
from lib.datasets import DetectionDataset
from lib.images import UnreadableImage, read_reduced_jpeg
from lib.transforms import TrainTransform


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
