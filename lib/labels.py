"""Label files of other tools as checked records: VOC's XML, COCO's JSON, YOLO's text and YAML, lists of pictures.

Whatever a file holds, its reader returns values of the stated types and ranges, or raises UserError in one line that
names the file. What is wrong with a single object goes to `faults`, and the object is left out.
"""

from __future__ import annotations

import codecs
import json
import logging
import math
import os
import re
import xml.etree.ElementTree as ElementTree
from array import array
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from lib import distributed
from lib.errors import UserError, one_line
from lib.images import SUFFIXES
from lib.plain import read_bytes, shown

logger = logging.getLogger(__name__)
MOST_BYTES = 64 * 1024**2  # of a label file that is not JSON
MOST_YAML, MOST_BRACKETS = 1024**2, 1000  # parsing takes time with the square of the latter
MOST_SHOWN = 20  # faults of a data set that are named; the others are counted
SNIFFED = 64 * 1024  # bytes at each end of a JSON file
LARGEST_SIDE = 1_000_000  # pixels; what is beyond is a mistake
FARTHEST = 10.0 * LARGEST_SIDE  # a corner beyond this is a mistake as well

# One object while a file is read, eight float64: numbers of its picture and its class, a box in continuous pixels from
# 0, whether the object is ignored, and its area, NaN if the file gives none.
OBJECT = np.dtype([("image", "f8"), ("label", "f8"), ("box_xyxy", "f8", 4), ("ignore", "f8"), ("area", "f8")])


class FaultyData(UserError):
    """Several faults of a data set, one a line."""

    def __str__(self) -> str:
        return "\n  ".join(one_line(line) for line in self.args)


class Faults:
    """The faults of a data set's files, each of which costs a picture or an object.

    `on_error` "raise": `close` raises one UserError that lists them. "skip": they are logged and counted, and `close`
    raises only if more than the share `max_skipped` of the pictures or the objects was lost.
    """

    def __init__(self, on_error: str = "raise", max_skipped: float = 1.0) -> None:
        self.skip = on_error == "skip"
        self.max_skipped = max_skipped
        self.counts: Counter[tuple[str, str]] = Counter()  # by what was lost ("picture" or "object") and the kind
        self.named: list[str] = []

    def add(self, lost: str, kind: str, message: str, count: int = 1) -> None:
        self.counts[lost, kind] += count
        if len(self.named) < MOST_SHOWN:
            self.named.append(message)
            if self.skip and distributed.world().main:
                logger.warning("%s; skipped", message)

    def close(self, source: Path, pictures: int, objects: int) -> list[str]:
        """One line for each kind of loss beside the `pictures` and `objects` that are left."""
        total = sum(self.counts.values())
        if total and not self.skip:
            if len(self.named) == 1:
                raise UserError(self.named[0])
            more = [f"and {total - len(self.named)} more"] if total > len(self.named) else []
            raise FaultyData(f"{source}: {total} faults (data.on_error=skip leaves them out):", *self.named, *more)
        lines = []
        for lost, left in (("picture", pictures), ("object", objects)):
            kinds = {kind: count for (what, kind), count in self.counts.items() if what == lost}
            gone = sum(kinds.values())
            if not gone:
                continue
            line = f"{source}: {gone} of {gone + left} {lost}s left out ({', '.join(f'{kinds[k]} {k}' for k in kinds)})"
            if gone > self.max_skipped * (gone + left):
                raise UserError(f"{line}, more than data.max_skipped={self.max_skipped:g}; the first: {self.named[0]}")
            lines.append(line)
            if distributed.world().main:
                logger.warning("%s", line)
        return lines


# Text.


