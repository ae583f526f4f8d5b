"""Label files of other tools as checked records: VOC's XML, COCO's JSON, YOLO's text and YAML, lists of pictures.

Whatever a file holds, its reader returns values of the stated types and ranges, or raises UserError in one line that
names the file. What is wrong with a single object goes to `faults`, and the object is left out.
"""

import codecs
import contextlib
import functools
import itertools
import json
import logging
import math
import mmap
import posixpath
import re
import struct
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from lib import UserError, distributed
from lib.images import SPLIT_OF, SUFFIXES, Tree, loose, slashes, split_of, stem, suffix_of
from lib.plain import check, read_bytes, shown

logger = logging.getLogger(__name__)
MOST_BYTES = 64 * 1024**2  # of a label file that is not JSON
MOST_YAML, MOST_BRACKETS = 1024**2, 1000  # parsing takes time with the square of the latter
MOST_SHOWN = 20  # faults of a data set that are named; the others are counted
SNIFFED = 64 * 1024  # bytes at each end of a JSON file
LARGEST_SIDE = 1_000_000  # pixels; what is beyond is a mistake
FARTHEST = 10.0 * LARGEST_SIDE  # a corner beyond this is a mistake as well

# One object while a file is read: numbers of its picture and its class, a box in continuous pixels from 0, whether the
# object is ignored, and its area, NaN if the file gives none.
OBJECT = np.dtype([("image", "i8"), ("label", "i8"), ("box_xyxy", "f8", 4), ("ignore", "f8"), ("area", "f8")])
PACK_OBJECT = struct.Struct("2q6d").pack


class Faults:
    """The faults of a data set's files, each of which costs a picture or an object, and what else is to be said of it.

    `on_error` "raise": `close` raises one UserError that lists them. "skip": they are logged and counted, and `close`
    raises only if more than the share `max_skipped` of the pictures or the objects was lost.
    """

    def __init__(self, on_error: str = "raise", max_skipped: float = 1.0) -> None:
        self.skip = on_error == "skip"
        self.max_skipped = max_skipped
        # Every process of a job reads the same files.
        self.warn = logger.warning if distributed.world().main else logger.debug
        self.counts: Counter[tuple[str, str]] = Counter()  # by what was lost ("picture" or "object") and the kind
        self.named: list[str] = []
        self.notes: list[str] = []
        self.swapped = 0  # boxes whose corners were exchanged
        self.polygons = 0  # whose boxes are used

    def add(self, lost: str, kind: str, message: str, count: int = 1) -> None:
        self.counts[lost, kind] += count
        if len(self.named) < MOST_SHOWN:
            self.named.append(message)
            if self.skip:
                self.warn("%s; skipped", message)

    def close(self, source: Path, pictures: int, objects: int) -> list[str]:
        """The notes, with a line for each kind of loss beside the `pictures` and `objects` that are left."""
        if self.named and not self.skip:
            head = f"{source}: {self.counts.total()} faults (data.on_error=skip leaves them out), such as:"
            raise UserError(*([head] if len(self.named) > 1 else []), *self.named)
        if self.swapped:
            self.notes.append(f"{source}: {self.swapped} boxes had their corners in the wrong order: put right")
        if self.polygons:
            text = f"{self.polygons} objects are polygons, whose bounding boxes are used (keypoints need kpt_shape)"
            self.notes.append(f"{source}: {text}")
        for lost, left in (("picture", pictures), ("object", objects)):
            kinds = {kind: count for (what, kind), count in self.counts.items() if what == lost}
            gone = sum(kinds.values())
            reasons = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
            line = f"{source}: {gone} of {gone + left} {lost}s left out ({reasons})"
            if gone > self.max_skipped * (gone + left):
                raise UserError(f"{line}, more than data.max_skipped={self.max_skipped:g}; the first: {self.named[0]}")
            if gone:
                self.notes.append(line)
                self.warn("%s", line)
        return self.notes


# Text, and names of files. Paths have forward slashes.


def read_text(path: Path) -> str:
    """UTF-8 with or without a byte order mark, or UTF-16 with one, else Windows-1252 or Latin-1, which any file is."""
    return _decoded(read_bytes(path, MOST_BYTES))


