"""VOC and COCO annotations, read into flat arrays that worker processes share and never copy."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import os
import xml.etree.ElementTree as ElementTree
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from lib import distributed
from lib.errors import UserError, did_you_mean

logger = logging.getLogger(__name__)
Image = tuple[str, str, int, int]  # id, path, width, height
COLUMNS = 8  # of the table of objects: image (a position in the list of images), label, x1, y1, x2, y2, ignore, area
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class PackedStrings:
    """Strings in two shared tensors: a forked process that reads a list of Python strings ends up copying it."""

    def __init__(self, strings: Sequence[str]) -> None:
        encoded = [string.encode() for string in strings]
        self.bytes = torch.from_numpy(np.frombuffer(bytearray(b"".join(encoded)), dtype=np.uint8)).share_memory_()
        self.offsets = _offsets(np.array([len(e) for e in encoded], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> str:
        start, stop = self.offsets[i], self.offsets[i + 1]
        return self.bytes[start:stop].numpy().tobytes().decode()


@dataclass(frozen=True)
class Annotations:
    """N images, sorted by id, and their M objects, in the order of the files.

    boxes (M, 4) float32 pixels, xyxy, continuous (0-based, x2 - x1 wide), inside the image; labels (M,) int64 from 1;
    ignore (M,) bool, VOC's difficult or COCO's crowd; area (M,) float32, COCO's own or width x height; offsets (N + 1,)
    into those; sizes (N, 2) int32, width and height. All tensors lie in shared memory. `category_ids` are COCO's own,
    else 1..C. `dropped` says of each box that was left out where and why.
    """

    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    boxes: Tensor
    labels: Tensor
    ignore: Tensor
    area: Tensor
    offsets: Tensor
    sizes: Tensor
    ids: PackedStrings
    paths: PackedStrings
    dropped: list[str]

    def __len__(self) -> int:
        return len(self.sizes)

    def path(self, i: int) -> str:
        """The picture's file."""
        return self.paths[i]

    def image_id(self, i: int) -> str:
        """The file's name under the image folder, without its suffix."""
        return self.ids[i]

    def target(self, i: int) -> dict[str, Tensor]:
        """Views of boxes (K, 4), labels (K,), ignore (K,) and area (K,) of image `i`."""
        where = slice(int(self.offsets[i]), int(self.offsets[i + 1]))
        return {name: getattr(self, name)[where] for name in ("boxes", "labels", "ignore", "area")}

    def ground_truth(self, indices: Iterable[int]) -> list[dict[str, Tensor]]:
        """The targets of some images, as `lib.metrics` takes them."""
        return [self.target(i) for i in indices]

    def fingerprint(self) -> str:
        """SHA-256 over classes, ids, sizes and objects; the same wherever the folder lies."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        tensors = (self.boxes, self.labels, self.ignore, self.area, self.offsets, self.sizes)
        for tensor in (*tensors, self.ids.bytes, self.ids.offsets):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()


def _offsets(counts: np.ndarray) -> Tensor:
    return torch.from_numpy(np.concatenate(([0], np.cumsum(counts))).astype(np.int64)).share_memory_()


def _assemble(
    classes: Sequence[str], category_ids: Sequence[int], images: list[Image], objects: np.ndarray, source: Path
) -> Annotations:
    """Annotations from `images` and the (M, 8) table of objects: sorted, clipped to the image, without empty boxes."""
    if not images:
        raise UserError(f"{source}: no readable image is left in this set")
    order = sorted(range(len(images)), key=lambda i: images[i][0])
    position = np.empty(len(images), dtype=np.int64)
    position[order] = np.arange(len(images))
    images = [images[i] for i in order]
    for one, other in itertools.pairwise(images):
        if one[0] == other[0]:
            raise UserError(f"{source}: image '{one[0]}' is there twice ({one[1]}, {other[1]})")

    owner = position[objects[:, 0].astype(np.int64)]
    by_image = np.argsort(owner, kind="stable")
    owner, objects = owner[by_image], objects[by_image]
    sizes = np.array([image[2:] for image in images], dtype=np.int32)
    raw = objects[:, 2:6]
    boxes = np.clip(raw, 0, np.tile(sizes[owner], 2))
    # A box that is one pixel wide or high is how VOC's inclusive corners write "no area"; one rule for both formats.
    keep = _has_area(boxes)
    dropped = [
        f"{images[owner[i]][1]}: box {raw[i].tolist()} of '{classes[int(objects[i, 1]) - 1]}' "
        + (f"lies outside of the image ({sizes[owner[i]].tolist()})" if _has_area(raw[i]) else "has no area")
        for i in np.flatnonzero(~keep)
    ]
    owner, objects, boxes = owner[keep], objects[keep], boxes[keep]
    own_area = objects[:, 7]
    area = np.where(np.isnan(own_area), (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]), own_area)
    return Annotations(
        classes=tuple(classes),
        category_ids=tuple(category_ids),
        boxes=_shared(boxes, np.float32),
        labels=_shared(objects[:, 1], np.int64),
        ignore=_shared(objects[:, 6], np.bool_),
        area=_shared(area, np.float32),
        offsets=_offsets(np.bincount(owner, minlength=len(images))),
        sizes=_shared(sizes, np.int32),
        ids=PackedStrings([image[0] for image in images]),
        paths=PackedStrings([image[1] for image in images]),
        dropped=dropped,
    )


def _has_area(boxes_xyxy: np.ndarray) -> np.ndarray:
    """False also for corners that are not numbers."""
    return (boxes_xyxy[..., 2] - boxes_xyxy[..., 0] > 1) & (boxes_xyxy[..., 3] - boxes_xyxy[..., 1] > 1)


def _shared(values: np.ndarray, kind: type) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=kind)).share_memory_()


class _Faults:
    """What is wrong with a file: raised, or, under `on_error: skip`, logged."""

    def __init__(self, on_error: str) -> None:
        self.skip = on_error == "skip"

    def __call__(self, message: str) -> None:
        if not self.skip:
            raise UserError(message)
        if distributed.world().main:
            logger.warning("%s; skipped", message)


def _listing(folder: Path) -> set[str]:
    """Names in `folder`, read at once: asking for 118,000 files one by one takes long on a network disk."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    return {entry.name for entry in os.scandir(folder)}