def is_there(path: Path) -> bool:
    """Whether a file or folder exists. A name from a stranger's file may be too long, or hold a NUL."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def read_text(path: Path, latin: bool = False) -> str:
    """UTF-8 with or without a byte order mark, or UTF-16; with `latin`, what is neither is Latin-1."""
    data = read_bytes(path, MOST_BYTES)
    encoding = "utf-8-sig"
    if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        encoding = "utf-16"
    elif b"\0" in data[:2]:  # UTF-16 without its mark
        encoding = "utf-16-be" if data[:1] == b"\0" else "utf-16-le"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        if latin:
            return data.decode("latin-1")
        raise UserError(f"{path}: expected text in UTF-8") from None


def read_lines(path: Path) -> list[str]:
    """The lines that are not blank. A name in the wrong encoding is one of a picture that does not exist."""
    return [line.strip() for line in read_text(path, latin=True).splitlines() if line.strip()]


def class_name(value: object) -> str:
    """The name of a class in one printable line; "" where there is none. A number becomes its text."""
    if not isinstance(value, (str, int, float)) or isinstance(value, bool):
        return ""
    text = value if isinstance(value, str) else shown(value)
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def slashes(path: str) -> str:
    """A path with the separators of Windows and its leading ./ replaced."""
    return re.sub(r"^(\./+)+", "", path.replace("\\", "/"))


def usable_size(width: object, height: object) -> tuple[int, int] | None:
    """Width and height of a picture as whole numbers; None where they are missing, zero or absurd."""
    try:
        sides = float(width), float(height)
    except (TypeError, ValueError, OverflowError):
        return None
    if not all(1 <= side <= LARGEST_SIDE and side == int(side) for side in sides):
        return None
    return int(sides[0]), int(sides[1])


# Names of files.

SPLIT_WORDS = {
    "train": "train training default",
    "trainval": "trainval",
    "val": "val valid validation",
    "test": "test testing",
}
SPLIT_OF = {word: split for split, words in SPLIT_WORDS.items() for word in words.split()}


def stem(name: str) -> str:
    """`name` without the suffix of a picture."""
    suffix = suffix_of(name)
    return name[: -len(suffix)] if suffix in SUFFIXES else name


def bare(path: str) -> str:
    """The path of a picture or an XML file without its suffix; some tools name the latter a.jpg.xml."""
    return stem(path[:-4] if suffix_of(path) == ".xml" else path)


def folder_of(path: str) -> str:
    return path.rpartition("/")[0]


def suffix_of(name: str) -> str:
    base, dot, suffix = name.rpartition("/")[2].rpartition(".")
    return dot + suffix.lower() if base else ""


def split_of(*paths: str) -> str:
    """ "train", "val" or "test", by the last word in the paths that tells; "" where none does."""
    for path in paths:
        for part in reversed(path.split("/")):
            for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", stem(part)):
                if word.lower() in SPLIT_OF:
                    return SPLIT_OF[word.lower()]
    return ""


# VOC.


class VocFile(NamedTuple):
    filename: str  # of the picture, without folders; "" where there is none
    size: tuple[int, int] | None  # width, height; None where the picture has to be asked
    objects: list[tuple[str, tuple[float, ...], bool]]  # class, box, difficult
    swapped: int  # boxes whose corners were exchanged


def read_voc_xml(path: Path, faults: Faults) -> VocFile:
    """One VOC annotation. Corners in the wrong order are put right."""
    data = read_bytes(path, MOST_BYTES)
    if b"<!ENTITY" in data.replace(b"\0", b""):  # a few of them can stand for gigabytes
        raise UserError(f"{path}: declares XML entities, which no VOC annotation has")
    try:
        tree = ElementTree.fromstring(data)
    except (ElementTree.ParseError, ValueError, LookupError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as a VOC annotation: {error}") from None
    if tree.tag != "annotation":
        raise UserError(f"{path}: not a VOC annotation: expected <annotation>, found <{tree.tag[:40]}>")
    objects, swapped = [], 0
    for element in tree.iter("object"):
        try:
            name = class_name(element.findtext("name"))
            if not name:
                raise ValueError("<name> is missing")
            x1, y1, x2, y2 = (_corner(element, key) for key in ("xmin", "ymin", "xmax", "ymax"))
        except ValueError as error:
            faults.add("object", "malformed object", f"{path}: malformed object: {error}")
            continue
        # VOC's corners are 1-based and inclusive, so a box without width has x1 = x2 + 1.
        swapped += x1 > x2 + 1 or y1 > y2 + 1
        x1, x2 = (x2, x1) if x1 > x2 + 1 else (x1, x2)
        y1, y2 = (y2, y1) if y1 > y2 + 1 else (y1, y2)
        difficult = (element.findtext("difficult") or "").strip().lower()
        objects.append((name, (x1 - 1, y1 - 1, x2, y2), difficult in ("1", "1.0", "true", "yes")))
    filename = slashes((tree.findtext("filename") or "").strip()).rpartition("/")[2]
    return VocFile(filename, usable_size(*map(tree.findtext, ("size/width", "size/height"))), objects, swapped)


def picture_name(path: Path) -> str:
    """The <filename> of a VOC annotation; "" where it cannot be read."""
    try:
        return read_voc_xml(path, Faults()).filename
    except UserError:
        return ""


def _corner(element: ElementTree.Element, key: str) -> float:
    text = (element.findtext(f"bndbox/{key}") or "").strip()
    if not text:
        raise ValueError(f"<bndbox><{key}> is missing")
    value = float(text)
    if not abs(value) <= FARTHEST:
        raise ValueError(f"<{key}> is {text[:40]}")
    return value


# COCO.


class CocoFile(NamedTuple):
    images: list  # entries as they are; `coco_image` checks one
    categories: dict[int, str]  # names by id, sorted by id
    objects: np.ndarray  # (M,) of OBJECT
    image_ids: list[int | str]  # the image id that each number in `objects` stands for
    category_ids: list[int]  # likewise
    notes: list[str]


class _Taken:
    """Stands in the document for an annotation whose numbers were taken."""


def read_coco_json(path: Path, faults: Faults) -> CocoFile:
    """A COCO instances file. (pycocotools' own reader keeps each annotation as a dict and names no file.)"""
    # An annotation becomes eight numbers as soon as it is parsed: as Python objects, those of COCO take gigabytes. Ids
    # are integers of any length or strings, so the numbers are places in these dicts.
    flat, image_number, category_number = array("d"), {}, {}

    def take_numbers(entry: dict) -> Any:
        if "bbox" not in entry:
            return entry
        try:
            x, y, width, height = entry["bbox"]
            area, crowd = entry.get("area"), entry.get("iscrowd")
            area = math.nan if area is None else area
            if not abs(x) + abs(y) + abs(width) + abs(height) <= FARTHEST or math.isinf(area):
                return entry
            image_id, category_id = entry["image_id"], entry["category_id"]
            if type(image_id) is not int or type(category_id) is not int:
                image_id, category_id = coco_id(image_id), coco_id(category_id)
            # An array of its own first: an entry with a value that is no number must add nothing to `flat`.
            numbers = array("d", (0, 0, x, y, x + width, y + height, crowd or 0, area))
        except (KeyError, TypeError, ValueError, OverflowError):
            return entry
        numbers[0] = image_number.setdefault(image_id, len(image_number))
        numbers[1] = category_number.setdefault(category_id, len(category_number))
        flat.extend(numbers)
        return _Taken

    if not is_there(path):
        raise UserError(f"{path}: no such annotation file (data.train_annotations, data.test_annotations)")
    try:
        document = json.loads(read_bytes(path, path.stat().st_size), object_hook=take_numbers)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: malformed JSON: {error}") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(document, dict) or not isinstance(document.get(key), list):
            raise UserError(f"{path}: malformed COCO annotations: no list '{key}'")
    wrong = [entry for entry in document["annotations"] if entry is not _Taken]
    objects = np.array(flat).view(OBJECT)
    if len(document["annotations"]) - len(wrong) != len(objects):
        raise UserError(f"{path}: malformed COCO annotations: some stand outside of the list 'annotations'")
    for entry in wrong:
        faults.add("object", "malformed annotation", f"{path}: malformed annotation {shown(entry)}")
    categories, notes = _coco_categories(path, document["categories"], category_number)
    return CocoFile(document["images"], categories, objects, list(image_number), list(category_number), notes)


def coco_id(value: Any) -> int | str:
    """An id as JSON holds it. Raises TypeError for what is neither a whole number nor text."""
    if type(value) is float and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if type(value) not in (int, str):
        raise TypeError(f"expected an id, found {shown(value)}")
    return value


def coco_image(entry: Any) -> tuple[int | str, str, tuple[int, int] | None]:
    """Id, file name and size of an entry of 'images'. Raises ValueError or TypeError."""
    if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str) or not entry["file_name"]:
        raise ValueError("no 'file_name'")
    size = usable_size(entry.get("width"), entry.get("height"))
    return coco_id(entry.get("id")), slashes(entry["file_name"]), size