def _decoded(data: bytes) -> str:
    utf = "utf-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    for encoding in (utf, "cp1252"):
        with contextlib.suppress(UnicodeDecodeError):
            return data.decode(encoding)
    return data.decode("latin-1")


def read_lines(path: Path) -> list[str]:
    """The lines that are not blank."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def class_name(value: object) -> str:
    """The name of a class in one printable line; "" where there is none. A number becomes its text."""
    if not isinstance(value, (str, int, float)) or isinstance(value, bool):
        return ""
    text = value if isinstance(value, str) else shown(value)
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def numbers_of(values: Sequence, low: float, high: float) -> list[float] | None:
    """The numbers, or the numbers in the texts, `values`; None if one is none from `low` to `high`."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        numbers = [float(value) for value in values]
        if all(low <= number <= high for number in numbers):
            return numbers
    return None


def usable_size(*sides: object) -> tuple[int, int] | None:
    """Width and height of a picture as whole numbers; None where they are missing, zero or absurd."""
    numbers = numbers_of(sides, 1, LARGEST_SIDE)
    return tuple(map(int, numbers)) if numbers and all(map(float.is_integer, numbers)) else None


def refuse_twice(source: Path, what: str, values: list) -> None:
    """Raise UserError if two classes have the same name, or the same id."""
    value, count = Counter(values).most_common(1)[0] if values else ("", 0)
    if count > 1:
        raise UserError(f"{source}: {count} classes have the same {what} {shown(value)}")


# VOC.


class VocFile(NamedTuple):
    filename: str  # of the picture, without folders; "" where there is none
    size: tuple[int, int] | None  # width, height; None where the picture has to be asked
    objects: list[tuple[str, tuple[float, ...], bool]]  # class, box, difficult


