"""Pictures read from files, whole or, where a JPEG is larger than needed, reduced while it is decoded."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image, read_file, write_jpeg

from lib.errors import UserError

LARGE_PICTURE = 1_000_000  # pixels


class UnreadableImage(UserError):
    """A picture that cannot be decoded. Its message stays one line when a loader's worker raises it.

    The DataLoader raises a worker's exception anew, with the whole traceback for its message; the last line of that
    is the message wanted here.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


def read_picture(path: str) -> Tensor:
    """A decoded RGB picture (3, H, W) uint8. Raises UnreadableImage, naming the file."""
    try:
        return decode_image(read_file(path), mode=ImageReadMode.RGB)
    except RuntimeError as error:
        reason = str(error).splitlines()[0].rpartition("cpp:")[2]
        raise UnreadableImage(f"{path}: cannot be read: {reason}") from None


def read_annotated_picture(path: str, width: int, height: int) -> Tensor:
    """As `read_picture`. Raises UnreadableImage also if the picture has not the size that was annotated."""
    image = read_picture(path)
    if image.shape != (3, height, width):
        found = f"{image.shape[2]} x {image.shape[1]}"
        raise UnreadableImage(f"{path}: is {found} pixels, its annotation says {width} x {height}")
    return image


def is_large_jpeg(path: str, size: Tensor) -> bool:
    """Whether it is worth asking for less of a picture of `size` (width, height): below, PIL costs what is saved."""
    return int(size.prod()) >= LARGE_PICTURE and Path(path).suffix.lower() in (".jpg", ".jpeg")


def read_reduced_jpeg(path: str, width: int, height: int, by: int) -> Tensor:
    """As `read_annotated_picture`, (3, ceil(H / by), ceil(W / by)); `by` is 1, 2, 4 or 8, which JPEG decodes faster."""
    if by == 1:
        return read_annotated_picture(path, width, height)
    try:
        with Image.open(path) as picture:
            if picture.format != "JPEG" or picture.size != (width, height):
                raise UnreadableImage(f"{path}: is no JPEG of {width} x {height} pixels")
            picture.draft("RGB", (width // by, height // by))
            return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableImage(f"{path}: cannot be read: {error}") from None


SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp")


def find_pictures(patterns: Sequence[str]) -> list[Path]:
    """Files, folders and globs as a sorted list of picture files. Raises UserError for one that matches nothing."""
    found: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            matches = [p for p in path.iterdir() if p.suffix.lower() in SUFFIXES]
        else:
            matches = [path] if path.is_file() else [Path(p) for p in glob.glob(pattern, recursive=True)]
        if not matches:
            raise UserError(f"{pattern}: no picture here (looked for {', '.join(SUFFIXES)})")
        found += matches
    return sorted(set(found))


def write_picture(image: Tensor, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_jpeg(image, str(path), quality=92)