def _coco_categories(path: Path, entries: list, used: dict) -> tuple[dict[int, str], list[str]]:
    """Names by id, sorted, and notes."""
    found: list[tuple[int, str, str]] = []
    for entry in entries:
        if not isinstance(entry, dict) or type(number := entry.get("id")) is not int or "name" not in entry:
            raise UserError(f"{path}: malformed category {shown(entry)}: expected an id, a whole number, and a name")
        # Without a name, a class goes by its id.
        name = class_name(entry["name"]) or f"category {shown(number)}"
        found.append((number, name, class_name(entry.get("supercategory"))))
    notes = []
    for root in [c for c in found if c[0] == 0 and 0 not in used]:
        # Roboflow lists the project itself as category 0, the super-category of all others.
        if len(found) > 1 and all(other[2] == root[1] for other in found if other is not root):
            found.remove(root)
            notes.append(f"{path}: category 0, '{root[1]}', is the super-category of the others: left out")
    for column, what in ((0, "id"), (1, "name")):
        value, count = Counter(c[column] for c in found).most_common(1)[0] if found else ("", 0)
        if count > 1:
            raise UserError(f"{path}: {count} categories have the same {what} {shown(value)}")
    return {number: name for number, name, _ in sorted(found)}, notes


def is_coco(path: Path) -> bool:
    """Whether the beginning and the end of a JSON file show keys of COCO's."""
    try:
        with path.open("rb") as file:
            ends = file.read(SNIFFED)
            file.seek(max(file.seek(0, os.SEEK_END) - SNIFFED, 0))
            ends += file.read()
    except OSError:
        return False
    return sum(key in ends for key in (b'"images"', b'"annotations"', b'"categories"')) >= 2


