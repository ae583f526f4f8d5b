from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_data import read_voc, write_voc

from lib import UserError, datasets
from lib.config import AugmentConfig, DataConfig
from lib.datasets import DetectionDataset
from lib.images import (
    FORMATS,
    SUFFIXES,
    TURN,
    UnreadableImage,
    find_pictures,
    is_signed,
    read_picture,
    read_size,
    write_picture,
)
from lib.transforms import EvalTransform, TrainTransform

LOSSLESS = {"png": {}, "webp": {"lossless": True, "exact": True}, "tiff": {}, "tif": {"compression": "tiff_lzw"}}
STORED_AS = {  # the reverse of TURN
    **TURN,
    6: Image.Transpose.ROTATE_90,
    8: Image.Transpose.ROTATE_270,
}


def colours(width: int = 24, height: int = 16) -> np.ndarray:
    """(H, W, 3) uint8 without any symmetry."""
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def as_tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def write_turned(path: Path, orientation: int, picture: Image.Image, **options) -> None:
    """A file that shows `picture`, stored as a camera that was held in another way stores it."""
    exif = Image.Exif()
    exif[0x112] = orientation
    stored = picture.transpose(STORED_AS[orientation]) if orientation in STORED_AS else picture
    stored.save(path, exif=exif, **options)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def write_png16(path: Path, values: np.ndarray, colour_type: int, *more: bytes) -> None:
    """A PNG of 16 bits from (H, W, C) values; Pillow writes only grey ones. `more` chunks stand before the pixels."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0))
    pixels = png_chunk(b"IDAT", zlib.compress(rows))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + pixels + png_chunk(b"IEND", b""))


@pytest.fixture
def folder(tmp_path):
    for name in ("b.png", "a.png", "sub/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
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


def test_suffixes_count_in_any_case_and_folders_are_no_pictures(tmp_path):
    names = sorted(f"{i}{suffix.upper()}" for i, suffix in enumerate(SUFFIXES))
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "folder.jpg" / "deeper").mkdir(parents=True)
    for pattern in (tmp_path, tmp_path / "*"):
        assert [path.name for path in find_pictures([str(pattern)])] == names
    with pytest.raises(UserError, match=r"folder\.jpg: no picture found .*searches its folders too"):
        find_pictures([str(tmp_path / "folder.jpg")])
    with pytest.raises(UserError, match=r"cannot be read \(File name too long\)"):
        find_pictures(["x" * 300])


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


@pytest.mark.parametrize("kind", [*LOSSLESS, "jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_is_read_as_shown_or_in_the_stored_frame_of_its_annotation(tmp_path, kind, orientation):
    path = tmp_path / f"x.{kind}"
    write_turned(path, orientation, Image.fromarray(colours()), **LOSSLESS.get(kind, {"quality": 95}))
    turned = orientation >= 5
    stored = (16, 24) if turned else (24, 16)
    assert read_size(str(path)) == read_size(str(path), stored) == (24, 16)
    for annotated in (None, (24, 16)):
        image = read_picture(str(path), annotated, note=pytest.fail)
        assert torch.equal(image, as_tensor(colours())) or (kind == "jpg" and image.shape == (3, 16, 24))
    notes = []
    if turned:
        image = read_picture(str(path), stored, note=notes.append)
        (note,) = notes
        assert "x." in note and "24 x 16" in note and "16 x 24" in note and f"orientation {orientation}" in note
        rows = np.asarray(Image.fromarray(colours()).transpose(STORED_AS[orientation]))
        assert torch.equal(image, as_tensor(rows)) or (kind == "jpg" and image.shape == (3, 24, 16))
    with pytest.raises(UnreadableImage, match=r"is 24 x 16 pixels, its annotation says 24 x 17"):
        read_picture(str(path), (24, 17))


def test_exif_behind_the_pixels_counts_and_damaged_exif_does_not(tmp_path):
    path = tmp_path / "x.png"
    Image.fromarray(colours()).save(path)
    exif = Image.Exif()
    exif[0x112] = 6
    content = path.read_bytes()
    path.write_bytes(content[:-12] + png_chunk(b"eXIf", exif.tobytes()[6:]) + content[-12:])
    assert read_size(str(path)) == (16, 24) and read_picture(str(path)).shape == (3, 24, 16)
    Image.fromarray(colours()).save(tmp_path / "plain.jpg")
    plain = read_picture(str(tmp_path / "plain.jpg"))
    for number in (0, 9, -1, 65535):
        exif[0x112] = number % 65536
        Image.fromarray(colours()).save(tmp_path / "y.jpg", exif=exif)
        assert torch.equal(read_picture(str(tmp_path / "y.jpg")), plain)
    warnings.simplefilter("ignore")  # Pillow's own
    for damaged in (b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0nonsense"):
        Image.fromarray(colours()).save(tmp_path / "y.jpg", exif=damaged)
        assert read_size(str(tmp_path / "y.jpg")) == (24, 16)
        assert torch.equal(read_picture(str(tmp_path / "y.jpg")), plain)


@pytest.mark.parametrize("colour_type, channels", [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_16_bits_are_scaled(tmp_path, colour_type, channels):
    path = tmp_path / "x.png"
    values = np.arange(256, dtype=np.uint16).reshape(16, 16, 1)
    opaque = np.full_like(values, 255)
    picture = {1: [values], 2: [values, opaque], 3: [values, 255 - values, values // 2]}
    picture[4] = [*picture[3], opaque]
    pixels = np.concatenate(picture[channels], axis=2)
    write_png16(path, pixels * 257, colour_type)
    shown = np.repeat(values, 3, axis=2) if channels < 3 else pixels[..., :3]
    assert torch.equal(read_picture(str(path)), as_tensor(shown.astype(np.uint8)))


def test_grey_of_16_bits_in_other_files(tmp_path):
    values = np.arange(256, dtype=np.uint16).reshape(16, 16)
    expected = as_tensor(np.repeat(values[..., None], 3, axis=2).astype(np.uint8))
    transparent = png_chunk(b"tRNS", struct.pack(">H", 5 * 257))
    write_png16(tmp_path / "key.png", values[..., None] * 257, 0, transparent)
    assert torch.equal(read_picture(str(tmp_path / "key.png")), torch.where(expected == 5, 255, expected))
    for photometric, stored in ((1, values * 257), (0, 65535 - values * 257)):
        Image.fromarray(stored).save(tmp_path / "x.tif", tiffinfo={262: photometric})
        assert torch.equal(read_picture(str(tmp_path / "x.tif")), expected)
    big = (values * 257).astype(">u2").tobytes()
    Image.frombytes("I;16B", (16, 16), big).save(tmp_path / "big.tif")
    assert torch.equal(read_picture(str(tmp_path / "big.tif")), expected)


def test_each_kind_of_pixel_is_right_or_refused(tmp_path):
    red = Image.new("RGB", (9, 8), (255, 0, 0))
    half = Image.new("RGBA", (9, 8), (255, 0, 0, 0))
    half.paste((255, 0, 0, 255), (0, 0, 4, 8))
    palette = red.quantize(4)
    for name, picture, left, right in (
        ("grey.png", red.convert("L"), 76, 76),
        ("bit.png", Image.new("1", (9, 8), 1), 255, 255),
        ("bit.tif", Image.new("1", (9, 8), 1), 255, 255),
        ("palette.png", palette, (255, 0, 0), (255, 0, 0)),
        ("palette.bmp", palette, (255, 0, 0), (255, 0, 0)),
        ("alpha.png", half, (255, 0, 0), 255),
        ("alpha.webp", half, (255, 0, 0), 255),
        ("alpha.tif", half, (255, 0, 0), 255),
        ("alpha.gif", half, (255, 0, 0), 255),
        ("greyalpha.png", half.convert("LA"), 76, 255),
        ("transparent.png", half.quantize(4), (255, 0, 0), 255),
        ("cmyk.jpg", Image.new("CMYK", (9, 8), (0, 255, 255, 0)), (255, 0, 0), (255, 0, 0)),
        ("cmyk.tif", Image.new("CMYK", (9, 8), (0, 255, 255, 0)), (255, 0, 0), (255, 0, 0)),
    ):
        lossless = {"lossless": True} if name.endswith("webp") else {}
        picture.save(tmp_path / name, **lossless)
        image = read_picture(str(tmp_path / name)).int()
        for x, colour in ((1, left), (7, right)):
            assert (image[:, 4, x] - torch.tensor(colour)).abs().max() <= 3, name
    for kind in ("F", "I", "LAB"):
        Image.new(kind, (9, 8)).save(tmp_path / "x.tif")
        with pytest.raises(UnreadableImage, match=rf"x\.tif: cannot be read: has {kind} pixels.*convert it to RGB"):
            read_picture(str(tmp_path / "x.tif"))


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tiff"])
def test_the_first_picture_of_an_animation_is_used_and_said(tmp_path, kind):
    path, notes = tmp_path / f"x.{kind}", []
    frames = [Image.new("RGB", (12, 8), colour) for colour in ("red", "blue", "lime")]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
    image = read_picture(str(path), note=notes.append)
    assert image.shape == (3, 8, 12) and (image[:, 4, 4].int() - torch.tensor([255, 0, 0])).abs().max() <= 4
    assert notes == [f"{path}: holds 3 pictures, the first is used"]


def test_the_preview_in_a_jpeg_is_no_animation(tmp_path):
    picture = Image.fromarray(colours())
    picture.save(tmp_path / "x.jpg", format="MPO", save_all=True, append_images=[picture.resize((8, 8))])
    assert read_picture(str(tmp_path / "x.jpg"), note=pytest.fail).shape == (3, 16, 24)


def test_a_picture_is_refused_by_its_size_before_it_is_decoded(tmp_path):
    path = tmp_path / "huge.png"
    head = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", head) + png_chunk(b"IDAT", zlib.compress(bytes(90))))
    limit = r"huge\.png: has 30000 x 30000 pixels, more than 100,000,000 \(data\.max_pixels\)"
    with pytest.raises(UnreadableImage, match=limit):
        read_picture(str(path))
    with pytest.raises(UnreadableImage, match=limit):
        read_size(str(path), max_pixels=100_000_000)
    assert read_size(str(path)) == (30_000, 30_000)
    Image.fromarray(colours()).save(path)
    assert read_picture(str(path), max_pixels=24 * 16).shape == (3, 16, 24)
    with pytest.raises(UnreadableImage, match="has 24 x 16 pixels, more than 383"):
        read_picture(str(path), max_pixels=24 * 16 - 1)


def test_the_reason_is_one_line_that_names_the_file(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("These are not\nthe pixels you are looking for.")
    (tmp_path / "folder.jpg").mkdir()
    for kind in LOSSLESS:
        Image.fromarray(colours()).save(tmp_path / f"cut.{kind}")
        content = (tmp_path / f"cut.{kind}").read_bytes()
        (tmp_path / f"cut.{kind}").write_bytes(content[: len(content) // 2])
    reasons = {"empty.jpg": "is empty", "text.jpg": "is not a picture", "folder.jpg": "Is a directory"}
    for name, reason in (reasons | {"none.jpg": "No such file"} | {f"cut.{kind}": "" for kind in LOSSLESS}).items():
        with pytest.raises(UnreadableImage, match=rf"{name}: cannot be read: {reason}") as caught:
            read_picture(str(tmp_path / name))
        assert "\n" not in str(caught.value) and len(str(caught.value)) < len(str(tmp_path)) + 200


def small_files() -> list[bytes]:
    """A picture of each format, some with EXIF data, some animated."""
    files = []
    picture, exif = Image.fromarray(colours()), Image.Exif()
    exif[0x112] = 6
    for kind in FORMATS:
        for options in ({}, {"exif": exif}, {"save_all": True, "append_images": [picture.rotate(180)]}):
            file = io.BytesIO()
            if kind not in ("BMP", "JPEG") or "save_all" not in options:
                picture.save(file, kind, **options)
                files.append(file.getvalue())
    return files


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), content=st.sampled_from(small_files()))
def test_no_file_whatever_gives_anything_but_a_picture_or_one_line(tmp_path, data, content):
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, min(len(changed) - 1, 200)) | st.integers(0, len(changed) - 1))
        changed[place] = data.draw(st.integers(0, 255))
    path = tmp_path / "x.jpg"
    path.write_bytes(changed[: data.draw(st.integers(0, len(changed)) | st.just(len(changed)))])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            width, height = read_size(str(path))
            image = read_picture(str(path), max_pixels=1_000_000, note=str)
            assert image.dtype == torch.uint8 and image.shape == (3, height, width) and image.numel()
        except UnreadableImage as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)


def test_a_signed_picture_is_known(tmp_path):
    image = torch.full((3, 16, 24), 100, dtype=torch.uint8)
    write_picture(image, tmp_path / "signed.jpg", signed=True)
    write_picture(image, tmp_path / "unsigned.jpg")
    (tmp_path / "empty.jpg").touch()
    assert [path.name for path in tmp_path.iterdir() if is_signed(path)] == ["signed.jpg"]
    assert not is_signed(tmp_path / "none.jpg")


@pytest.fixture
def photos(tmp_path):
    """Smooth pictures far larger than what is trained on."""
    write_voc(tmp_path, {"p": [("cat", 11, 21, 200, 150), ("dog", 151, 91, 390, 290)]}, size=(400, 300))
    y, x = torch.meshgrid(torch.linspace(0, 3, 300), torch.linspace(0, 5, 400), indexing="ij")
    smooth = torch.stack([x.sin(), y.cos(), (x + y).sin()])
    write_picture((127 + 120 * smooth).to(torch.uint8), tmp_path / "JPEGImages" / "p.jpg")
    return read_voc(tmp_path, ["trainval"], ["cat", "dog"])


def test_more_unreadable_pictures_than_allowed_are_an_error(tmp_path):
    write_voc(tmp_path, {stem: [("cat", 1, 1, 30, 20)] for stem in "abcd"})
    annotations = read_voc(tmp_path, ["trainval"])
    for transform in (TrainTransform(32), EvalTransform(32)):
        dataset = DetectionDataset(annotations, range(4), transform, DataConfig(on_error="skip", max_skipped=0.25))
        Path(annotations.paths[1]).write_bytes(b"")
        assert dataset[0, 1][3] == (2 if dataset.training else 1)
        content = Path(annotations.paths[2]).read_bytes()
        Path(annotations.paths[2]).write_bytes(b"")
        with pytest.raises(UnreadableImage, match=r"c\.jpg: .*; so far 2 of 4 pictures \(data\.max_skipped=0\.25\)"):
            dataset[0, 2]
        Path(annotations.paths[2]).write_bytes(content)
        annotations = read_voc(tmp_path, ["trainval"])


def test_a_large_jpeg_is_decoded_as_small_as_training_shows_it(photos, monkeypatch):
    transform = TrainTransform(32, AugmentConfig(distort=0))
    whole = DetectionDataset(photos, [0], transform, DataConfig(cache=True))
    reduced = DetectionDataset(photos, [0], transform, DataConfig())
    sizes, off, read = [], [], reduced._read
    monkeypatch.setattr(reduced, "_read", lambda row, by=0: sizes.append(by) or read(row, by or 1))
    monkeypatch.setattr(datasets, "LARGE_PICTURE", 400 * 300)
    for epoch in range(40):
        (image, boxes, labels, row), expected = reduced[epoch, 0], whole[epoch, 0]
        assert torch.equal(labels, expected[2]) and row == 0 and image.dtype == torch.uint8
        torch.testing.assert_close(boxes, expected[1], atol=1.5 / 32, rtol=0)  # edges lie on whole pixels
        off.append((image.float() - expected[0].float()).abs().mean().item())
    assert max(off) < 10 and sum(off) / len(off) < 2  # one pixel of 32 is some 20 levels here
    assert len(sizes) == 40 and {4, 8} <= set(sizes) <= {1, 2, 4, 8}
    monkeypatch.setattr(datasets, "LARGE_PICTURE", 400 * 300 + 1)
    assert torch.equal(reduced[0, 0][0], whole[0, 0][0]) and sizes[40:] == [0]


def test_a_reduced_jpeg_has_the_size_that_was_asked_for(photos):
    path = photos.paths[0]
    for by, shape in ((1, (3, 300, 400)), (2, (3, 150, 200)), (4, (3, 75, 100)), (8, (3, 38, 50))):
        assert read_picture(path, (400, 300), reduction=by).shape == shape
    with pytest.raises(UnreadableImage, match="is 400 x 300 pixels, its annotation says 300 x 400"):
        read_picture(path, (300, 400), reduction=2)
    whole = Image.open(path)
    for orientation in STORED_AS:
        write_turned(Path(path), orientation, whole, quality=95)
        notes, stored = [], (300, 400) if orientation >= 5 else (400, 300)
        for annotated in ((400, 300), stored):
            full = read_picture(path, annotated, note=notes.append)
            small = read_picture(path, annotated, reduction=4, note=notes.append)
            assert small.shape == (3, annotated[1] // 4, annotated[0] // 4)
            scaled = torch.nn.functional.avg_pool2d(full.float(), 4)
            assert (small.float() - scaled).abs().mean() < 3  # turned alike
        assert len(notes) == (2 if orientation >= 5 else 0)


def test_a_note_about_a_picture_is_logged_once_by_all_loader_processes_and_epochs(photos, caplog):
    path = Path(photos.paths[0])
    write_turned(path, 6, Image.open(path).rotate(90, expand=True))  # its annotation has the size that is stored
    for transform in (TrainTransform(32), EvalTransform(32)):
        for _ in range(2):
            dataset = DetectionDataset(photos, [0], transform, DataConfig())
            (image, boxes, *_), _ = dataset[0, 0], dataset[1, 0]
            assert image.shape == (3, 32, 32)
    assert boxes[0].tolist() == pytest.approx([11 / 400, 21 / 300, 200 / 400, 150 / 300])
    (record,) = caplog.records
    assert "p.jpg: is shown as 300 x 400" in record.message and "says 400 x 300" in record.message


def test_a_broken_large_jpeg_is_named_as_any_other(photos, monkeypatch):
    monkeypatch.setattr(datasets, "LARGE_PICTURE", 0)
    Path(photos.paths[0]).write_bytes(Path(photos.paths[0]).read_bytes()[:100])
    dataset = DetectionDataset(photos, [0], TrainTransform(32), DataConfig())
    for epoch in range(10):
        with pytest.raises(UnreadableImage, match=r"p\.jpg: cannot be read"):
            dataset[epoch, 0]
