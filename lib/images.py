"""Picture files: find, read and write them. A JPEG larger than needed is decoded at a fraction of its size."""

from __future__ import annotations

import contextlib
import glob
import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image, read_file, write_jpeg

from lib.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp")  # what torchvision's decode_image reads
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
ORIENTATION = 0x112  # EXIF tag
LARGE_PICTURE = 1_000_000  # pixels; for a smaller JPEG, PIL's overhead costs as much as the reduced decoding saves


class UnreadableImage(UserError):
    """A picture that cannot be decoded.

    The DataLoader raises an exception of a worker again with the whole traceback as its message. The original message
    follows the exception's name on the last line of that, and is all that is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


def find_pictures(patterns: Sequence[str]) -> list[Path]:
    """Picture files in files, folders and globs, sorted. Raises UserError for a pattern without a match."""
    found: set[Path] = set()
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            matches = [file for file in path.iterdir() if file.suffix.lower() in SUFFIXES]
        elif path.is_file():
            matches = [path]
        else:
            matches = [Path(name) for name in glob.glob(pattern, recursive=True)]
        if not matches:
            raise UserError(f"{pattern}: no picture found (supported: {', '.join(SUFFIXES)})")
        found.update(matches)
    return sorted(found)


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


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    """The picture in a file, not decoded yet. Whatever the file makes Pillow raise becomes UnreadableImage."""
    try:
        with Image.open(path, formats=FORMATS) as picture:
            yield picture
    except UnreadableImage:
        raise
    except Image.UnidentifiedImageError:
        reason = "is none of " + ", ".join(FORMATS) if Path(path).stat().st_size else "is empty"
        raise UnreadableImage(f"{path}: cannot be read: {reason}") from None
    except (
        Exception
    ) as error:  # a broken file raises nearly anything: OSError, SyntaxError, struct.error, KeyError, ...
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImage(f"{path}: cannot be read: {reason}") from None


def _header(picture: Image.Image) -> Header:
    """The header of a picture that has just been opened."""
    orientation = _orientation(picture)
    stored = picture.size
    if picture.format == "TIFF":  # its `size` is the one shown already
        stored = picture.tag_v2[256], picture.tag_v2[257]
    shown = stored[::-1] if orientation >= 5 else stored
    # Another picture in a JPEG (MPO) is a preview, a depth or a gain map, not an animation.
    jpeg = picture.format in ("JPEG", "MPO")
    frames = 1 if jpeg else getattr(picture, "n_frames", 1)
    return Header(*shown, *stored, orientation, "JPEG" if jpeg else picture.format, frames)


def _orientation(picture: Image.Image) -> int:
    """EXIF orientation; 1 where it is missing or no number from 1 to 8, or the EXIF data is damaged."""
    if picture.format == "PNG" and "exif" not in picture.info:
        # Pillow would decode the pixels to see whether the chunk stands behind them.
        picture.info |= _late_png_exif(picture)
    try:
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


def read_picture(path: str) -> Tensor:
    """A decoded RGB picture (3, H, W) uint8. Raises UnreadableImage that names the file."""
    try:
        return decode_image(read_file(path), mode=ImageReadMode.RGB)
    except RuntimeError as error:
        # The message starts with the place in torchvision's C++ source, and may end with a stack trace.
        reason = re.sub(r"^.*\.cpp:\d+[,\s]*", "", str(error).splitlines()[0])
        raise UnreadableImage(f"{path}: cannot be read: {reason}") from None


def read_annotated_picture(path: str, width: int, height: int) -> Tensor:
    """`read_picture` that also raises UnreadableImage if the picture's size differs from the annotated one."""
    image = read_picture(path)
    if image.shape != (3, height, width):
        found = f"{image.shape[-1]} x {image.shape[-2]}"
        raise UnreadableImage(f"{path}: is {found} pixels, its annotation says {width} x {height}")
    return image


def is_large_jpeg(path: str, size: Tensor) -> bool:
    """Whether a picture of `size` (width, height) is worth decoding at a reduced size."""
    return int(size.prod()) >= LARGE_PICTURE and path.lower().endswith((".jpg", ".jpeg"))


def read_reduced_jpeg(path: str, width: int, height: int, reduction: int) -> Tensor:
    """`read_annotated_picture` at 1 / `reduction` of its size: (3, ceil(H / reduction), ceil(W / reduction)).

    `reduction` is 1, 2, 4 or 8. JPEG decodes to these sizes directly, in less time than to the full size.
    """
    if reduction == 1:
        return read_annotated_picture(path, width, height)
    try:
        with Image.open(path) as picture:
            if picture.format != "JPEG" or picture.size != (width, height):
                raise UnreadableImage(f"{path}: is not a JPEG of {width} x {height} pixels")
            picture.draft("RGB", (width // reduction, height // reduction))
            return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableImage(f"{path}: cannot be read: {error}") from None


def write_picture(image: Tensor, path: Path) -> None:
    """Write `image` (3, H, W) uint8 as a JPEG; its folder is created if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_jpeg(image, str(path), quality=92)