# YOLO.


def read_yolo_txt(path: Path, faults: Faults) -> list[tuple[int, tuple[float, ...]]]:
    """The class number and the box, xyxy as shares of the picture, of each line. Polygons become their boxes."""
    objects = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        words = line.split()
        try:
            label, *values = map(float, words) if words else (-1,)
            if not words:
                continue
            if not label.is_integer() or label < 0:
                raise ValueError(f"class {words[0][:40]}")
            if not all(-1 <= value <= 2 for value in values):
                raise ValueError("expected shares of the picture, from 0 to 1")
            if len(values) == 4:
                x, y, width, height = values
                box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
            elif len(values) >= 6 and len(values) % 2 == 0:
                box = (min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2]))
            else:
                raise ValueError(f"expected a class and 4 numbers, or a polygon, found {len(words)} numbers")
        except (ValueError, OverflowError) as error:
            faults.add("object", "malformed line", f"{path}: line {number}: {error}")
            continue
        objects.append((int(label), box))
    return objects


def read_yolo_yaml(path: Path) -> tuple[dict[int, str], str, dict[str, list[str]]]:
    """Class names by number, the key `path`, and the folders or list files of train, val and test."""
    text = read_text(path)
    if len(text) > MOST_YAML or text.count("[") + text.count("{") > MOST_BRACKETS:
        raise UserError(f"{path}: too large, or nested too deeply, for a description of a data set")
    try:
        # The base loader leaves every scalar as text: a class called yes or 1 stays that.
        data = yaml.load(text, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML: {shown(' '.join(str(error).split()))}") from None
    data = data if isinstance(data, dict) else {}
    names = data.get("names")
    pairs = list(names.items() if isinstance(names, dict) else enumerate(names) if isinstance(names, list) else ())
    if not pairs or not all(re.fullmatch(r"\d{1,9}", str(key)) and isinstance(name, str) for key, name in pairs):
        raise UserError(f"{path}: expected the class names under 'names', found {shown(names)}")
    splits = {}
    for split, key in (("train", "train"), ("val", "val"), ("val", "valid"), ("test", "test")):
        values = data.get(key)
        values = [values] if isinstance(values, str) else values or []
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise UserError(f"{path}: {key}: expected a folder, a list file or several, found {shown(values)}")
        splits[split] = splits.get(split, []) + [slashes(value) for value in values if value]
    base = data.get("path")
    return {int(key): name for key, name in pairs}, slashes(base) if isinstance(base, str) else "", splits


def yolo_label(picture: str) -> Path | None:
    """The label file of a picture: in labels/ where the picture is in images/, or beside it."""
    beside = f"{stem(picture)}.txt"
    before, images, after = beside.rpartition("/images/")
    paths = ([f"{before}/labels/{after}"] if images else []) + [beside]
    return next((Path(path) for path in paths if is_there(Path(path))), None)


def plain_names(file: Path, names: dict[int, str]) -> dict[int, str]:
    """Class names in one printable line; where one is missing, the class goes by its number."""
    plain = {number: class_name(name) or f"class {number}" for number, name in sorted(names.items())}
    twice = [name for name, count in Counter(plain.values()).items() if count > 1]
    if twice:
        raise UserError(f"{file}: two classes are called '{twice[0]}'")
    return plain
