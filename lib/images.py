"""Picture files: the one place that finds, decodes and encodes them, with Pillow.

A picture is (3, H, W) uint8 RGB as a viewer shows it: turned as EXIF says, 16 bits scaled to 8, white where it is
transparent, the first frame of an animation. A JPEG larger than needed is decoded at a fraction of its size.
"""

from __future__ import annotations

import contextlib
import glob
import logging
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lib.checkpoint import replacing
from lib.errors import UserError

logger = logging.getLogger(__name__)
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif")  # in any case
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # told by a file's content, not by its suffix
MAX_PIXELS = 100_000_000
LARGE_PICTURE = 1_000_000  # pixels; a smaller JPEG gains nothing from reduced decoding
LONGEST_JPEG = 65_500  # pixels a side that libjpeg writes
WRITTEN_BY = "SSD architecture search --predict"  # in the EXIF data of a picture that `write_picture` signs

# EXIF and TIFF tags.
WIDTH, HEIGHT, BITS, PHOTOMETRIC, ORIENTATION, SOFTWARE, SAMPLE_FORMAT = 256, 257, 258, 262, 274, 305, 339
TURN = {  # from the stored rows to what is shown, by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# The limit is `max_pixels`, which is compared with the header's size; Pillow's own would warn at 89 million.
Image.MAX_IMAGE_PIXELS = None
# Pillow logs some faults of a file, and then raises an exception that says them again.
logging.getLogger("PIL").addHandler(logging.NullHandler())


class UnreadableImage(UserError):
    """A picture that cannot be decoded.

    The DataLoader raises an exception of a worker again with the whole traceback as its message. The original message
    follows the exception's name on the last line of that, and is all that is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


def find_pictures(patterns: Sequence[str]) -> list[Path]:
    """Picture files in files, folders and globs, each once, sorted. Raises UserError for a pattern without a match.

    A file that is named itself need not have a picture's suffix.
    """
    found: dict[str, Path] = {}
    for pattern in patterns:
        try:
            matches = _matching(pattern)
        except OSError as error:
            raise UserError(f"{pattern}: cannot be read ({error.strerror})") from None
        if not matches:
            deeper = f"; '{pattern}/**/*' searches its folders too" if Path(pattern).is_dir() else ""
            raise UserError(f"{pattern}: no picture found (supported: {', '.join(SUFFIXES)}){deeper}")
        found.update((os.path.normpath(file.absolute()), file) for file in matches)
    return sorted(found.values())


def _matching(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.is_file():
        return [path]
    names = path.iterdir() if path.is_dir() else map(Path, glob.glob(pattern, recursive=True))
    return [file for file in names if file.suffix.lower() in SUFFIXES and not file.is_dir()]


class Header(NamedTuple):
    """What a picture file says about itself before its pixels are decoded."""

    width: int  # as shown, that is after EXIF orientation, as annotation tools count
    height: int
    stored_width: int  # of the stored rows, before EXIF orientation
    stored_height: int
    orientation: int  # EXIF, 1 to 8; 1 where the file has none, or nonsense
    format: str  # one of FORMATS
    frames: int  # 1, or the number of pictures in an animation or a TIFF


def read_header(path: str) -> Header:
    """Size and orientation of a picture file without decoding it, in a fraction of a millisecond.

    Raises UnreadableImage, in one line that names the file, where it is not a picture. Its pixels may still be broken.
    """
    with _opened(path) as picture:
        return _header(picture)


def read_picture(
    path: str,
    annotated: tuple[int, int] | None = None,
    *,
    reduction: int = 1,
    max_pixels: int = MAX_PIXELS,
    note: Callable[[str], object] = logger.warning,
) -> Tensor:
    """The picture in a file, (3, H, W) uint8 RGB. Raises UnreadableImage, in one line that names the file.

    `annotated` is the (width, height) that its boxes belong to. Where that is the size of the stored rows and not of
    what is shown, the rows stay as they are. `reduction` 2, 4 or 8 decodes a JPEG directly, and in less time, to
    1 / `reduction` of its size, rounded up; other files keep theirs. `note` is told what a user may not expect.
    """
    with _opened(path) as picture:
        header = _header(picture)
        shown, stored = header[:2], header[2:4]
        check_header(path, header, annotated, max_pixels)
        if header.frames > 1:
            note(f"{path}: holds {header.frames} pictures, the first is used")
        turn = header.orientation
        if annotated not in (None, shown):
            annotation_says = f"its annotation says {annotated[0]} x {annotated[1]}"
            is_shown = f"is shown as {shown[0]} x {shown[1]} (EXIF orientation {turn})"
            note(f"{path}: {is_shown}, but {annotation_says}, as it is stored: it is not turned")
            turn = 1
        if reduction > 1:
            picture.draft("RGB", (max(1, stored[0] // reduction), max(1, stored[1] // reduction)))
        rgb = _to_rgb(picture)
        if header.format == "TIFF":  # Pillow has turned it already: it is turned back where it should not be
            turn = 1 if turn > 1 else {6: 8, 8: 6}.get(header.orientation, header.orientation)
        return to_tensor(rgb.transpose(TURN[turn]) if turn > 1 else rgb)


def check_header(path: str, header: Header, annotated: tuple[int, int] | None, max_pixels: int) -> None:
    """Raise UnreadableImage if a picture is too large, or of another size than the `annotated` (width, height)."""
    size = f"{header.width} x {header.height} pixels"
    if header.stored_width * header.stored_height > max_pixels:
        raise UnreadableImage(f"{path}: has {size}, more than {max_pixels:,} (data.max_pixels)")
    if annotated not in (None, header[:2], header[2:4]):
        raise UnreadableImage(f"{path}: is {size}, its annotation says {annotated[0]} x {annotated[1]}")


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    """The picture in a file, not decoded yet. Whatever the file makes Pillow raise becomes UnreadableImage."""
    try:
        with Image.open(path, formats=FORMATS) as picture:
            yield picture
    except UnreadableImage:
        raise
    except Image.UnidentifiedImageError:
        reason = f"is not a picture ({', '.join(FORMATS)})" if Path(path).stat().st_size else "is empty"
        raise UnreadableImage(f"{path}: cannot be read: {reason}") from None
    except Exception as error:  # a broken file raises nearly anything: OSError, SyntaxError, struct.error, KeyError
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImage(f"{path}: cannot be read: {reason}") from None


def _header(picture: Image.Image) -> Header:
    """The header of a picture that has just been opened."""
    orientation = _orientation(picture)
    stored = picture.size
    if picture.format == "TIFF":  # its `size` is the one shown already
        stored = picture.tag_v2[WIDTH], picture.tag_v2[HEIGHT]
    shown = stored[::-1] if orientation >= 5 else stored
    # Another picture in a JPEG (MPO) is a preview, a depth or a gain map, not an animation.
    jpeg = picture.format in ("JPEG", "MPO")
    frames = 1 if jpeg else getattr(picture, "n_frames", 1)
    return Header(*shown, *stored, orientation, "JPEG" if jpeg else picture.format, frames)


def _orientation(picture: Image.Image) -> int:
    """EXIF orientation; 1 where it is missing or no number from 1 to 8, or the EXIF data is damaged."""
    try:
        if picture.format == "PNG" and "exif" not in picture.info:
            # Pillow would decode the pixels to see whether the chunk stands behind them.
            picture.info |= _late_png_exif(picture)
        value = Image.Image.getexif(picture).get(ORIENTATION, 1)
    except Exception:  # foreign data again, which viewers ignore when it is broken
        return 1
    return value if value in range(1, 9) else 1


def _late_png_exif(picture: Image.Image) -> dict[str, bytes]:
    """{"exif": content} of a PNG whose eXIf chunk stands behind its pixels, else {}."""
    with Path(picture.filename).open("rb") as file:
        file.seek(8)  # the signature
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"eXIf":
                return {"exif": file.read(length)}
            file.seek(length + 4, 1)  # content and checksum
    return {}


def _to_rgb(picture: Image.Image) -> Image.Image:
    """Decode to RGB of 0 to 255, with white where it is transparent. Raises ValueError for pixels without a scale."""
    picture.load()
    tags = getattr(picture, "tag_v2", {})  # of a TIFF
    if picture.mode.startswith("I;16"):
        return _grey_of_16_bits(picture, tags)
    signed = set(tags.get(SAMPLE_FORMAT, ())) - {1, 4}
    if picture.mode in ("I", "F", "LAB", "HSV") or signed:
        kind = {"I": "32-bit or signed", "F": "floating-point", "L": "signed"}.get(picture.mode, picture.mode)
        raise ValueError(f"has {kind} pixels, whose range is unknown; convert it to RGB or grey of 8 or 16 bits")
    if picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        white = Image.new("RGB", rgba.size, "white")
        white.paste(rgba, mask=rgba)
        return white
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _grey_of_16_bits(picture: Image.Image, tags: dict) -> Image.Image:
    """The high byte, as Pillow reads it from 16-bit RGB: 257 times a value gives that value."""
    grey = np.array(picture)
    key = picture.info.get("transparency")  # the grey value that is transparent
    transparent = np.False_ if key is None else grey == key
    if tags.get(PHOTOMETRIC) == 0:  # white is zero, which Pillow heeds for 8 bits only
        grey = ~grey
    grey = np.where(transparent, 255, grey >> (tags.get(BITS, (16,))[0] - 8)).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def is_large_jpeg(path: str, size: Tensor) -> bool:
    """Whether a picture of `size` (width, height) is worth decoding at a reduced size."""
    return int(size.prod()) >= LARGE_PICTURE and path.lower().endswith((".jpg", ".jpeg"))


def to_tensor(picture: Image.Image) -> Tensor:
    """(3, H, W) uint8 of an RGB picture."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def to_pillow(image: Tensor) -> Image.Image:
    """The reverse of `to_tensor`."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def write_picture(image: Tensor, path: Path, signed: bool = False) -> None:
    """Write `image` (3, H, W) uint8 as a JPEG, or as a PNG if it is too long for one; its folder is created if needed.

    A `signed` picture says that this project wrote it, see `is_signed`.
    """
    exif = b""
    if signed:
        exif = Image.Exif()
        exif[SOFTWARE] = WRITTEN_BY
    with replacing(path, sync=False) as file:
        if max(image.shape) > LONGEST_JPEG:
            to_pillow(image).save(file, "PNG", exif=exif)
        else:
            to_pillow(image).save(file, "JPEG", quality=92, exif=exif)


def is_signed(path: Path) -> bool:
    """Whether `path` is a picture that `write_picture` signed: it may be written again."""
    try:
        with _opened(str(path)) as picture:
            return picture.getexif().get(SOFTWARE) == WRITTEN_BY
    except UnreadableImage:
        return False
