"""Picture files: the one place that finds them by their names, and decodes and encodes them with Pillow.

A picture is (3, H, W) uint8 RGB as a viewer shows it: turned as EXIF says, 16 bits scaled to 8, white where it is
transparent, the first frame of an animation. A JPEG larger than needed is decoded at a fraction of its size.
"""

import contextlib
import glob
import logging
import math
import os
import posixpath
import re
import struct
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from posixpath import basename, dirname
from typing import Any, BinaryIO
from urllib.parse import unquote

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from lib import UserError
from lib.checkpoint import replacing

logger = logging.getLogger(__name__)
SUFFIXES = (".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".mpo")  # in any case
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # told by a file's content, not by its suffix
MAX_PIXELS = 100_000_000
WRITTEN_BY = "SSD architecture search --predict"  # in the EXIF data of a picture that `write_picture` signs
Size = tuple[int, int]  # width, height

# Pictures in these folders are made from others: masks, depths, drawn boxes.
MADE = re.compile(
    r"segmentation(class|object)\w*|semantic|masks?|trimaps|depths?|\w*visuali[sz]ations?|viz|previews?|thumb(nail)?s?"
    r"|(annotation|label|box)(s|es)?_vis|(\w+_)?(drawn|annotated)|outputs?|results?|predict(ion)?s?"
)
CERTAIN = 7  # of the reasons to prefer one of two pictures of a name, those that are no guess
SPLIT_WORDS = {
    "train": ("train", "training", "default"),
    "trainval": ("trainval",),
    "val": ("val", "valid", "validation", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}
SPLIT_OF = {word: split for split, words in SPLIT_WORDS.items() for word in words}

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


# Names of files. Paths have forward slashes.


def slashes(path: str) -> str:
    """A path with the separators of Windows and its leading ./ replaced."""
    return re.sub(r"^(\./+)+", "", path.replace("\\", "/"))


def loose(name: str) -> str:
    """A name as other systems may spell it: macOS decomposes accents, Windows ignores case, URLs quote."""
    return unicodedata.normalize("NFC", unquote(name)).casefold()


def suffix_of(name: str) -> str:
    return posixpath.splitext(name)[1].lower()


def stem(name: str) -> str:
    """`name` without the suffix of a picture."""
    bare, suffix = posixpath.splitext(name)
    return bare if suffix.lower() in SUFFIXES else name


def split_of(*paths: str) -> str:
    """ "train", "val" or "test", by the last word in the paths that tells; "" where none does."""
    last_resort = ""
    for path in paths:
        for part in reversed(path.split("/")):
            for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", stem(part)):
                word = re.sub("(?<=.)(set|data)$", "", word.lower())
                if word == "default":  # CVAT's name for no split at all
                    last_resort = SPLIT_OF[word]
                elif word in SPLIT_OF:
                    return SPLIT_OF[word]
    return last_resort


def splits_by_level(folders: Sequence[str]) -> list[str] | None:
    """The splits of all folders by their parts at the outermost level that tells every one; None if no level does.

    So train/Bus, train/Train, val/Bus and val/Train are two splits, whatever the classes are called.
    """
    parts = [folder.split("/") for folder in folders]
    for level in range(min(map(len, parts), default=0)):
        found = [split_of(part[level]) for part in parts]
        if all(found) and len(set(found)) > 1:
            return found
    return None


def of_another_split(pictures: Mapping[Any, str | None], split: Callable[[Any], str]) -> list:
    """The keys whose picture lies in the folder of another split than `split(key)`, of which there are pictures too.

    Such a picture is missing, and another one has its name.
    """
    found = {key: split_of(dirname(path)) for key, path in pictures.items() if path}
    there = set(found.values()) - {""}
    return [key for key, other in found.items() if split(key) in there and other not in ("", "trainval", split(key))]


class Tree:
    """The files below a folder by suffix, as paths relative to it, sorted.

    `name_in(path)` is the picture's name that an XML file holds.
    """

    def __init__(self, root: Path, name_in: Callable[[Path], str] = lambda _: "") -> None:
        self.root = root
        self._name_in = name_in
        self.files: dict[str, list[str]] = defaultdict(list)
        # Pictures and XML files by their kind and `loose` name without folder and suffix.
        self.by_stem: dict[tuple[str, str], list[str]] = defaultdict(list)
        self.unreadable: list[str] = []  # folders
        self.guessed: dict[tuple[str, str], set[str]] = defaultdict(set)  # pictures by their folder and a namesake's
        seen = set()
        # os.walk passes over a folder that it cannot read without a word.
        walk = os.walk(root, onerror=lambda error: self.unreadable.append(error.filename), followlinks=True)
        for folder, folders, names in walk:
            real = os.path.realpath(folder)
            if real in seen:  # a link back
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            below = Path(folder).relative_to(root).as_posix()
            for name in sorted(names):
                if name.startswith("."):
                    continue
                kind = "pictures" if suffix_of(name) in SUFFIXES else suffix_of(name)
                path = name if below == "." else f"{below}/{name}"
                self.files[kind].append(path)
                if kind in ("pictures", ".xml"):
                    self.by_stem[kind, basename(loose(bare(name)))].append(path)
        # Folders of masks repeat the names of the pictures; a folder "mask" may also be that of a class.
        names = [{is_made(path) for path in paths} for (kind, _), paths in self.by_stem.items() if kind == "pictures"]
        self.has_masks = {True, False} in names
        self.pictures = self.files["pictures"]

    def find(self, name: str, beside: str = "", kind: str = "pictures") -> str | None:
        """The picture (or the XML file) that a label file means by `name`: a path, perhaps without folders or suffix.

        Leading folders of `name` that are not here are ignored, but only an absolute path, which comes from another
        machine, may lose them all. Of several files the one that fits the label file `beside` best; None if that does
        not tell.
        """
        wanted = stem(name).split("/")
        parts = loose(stem(name)).split("/")
        candidates = self.by_stem.get((kind, parts[-1]), [])
        least = 1 if len(parts) == 1 or re.match(r"/|[A-Za-z]:", name) else 2
        # The folders of another machine are dropped one by one, until what is left is here.
        fitting: list[str] = []
        while not fitting and len(parts) >= least:
            end = "/" + "/".join(parts)
            fitting = [path for path in candidates if loose(f"{self.root}/{bare(path)}").endswith(end)]
            parts = parts[1:]
        # A mask does not stand in for a picture that is missing.
        if self.has_masks and not is_made(name) and not is_made(beside):
            fitting = [path for path in fitting if not is_made(path)]
        if len(fitting) < 2:
            return fitting[0] if fitting else None
        filename = self._name_in(self.root / beside) if suffix_of(beside) == ".xml" else ""
        own = dirname(beside).split("/")

        def unlike(path: str) -> tuple:
            folders, suffix = dirname(path), suffix_of(path)
            return (
                # How many parts from the end are spelt exactly so, and not only but for case, accents, quotes.
                -sum(f"/{bare(path)}".endswith("/" + "/".join(wanted[-n:])) for n in range(1, len(wanted) + 1)),
                basename(path) != basename(name),
                basename(path) != filename,
                split_of(folders) != split_of(beside),
                folders != dirname(beside),
                -sum(f"/{folders}".endswith("/" + "/".join(own[-n:])) for n in range(1, len(own) + 1)),
                -len(_words(folders) & _words(beside)),
                len(_words(folders) - _words(beside)),
                path.count("/"),
                SUFFIXES.index(suffix) if suffix in SUFFIXES else 0,  # first of all a JPEG
            )

        best, second = sorted(fitting, key=unlike)[:2]
        if unlike(best) == unlike(second):
            return None
        if unlike(best)[:CERTAIN] == unlike(second)[:CERTAIN] and dirname(best) != dirname(second):
            self.guessed[dirname(best), dirname(second)].add(best)
        return best

    def namesakes(self) -> list[str]:
        """Notes on pictures whose name occurs in several folders, where only the depth of the folders decided."""
        return [
            f"{self.root}: {len(found)} pictures have namesakes: those in {used or '.'}/ are used, not {other or '.'}/"
            for (used, other), found in self.guessed.items()
        ]


def is_made(path: str) -> bool:
    return any(map(MADE.fullmatch, dirname(path).lower().split("/")))


def _words(path: str) -> set[str]:
    return set(re.findall(r"[a-z]+|\d+", path.lower()))


def bare(path: str) -> str:
    """The path of a picture or an XML file without its suffix; some tools name the latter a.jpg.xml."""
    return stem(path[:-4] if suffix_of(path) == ".xml" else path)


# The content of files.


class UnreadableImage(UserError):
    """A picture that cannot be decoded."""

    def __init__(self, message: str) -> None:
        # The DataLoader raises it again with a worker's traceback as its message, which ends with the original one.
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


def find_pictures(patterns: Sequence[str]) -> list[Path]:
    """Picture files in files, folders and globs, each once, sorted. Raises UserError for a pattern without a match.

    A file that is named itself need not have a picture's suffix.
    """
    found: dict[str, Path] = {}
    for pattern in patterns:
        path = Path(pattern)
        try:
            names = path.iterdir() if path.is_dir() else map(Path, glob.glob(pattern, recursive=True))
            pictures = [file for file in names if file.suffix.lower() in SUFFIXES and not file.is_dir()]
            matches = [path] if path.is_file() else pictures
        except OSError as error:
            raise UserError(f"{pattern}: cannot be read ({error.strerror})") from None
        if not matches:
            deeper = f"; '{pattern}/**/*' searches its folders too" if path.is_dir() else ""
            raise UserError(f"{pattern}: no picture found (supported: {', '.join(SUFFIXES)}){deeper}")
        found.update((os.path.normpath(file.absolute()), file) for file in matches)
    return sorted(found.values())


def read_size(path: str, annotated: Size | None = None, max_pixels: float = math.inf) -> Size:
    """The size of a picture as it is shown, without decoding it, in a fraction of a millisecond.

    Raises UnreadableImage as `read_picture` does, but its pixels may still be broken.
    """
    with _opened(path) as picture:
        return _sizes(picture, path, annotated, max_pixels)[0]


def read_picture(
    path: str,
    annotated: Size | None = None,
    *,
    reduction: int = 1,
    max_pixels: float = MAX_PIXELS,
    note: Callable[[str], object] = logger.warning,
) -> Tensor:
    """The picture in a file, (3, H, W) uint8 RGB. Raises UnreadableImage, in one line that names the file.

    `annotated` is the (width, height) that its boxes belong to. Where that is the size of the stored rows and not of
    what is shown, the rows stay as they are. `reduction` 2, 4 or 8 decodes a JPEG directly, and in less time, to
    1 / `reduction` of its size, rounded up; other files keep theirs. `note` is told what a user may not expect.
    """
    with _opened(path) as picture:
        shown, stored, turn = _sizes(picture, path, annotated, max_pixels)
        # Another picture in a JPEG (MPO) is a preview, a depth or a gain map, not an animation.
        frames = 1 if picture.format in ("JPEG", "MPO") else getattr(picture, "n_frames", 1)
        if frames > 1:
            note(f"{path}: holds {frames} pictures, the first is used")
        keeps_rows = annotated not in (None, shown)
        if keeps_rows:
            says = f"its annotation says {stored[0]} x {stored[1]}, as it is stored: it is not turned"
            note(f"{path}: is shown as {shown[0]} x {shown[1]} (EXIF orientation {turn}), but {says}")
        if reduction > 1:
            picture.draft("RGB", (max(1, stored[0] // reduction), max(1, stored[1] // reduction)))
        rgb = _to_rgb(picture)
        if picture.format == "TIFF":  # Pillow has turned it already: it is turned back where it should not be
            turn, keeps_rows = {6: 8, 8: 6}.get(turn, turn), not keeps_rows
        return pil_to_tensor(rgb if turn == 1 or keeps_rows else rgb.transpose(TURN[turn]))


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    """The picture in a file, not decoded yet. Whatever the file makes Pillow raise becomes UnreadableImage."""
    try:
        with Image.open(path, formats=FORMATS) as picture:
            yield picture
    except UnreadableImage:
        raise
    except Exception as error:  # a broken file raises nearly anything: OSError, SyntaxError, struct.error, KeyError
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = f"is not a picture ({', '.join(FORMATS)})" if Path(path).stat().st_size else "is empty"
        raise UnreadableImage(f"{path}: cannot be read: {reason}") from None


def _sizes(picture: Image.Image, path: str, annotated: Size | None, max_pixels: float) -> tuple[Size, Size, int]:
    """Size as shown, size of the stored rows, and EXIF orientation. Raises UnreadableImage for what is not expected."""
    orientation = _orientation(picture)
    # The `size` of a TIFF is the one shown already.
    stored = (picture.tag_v2[WIDTH], picture.tag_v2[HEIGHT]) if picture.format == "TIFF" else picture.size
    shown = stored[::-1] if orientation >= 5 else stored
    size = f"{shown[0]} x {shown[1]} pixels"
    if stored[0] * stored[1] > max_pixels:
        raise UnreadableImage(f"{path}: has {size}, more than {max_pixels:,} (data.max_pixels)")
    if annotated not in (None, shown, stored):
        raise UnreadableImage(f"{path}: is {size}, its annotation says {annotated[0]} x {annotated[1]}")
    return shown, stored, orientation


def _orientation(picture: Image.Image) -> int:
    """EXIF orientation; 1 where it is missing or no number from 1 to 8, or the EXIF data is damaged."""
    value = 1
    with contextlib.suppress(Exception):  # foreign data again, which viewers ignore when it is broken
        if picture.format == "PNG" and "exif" not in picture.info:
            # Pillow would decode the pixels to see whether the chunk stands behind them.
            with Path(picture.filename).open("rb") as file:
                file.seek(8)  # the signature
                while len(head := file.read(8)) == 8:
                    length, kind = struct.unpack(">I4s", head)
                    if kind == b"eXIf":
                        picture.info["exif"] = file.read(length)
                        break
                    file.seek(length + 4, os.SEEK_CUR)  # content and checksum
        value = Image.Image.getexif(picture).get(ORIENTATION, 1)
    return value if value in range(1, 9) else 1


def _to_rgb(picture: Image.Image) -> Image.Image:
    """Decode to RGB of 0 to 255, with white where it is transparent. Raises ValueError for pixels without a scale."""
    picture.load()
    tags = getattr(picture, "tag_v2", {})  # of a TIFF
    if picture.mode.startswith("I;16"):
        # The high byte, as Pillow reads it from 16-bit RGB: 257 times a value gives that value.
        grey = np.array(picture)
        transparent = grey == picture.info.get("transparency")  # the grey value that is; None is no pixel's
        if tags.get(PHOTOMETRIC) == 0:  # white is zero, which Pillow heeds for 8 bits only
            grey = ~grey
        grey = grey >> (tags.get(BITS, (16,))[0] - 8)
        return Image.fromarray(np.where(transparent, 255, grey).astype(np.uint8)).convert("RGB")
    signed = set(tags.get(SAMPLE_FORMAT, ())) - {1, 4}
    if picture.mode in ("I", "F", "LAB", "HSV") or signed:
        raise ValueError(f"has {picture.mode} pixels of unknown range; convert it to RGB or grey of 8 or 16 bits")
    if picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        return Image.composite(rgba, Image.new("RGB", rgba.size, "white"), rgba)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def write_picture(image: Tensor, path: Path | BinaryIO, signed: bool = False) -> None:
    """Write `image` (3, H, W) uint8, no side over 65,500, as a JPEG; its folder is created if needed."""
    exif = Image.Exif() if signed else b""
    if signed:
        exif[SOFTWARE] = WRITTEN_BY
    with replacing(path, sync=False) if isinstance(path, Path) else contextlib.nullcontext(path) as file:
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=92, exif=exif)


def is_signed(path: Path) -> bool:
    """Whether `path` is a picture that `write_picture` signed, one of this project that may be written again."""
    try:
        with _opened(str(path)) as picture:
            return picture.getexif().get(SOFTWARE) == WRITTEN_BY
    except UnreadableImage:
        return False