# ---------------------------------------------------------------------------------------------------------------- VOC


def find_voc_sets(root: Path, sets: Sequence[str], default: str) -> list[str]:
    """Image sets under `root`, which is a VOCdevkit ("VOC2007/trainval") or a bare folder ("trainval").

    No `sets` means every one there that is called `default`. Raises UserError with the sets that exist.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder (data.root)")
    files = sorted(file for place in ("", "*/", "VOCdevkit/*/") for file in root.glob(f"{place}ImageSets/Main/*.txt"))
    there = [(file.parents[2].relative_to(root) / file.stem).as_posix() for file in files]
    if not there:
        raise UserError(f"{root}: expected ImageSets/Main/*.txt in it or in the folders of a VOCdevkit, found none")
    for name in sets:
        if name not in there:
            raise UserError(f"{root}: no image set '{name}'{did_you_mean(name, there)}")
    found = list(sets) or [name for name in there if PurePosixPath(name).name == default]
    if not found:
        of_all_classes = [name for name in there if "_" not in PurePosixPath(name).name]
        raise UserError(f"{root}: no image set is called '{default}', there are {', '.join(of_all_classes)}: name one")
    return found


def read_voc(
    root: str | Path, sets: Sequence[str], classes: Sequence[str] = (), on_error: str = "raise"
) -> Annotations:
    """Annotations of some VOC image sets (`find_voc_sets`). No `classes` means the names found, sorted.

    VOC's boxes are 1-based and inclusive: (x1, y1, x2, y2) becomes (x1 - 1, y1 - 1, x2, y2).
    """
    root, faults = Path(root), _Faults(on_error)
    images: list[Image] = []
    objects = array("d")
    names: list[str] = []
    sources: list[Path] = []
    for name in sets:
        folder = root / PurePosixPath(name).parent
        pictures = {Path(n).stem: n for n in sorted(_listing(folder / "JPEGImages")) if n.lower().endswith(SUFFIXES)}
        listed = folder / "ImageSets" / "Main" / f"{PurePosixPath(name).name}.txt"
        # A second column, as in the image sets of one class, is not read.
        stems = [line.split()[0] for line in listed.read_text().splitlines() if line.strip()]
        if not stems:
            faults(f"{listed}: the image set is empty")
        for stem in stems:
            xml = folder / "Annotations" / f"{stem}.xml"
            if stem not in pictures:
                faults(f"{folder / 'JPEGImages' / stem}.jpg: no such image, but {name} lists it")
                continue
            try:
                width, height, found = _read_xml(xml)
            except UserError as error:
                faults(str(error))
                continue
            for class_name, *row in found:
                objects.extend((len(images), 0, *row, math.nan))
                names.append(class_name)
            images.append((stem, str(folder / "JPEGImages" / pictures[stem]), width, height))
            sources.append(xml)
    classes = tuple(classes) or tuple(sorted(set(names)))
    table = np.array(objects).reshape(-1, COLUMNS)
    label = {class_name: i for i, class_name in enumerate(classes, start=1)}
    table[:, 1] = [label.get(class_name, 0) for class_name in names]
    for i in np.flatnonzero(table[:, 1] == 0):
        faults(f"{sources[int(table[i, 0])]}: unknown class '{names[i]}'{did_you_mean(names[i], classes)}")
    return _assemble(classes, range(1, len(classes) + 1), images, table[table[:, 1] > 0], root)


def _read_xml(path: Path) -> tuple[int, int, list[tuple]]:
    """Width, height and (name, x1, y1, x2, y2, difficult) of each object."""
    try:
        tree = ElementTree.parse(path).getroot()
        width, height = (int(float(_text(tree, f"size/{key}"))) for key in ("width", "height"))
        if width < 1 or height < 1:
            raise ValueError(f"the size is {width} x {height}")
        objects = []
        for element in tree.iter("object"):
            x1, y1, x2, y2 = (float(_text(element, f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax"))
            difficult = int(element.findtext("difficult") or 0)
            objects.append((_text(element, "name"), x1 - 1, y1 - 1, x2, y2, difficult))
    except FileNotFoundError:
        raise UserError(f"{path}: no such annotation") from None
    except (ElementTree.ParseError, ValueError, OSError) as error:
        raise UserError(f"{path}: malformed VOC annotation: {error}") from None
    return width, height, objects


def _text(element: ElementTree.Element, path: str) -> str:
    text = (element.findtext(path) or "").strip()
    if not text:
        raise ValueError(f"<{path.replace('/', '><')}> is missing")
    return text


# --------------------------------------------------------------------------------------------------------------- COCO


def read_coco(
    annotations: str | Path, image_folder: str | Path, classes: Sequence[str] = (), on_error: str = "raise"
) -> Annotations:
    """Annotations of an instances JSON. No `classes` means its categories by id; crowds are marked `ignore`.

    pycocotools' own reader keeps a Python object of every annotation and names no file in its errors, so the JSON is
    read here, and the tests hold the outcome against pycocotools.
    """
    path, folder, faults = Path(annotations), Path(image_folder), _Faults(on_error)
    document, table = _read_json(path)
    classes, category_ids = _coco_classes(path, document, classes)
    pictures = _listing(folder)
    images: list[Image] = []
    positions: dict[int, int] = {}  # of COCO's image id in `images`; -1 for an image that was skipped
    for entry in document["images"]:
        try:
            name, width, height = entry["file_name"], int(entry["width"]), int(entry["height"])
            if positions.setdefault(entry["id"], -1) >= 0:
                raise ValueError("its id is there twice")
        except (KeyError, TypeError, ValueError) as error:
            faults(f"{path}: malformed image entry {str(entry)[:120]}: {error}")
            continue
        if not (name in pictures or ("/" in name and (folder / name).is_file())):
            faults(f"{folder / name}: no such image, but {path} lists it")
            continue
        positions[entry["id"]] = len(images)
        images.append((str(PurePosixPath(name).with_suffix("")), str(folder / name), width, height))

    for entry in document["annotations"]:
        if entry is not None:
            faults(f"{path}: malformed annotation {str(entry)[:120]}")
    label = {category_id: i for i, category_id in enumerate(category_ids, start=1)}
    other = {category["id"]: category["name"] for category in document["categories"]}
    for category_id in np.unique(table[:, 1]).astype(int).tolist():
        if category_id not in label:
            name = other.get(category_id, category_id)
            faults(f"{path}: unknown class '{name}'{did_you_mean(name, classes)}")
    unknown_image = sorted({int(i) for i in np.unique(table[:, 0])} - positions.keys())
    if unknown_image:
        faults(f"{path}: annotations of image {unknown_image[0]}, which is not among its images")
    table[:, 0] = [positions.get(i, -1) for i in table[:, 0]]
    table[:, 1] = [label.get(i, 0) for i in table[:, 1]]
    return _assemble(classes, category_ids, images, table[(table[:, 0] >= 0) & (table[:, 1] > 0)], path)


def _read_json(path: Path) -> tuple[dict, np.ndarray]:
    """The JSON without its annotations, and those as an (M, 8) table whose first columns are COCO's own ids.

    An annotation becomes eight numbers as soon as it is parsed: as Python objects, those of COCO take gigabytes.
    """
    flat = array("d")

    def keep_numbers_only(entry: dict) -> dict | None:
        try:
            x, y, width, height = entry["bbox"]
            ids, crowd, area = (
                (entry["image_id"], entry["category_id"]),
                entry.get("iscrowd", 0),
                entry.get("area", math.nan),
            )
            flat.extend(array("d", (*ids, x, y, x + width, y + height, crowd, area)))
        except (KeyError, TypeError, ValueError):
            return entry
        return None

    try:
        document = json.loads(path.read_bytes(), object_hook=keep_numbers_only)
    except FileNotFoundError:
        raise UserError(f"{path}: no such annotation file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: malformed JSON: {error}") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(document, dict) or not isinstance(document.get(key), list):
            raise UserError(f"{path}: malformed COCO annotations: no list '{key}'")
    return document, np.array(flat).reshape(-1, COLUMNS)


def _coco_classes(path: Path, document: dict, classes: Sequence[str]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    try:
        ids = {category["name"]: int(category["id"]) for category in document["categories"]}
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: malformed COCO annotations: a category lacks its id or its name") from None
    if len(ids) < len(document["categories"]):
        raise UserError(f"{path}: two categories have the same name")
    for name in classes:
        if name not in ids:
            raise UserError(f"{path}: unknown class '{name}'{did_you_mean(name, ids)}")
    names = tuple(classes) or tuple(sorted(ids, key=ids.__getitem__))
    return names, tuple(ids[name] for name in names)