def read_voc_xml(path: Path, faults: Faults) -> VocFile:
    """One VOC annotation. Corners in the wrong order are put right."""
    try:
        tree = _parse_xml(read_bytes(path, MOST_BYTES))
    except (ElementTree.ParseError, ValueError, LookupError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as a VOC annotation: {error}") from None
    if tree.tag != "annotation":
        raise UserError(f"{path}: not a VOC annotation: expected <annotation>, found <{tree.tag[:40]}>")
    objects = []
    for element in tree.iter("object"):
        texts = [element.findtext(f"bndbox/{key}") or "" for key in ("xmin", "ymin", "xmax", "ymax")]
        name = class_name(element.findtext("name"))
        corners = numbers_of(texts, -FARTHEST, FARTHEST)
        if not name or not corners or len(element.findall("bndbox")) > 1:
            found = shown([element.findtext("name"), *texts])
            expected = "expected <name> and the numbers <xmin>, <ymin>, <xmax>, <ymax> in one <bndbox>"
            faults.add("object", "malformed object", f"{path}: malformed object: {expected}, found {found}")
            continue
        x1, y1, x2, y2 = corners
        # VOC's corners are 1-based and inclusive, so a box without width has x1 = x2 + 1.
        if x1 > x2 + 1 or y1 > y2 + 1:
            faults.swapped += 1
            x1, x2 = sorted((x1, x2))
            y1, y2 = sorted((y1, y2))
        difficult = (element.findtext("difficult") or "").strip().lower()
        objects.append((name, (x1 - 1, y1 - 1, x2, y2), difficult in ("1", "1.0", "true", "yes")))
    filename = posixpath.basename(slashes((tree.findtext("filename") or "").strip()))
    return VocFile(filename, usable_size(tree.findtext("size/width"), tree.findtext("size/height")), objects)


def _parse_xml(data: bytes) -> ElementTree.Element:
    """XML, also of an encoding that the parser does not know, or that is not declared, or after blank lines."""
    with contextlib.suppress(ElementTree.ParseError, ValueError, LookupError):
        return ElementTree.fromstring(data)
    declared = re.search(rb"<\?xml[^>]*encoding=[\"']([\w.-]+)", data[:200])
    foreign = declared and not declared[1].lower().startswith(b"utf")
    return ElementTree.fromstring((data.decode(declared[1].decode()) if foreign else _decoded(data)).lstrip())


def picture_name(path: Path) -> str:
    """The <filename> of a VOC annotation; "" where it cannot be read."""
    with contextlib.suppress(UserError):
        return read_voc_xml(path, Faults()).filename
    return ""


# COCO.


class CocoFile(NamedTuple):
    images: dict[int | str, tuple[str, tuple[int, int] | None]]  # file name, and size where the file has it, by id
    categories: dict[int, str]  # names by id, sorted by id
    objects: np.ndarray  # (M,) of OBJECT
    image_ids: list[int | str]  # the image id that each number in `objects` stands for
    category_ids: list[int | str]  # likewise


_TAKEN = object()  # in the document: an annotation whose numbers were taken


def read_coco_json(path: Path, faults: Faults) -> CocoFile:
    """A COCO instances file. (pycocotools' own reader keeps each annotation as a dict and names no file.)"""
    # An annotation becomes an OBJECT as soon as it is parsed: as Python objects, those of COCO take gigabytes. Ids are
    # integers of any length or strings, so the numbers are places in these dicts.
    packed = bytearray()
    image_number, category_number = (defaultdict(itertools.count().__next__) for _ in range(2))

    def take_numbers(entry: dict) -> Any:
        if "bbox" not in entry:
            return entry
        try:
            area, crowd = entry.get("area"), entry.get("iscrowd") or 0
            area = math.nan if area is None else float(area)
            image, category = image_number[entry["image_id"]], category_number[entry["category_id"]]
            x, y, width, height = map(float, entry["bbox"])
            packed.extend(PACK_OBJECT(image, category, x, y, x + width, y + height, float(crowd), area))
        except (KeyError, TypeError, ValueError, OverflowError, struct.error):
            return entry
        return _TAKEN

    try:
        size = path.stat().st_size if path.is_file() else 0
        content = read_bytes(path, size)
        try:
            document = json.loads(content, object_hook=take_numbers)
        except UnicodeDecodeError:
            document = json.loads(_decoded(content), object_hook=take_numbers)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: malformed JSON: {error}") from None
    for key in ("images", "annotations", "categories"):
        check(check(document, dict, str(path)).get(key), list, f"{path}: {key}")
    objects = np.frombuffer(packed, OBJECT)
    malformed = [shown(entry) for entry in document["annotations"] if entry is not _TAKEN]
    if len(document["annotations"]) - len(malformed) != len(objects):
        raise UserError(f"{path}: malformed COCO annotations: some stand outside of the list 'annotations'")
    boxes = objects["box_xyxy"].reshape(-1, 2, 2)
    faults.swapped += int((boxes[:, 1] < boxes[:, 0]).any(1).sum())
    boxes.sort(axis=1)  # where a width or a height is negative
    # NaN is no box, but the area of an object whose area the file does not give.
    usable = (np.abs(objects["box_xyxy"]) <= FARTHEST).all(1) & ~(np.abs(objects["area"]) > FARTHEST**2)
    malformed += [shown(box) for box in objects["box_xyxy"][~usable].tolist()]
    for found in malformed:
        expected = "expected image_id, category_id and bbox (four numbers), found"
        faults.add("object", "malformed annotation", f"{path}: malformed annotation: {expected} {found}")
    images: dict[int | str, tuple[str, tuple[int, int] | None]] = {}
    for entry in document["images"]:
        image = entry if isinstance(entry, dict) else {}
        number, name = image.get("id"), image.get("file_name") or image.get("coco_url")  # the latter in LVIS
        if type(number) not in (int, str) or not isinstance(name, str) or number in images:
            problem = "expected an 'id' of its own and a 'file_name'"
            faults.add("picture", "malformed entry", f"{path}: malformed image entry {shown(entry)}: {problem}")
            continue
        name = re.sub(r"(?<=\w)(://[^?]*)\?.*", r"\1", slashes(name))  # an address may end with a signature
        images[number] = name, usable_size(image.get("width"), image.get("height"))
    categories = _coco_categories(path, document["categories"], category_number, faults)
    return CocoFile(images, categories, objects[usable], list(image_number), list(category_number))


def _coco_categories(path: Path, entries: list, used: dict, faults: Faults) -> dict[int, str]:
    """Names by id, sorted. Without a name, a class goes by its id."""
    found: list[tuple[int, str, str]] = []
    for entry in entries:
        if not isinstance(entry, dict) or type(number := entry.get("id")) is not int or "name" not in entry:
            raise UserError(f"{path}: malformed category {shown(entry)}: expected an id, a whole number, and a name")
        name = class_name(entry["name"]) or f"category {shown(number)}"
        found.append((number, name, class_name(entry.get("supercategory"))))
    root, *others = sorted(found) or [(-1, "", "")]
    if others and root[0] == 0 and 0 not in used and all(other[2] == root[1] for other in others):
        # Roboflow lists the project itself as category 0, the super-category of all others.
        found = others
        faults.notes.append(f"{path}: category 0, '{root[1]}', is the super-category of the others: left out")
    refuse_twice(path, "id", [number for number, _, _ in found])
    refuse_twice(path, "name", [name for _, name, _ in found])
    return {number: name for number, name, _ in sorted(found)}


def is_voc(path: Path) -> bool:
    """Whether an XML file is a VOC annotation, or cannot be read."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        return re.search(rb"<annotation[\s>]", file.read(SNIFFED).replace(b"\0", b"")) is not None
    return True


def is_coco(path: Path) -> bool:
    """Whether a JSON file shows keys of COCO's: at its ends, where most tools write them, or inside."""
    keys = (b'"images"', b'"annotations"', b'"categories"')
    content: mmap.mmap | bytes = b""
    with contextlib.suppress(OSError, ValueError), path.open("rb") as file:  # ValueError: it is empty
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    ends = (content[:SNIFFED] + content[-SNIFFED:]).replace(b"\0", b"")  # UTF-16 has these
    found = sum(key in ends for key in keys)
    # Only a file that shows one of them is read as a whole.
    if found == 1:
        found = sum(content.find(key) >= 0 for key in keys)
    return found >= 2 and (keys[0] in ends or content.find(keys[0]) >= 0)  # Datumaro's have the others


# YOLO.


def read_yolo_txt(
    path: Path, names: dict[int, str], size: tuple[int, int], faults: Faults, keypoints: int = 0
) -> list[tuple[str, tuple[float, ...], bool]]:
    """As `VocFile.objects`, of a picture of `size` (width, height). Polygons become their boxes.

    A box may be followed by `keypoints` numbers, those of its keypoints, which are ignored.
    """
    objects = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        label, *texts = line.split()
        if keypoints and len(texts) == 4 + keypoints:
            texts = texts[:4]
        is_box = len(texts) == 4
        # -1 and 2 are marks of keypoints.
        shares = numbers_of(texts, *((-1, 2) if is_box else (-0.99, 1.99)))
        shares = shares if is_box or not keypoints else None
        known = numbers_of([label], 0, LARGEST_SIDE)
        if not known or not known[0].is_integer() or not shares or len(shares) < 4 or len(shares) % 2:
            expected = "expected a class, and shares of the picture: x, y, width and height, or a polygon"
            faults.add("object", "malformed line", f"{path}: line {number}: {expected}; found {shown(line)}")
            continue
        box = min(shares[::2]), min(shares[1::2]), max(shares[::2]), max(shares[1::2])
        faults.polygons += not is_box
        if is_box:
            x, y, width, height = shares
            faults.swapped += width < 0 or height < 0
            width, height = abs(width), abs(height)
            box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        name = names.get(int(known[0]), f"class {known[0]:g}")
        objects.append((name, tuple(share * side for share, side in zip(box, 2 * size, strict=True)), False))
    return objects


def has_labels(place: Path) -> bool:
    """Whether a folder has a picture with a label file; whether a list of pictures has a line."""
    if place.is_dir():
        return any(yolo_label(str(place / name)) for name in Tree(place).pictures)
    return suffix_of(place.name) in SUFFIXES or bool(read_lines(place))


def read_yolo_yaml(path: Path, root: Path | None = None) -> tuple[dict[int, str], dict[str, list[str]], int]:
    """Class names by number; the folders or lists of train, val and test; the count of an object's keypoint numbers."""
    text = read_text(path)
    if len(text) > MOST_YAML or text.count("[") + text.count("{") > MOST_BRACKETS:
        raise UserError(f"{path}: too large, or nested too deeply, for a description of a data set")
    try:
        # The base loader leaves every scalar as text: a class called yes or 1 stays that.
        data = check(yaml.load(text, Loader=yaml.BaseLoader), dict, str(path))
        data = {key.lower() if isinstance(key, str) else key: value for key, value in data.items()}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML: {shown(' '.join(str(error).split()))}") from None
    names = check(data.get("names"), list[str] | dict[str, str], f"{path}: names")
    names = dict(enumerate(names)) if isinstance(names, list) else names
    if not all(re.fullmatch(r"\d{1,9}", str(key)) for key in names):
        raise UserError(f"{path}: names: expected the numbers of the classes as keys, found {shown(list(names))}")
    base = data.get("path") if isinstance(data.get("path"), str) else ""
    parts = slashes(base).split("/")
    tails = ["/".join(parts[start:]) for start in range(len(parts))]
    if not any(posixpath.exists(folder / tail) for folder in (path.parent, root or path.parent) for tail in tails):
        base = ""  # of another machine
    places: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for key in ("train", "val", "valid", "test"):
        values = check(data.get(key) or [], str | list[str], f"{path}: {key}")
        values = [values] if isinstance(values, str) else values
        places[SPLIT_OF[key]] += [slashes(posixpath.join(base, value)) for value in values if value]
    shape = numbers_of(check(data.get("kpt_shape") or [], list[str], f"{path}: kpt_shape"), 0, 10_000) or [0]
    return plain_names(path, names), places, int(math.prod(shape))


def locate(bases: Sequence[Path], value: str) -> Path | None:
    """The file or folder that a path of data.yaml means: as it is, or where its leading folders are not here."""
    parts = value.split("/")
    # Not down to the bare name of a picture or of images/, which may be another one.
    starts = [i for i in range(1, len(parts)) if i < len(parts) - 1 or split_of(parts[i])]
    ends = [value, *("/".join(parts[start:]) for start in starts)]
    # --data names the folder: what lies in it comes before what data.yaml names elsewhere on this machine.
    root = posixpath.abspath(bases[-1])
    outside = None
    for path in (base / end for end in ends for base in dict.fromkeys(bases)):
        if posixpath.exists(path):
            if posixpath.abspath(path).startswith(f"{root}/"):
                return path
            outside = outside or path
    return outside


def plain_names(source: Path, names: dict) -> dict[int, str]:
    """Class names in one printable line; where one is missing, the class goes by its number."""
    plain = {int(key): class_name(name) or f"class {key}" for key, name in names.items()}
    refuse_twice(source, "name", list(plain.values()))
    return dict(sorted(plain.items()))


def yolo_label(picture: str) -> Path | None:
    """The label file of a picture: in labels/ where the picture is in images/, or beside it."""
    folder, name = posixpath.split(picture)
    parts = folder.split("/")
    places = [folder]
    if "images" in map(str.lower, parts):
        at = len(parts) - 1 - [part.lower() for part in reversed(parts)].index("images")
        # The sub-folders of labels/ are those of images/, or there are none.
        same, flat = (
            ["/".join([*parts[:at], word, *below]) for word in ("labels", "Labels")] for below in (parts[at + 1 :], [])
        )
        places = [*same, folder, *flat]  # the last may be those of other pictures
    for place in places:
        with contextlib.suppress(OSError):  # no such folder
            names = _names_in(place, Path(place).stat().st_mtime_ns)
            for label in (f"{stem(name)}.txt", f"{name}.txt"):
                if found := names.get(label) or names.get(loose(label)):
                    return Path(place, found)
    return None


def other_label(picture: str, label: Path) -> Path | None:
    """A label file beside a picture whose `label`, in another folder, says something else."""
    beside = Path(f"{stem(picture)}.txt")
    if beside.parent != label.parent and posixpath.exists(beside):
        text = read_text(beside)
        if re.match(r"\d+(\s+[-\d.]+){4}", text) and text.split() != read_text(label).split():
            return beside
    return None


@functools.lru_cache(maxsize=100)
def _names_in(folder: str, _changed: int) -> dict[str, str]:
    """The names in a folder, which was last changed at a time, by themselves and by how they are `loose`ly spelt."""
    names = [path.name for path in Path(folder).iterdir()]
    return {loose(name): name for name in names} | {name: name for name in names}
