"""VOC and COCO annotations, read into flat tensors that loader processes share without a copy."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import os
import xml.etree.ElementTree as ElementTree
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from lib import distributed
from lib.errors import UserError, did_you_mean
from lib.images import SUFFIXES

logger = logging.getLogger(__name__)
Image = tuple[str, str, int, int, int | str]  # id, path, width, height, the data set's own id

# One object while a file is read, eight float64: the image as its position in a list, a label from 1, a box in pixels,
# whether the object is ignored, and its area, NaN if the file gives none.
OBJECT = np.dtype([("image", "f8"), ("label", "f8"), ("box_xyxy", "f8", 4), ("ignore", "f8"), ("area", "f8")])


class PackedStrings:
    """Strings in two shared tensors: a forked process that reads a list of Python strings ends up copying it."""

    def __init__(self, strings: Sequence[str]) -> None:
        encoded = [string.encode() for string in strings]
        self.bytes = _shared(np.frombuffer(bytearray(b"".join(encoded)), dtype=np.uint8), np.uint8)
        self.offsets = _offsets([len(part) for part in encoded])

    def __getitem__(self, i: int) -> str:
        start, stop = self.offsets[i], self.offsets[i + 1]
        return self.bytes[start:stop].numpy().tobytes().decode()


@dataclass(frozen=True)
class Annotations:
    """N images, sorted by id, and their M objects, in the order of the files. All tensors are in shared memory."""

    classes: tuple[str, ...]
    category_ids: tuple[int, ...]  # COCO's own, else 1..C
    boxes: Tensor  # (M, 4) float32 xyxy, continuous pixels from 0, inside the image
    labels: Tensor  # (M,) int64, from 1
    ignore: Tensor  # (M,) bool: "difficult" in VOC, "iscrowd" in COCO
    area: Tensor  # (M,) float32: COCO's own, else width x height
    offsets: Tensor  # (N + 1,) int64: the objects of image i are offsets[i] to offsets[i + 1]
    sizes: Tensor  # (N, 2) int32: width, height
    ids: PackedStrings  # the files' names under the image folder, without suffix
    paths: PackedStrings  # of the pictures
    dropped: list[str]  # one line for each box that was left out: where and why
    own_ids: PackedStrings  # the data set's own image ids as JSON: see `image_id`

    def image_id(self, i: int) -> int | str:
        """The data set's own id of image `i`: COCO's, else the file's name under the image folder, without suffix."""
        return json.loads(self.own_ids[i])

    def __len__(self) -> int:
        return len(self.sizes)

    def target(self, i: int) -> dict[str, Tensor]:
        """Views of boxes (K, 4), labels (K,), ignore (K,) and area (K,) of image `i`."""
        rows = slice(int(self.offsets[i]), int(self.offsets[i + 1]))
        return {name: getattr(self, name)[rows] for name in ("boxes", "labels", "ignore", "area")}

    def ground_truth(self, indices: Iterable[int]) -> list[dict[str, Tensor]]:
        """The targets of some images, as `lib.metrics` takes them."""
        return [self.target(i) for i in indices]

    def fingerprint(self) -> str:
        """SHA-256 of classes, ids, sizes and objects; it does not depend on where the folder is."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        objects = (self.boxes, self.labels, self.ignore, self.area, self.offsets)
        for tensor in (*objects, self.sizes, self.ids.bytes, self.ids.offsets):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()


def find_voc_sets(root: Path, sets: Sequence[str], default: str) -> list[str]:
    """Image sets under `root`, which is a VOCdevkit ("VOC2007/trainval") or a bare folder ("trainval").

    An empty `sets` selects every set named `default`. Raises UserError that lists the sets that exist.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder (data.root)")
    files = sorted(file for parent in ("", "*/", "VOCdevkit/*/") for file in root.glob(f"{parent}ImageSets/Main/*.txt"))
    existing = [(file.parents[2].relative_to(root) / file.stem).as_posix() for file in files]
    if not existing:
        raise UserError(f"{root}: expected ImageSets/Main/*.txt in it or in the folders of a VOCdevkit, found none")
    for name in sets:
        if name not in existing:
            raise UserError(f"{root}: no image set '{name}'{did_you_mean(name, existing)}")
    found = list(sets) or [name for name in existing if PurePosixPath(name).name == default]
    if not found:
        # A VOC year has two sets for each class, such as cat_train.txt.
        of_all_classes = [name for name in existing if "_" not in PurePosixPath(name).name]
        raise UserError(f"{root}: no image set is called '{default}', found {', '.join(of_all_classes)}: name one")
    return found


def read_voc(root: Path, sets: Sequence[str], classes: Sequence[str] = (), on_error: str = "raise") -> Annotations:
    """Annotations of some VOC image sets, named as by `find_voc_sets`.

    Empty `classes` stands for all names found, sorted. A faulty entry raises UserError, or is logged and left out if
    `on_error` is "skip".
    """
    images: list[Image] = []
    found: list[tuple] = []  # OBJECTs with the class's name for its label, which is known once all files are read
    for set_name in sets:
        for stem, picture, xml in _list_voc_set(root, set_name, on_error):
            try:
                width, height, objects = _read_voc_xml(xml)
            except UserError as error:
                _fault(str(error), on_error)
                continue
            for name, box_xyxy, difficult in objects:
                if classes and name not in classes:
                    _fault(f"{xml}: unknown class '{name}'{did_you_mean(name, classes)}", on_error)
                else:
                    found.append((len(images), name, box_xyxy, difficult, math.nan))
            images.append((stem, str(picture), width, height, stem))
    classes = tuple(classes) or tuple(sorted({name for _, name, *_ in found}))
    label_of = {name: label for label, name in enumerate(classes, start=1)}
    objects = np.array([(image, label_of[name], *rest) for image, name, *rest in found], dtype=OBJECT)
    return _assemble(classes, range(1, len(classes) + 1), images, objects, root)


def _list_voc_set(root: Path, set_name: str, on_error: str) -> Iterator[tuple[str, Path, Path]]:
    """(stem, picture, annotation) of each image of the set whose picture exists."""
    folder = root / PurePosixPath(set_name).parent
    pictures = folder / "JPEGImages"
    file_of = {Path(name).stem: name for name in sorted(_listing(pictures)) if name.lower().endswith(SUFFIXES)}
    list_file = folder / "ImageSets" / "Main" / f"{PurePosixPath(set_name).name}.txt"
    # The image sets of one class have a second column, which is not read.
    stems = [line.split()[0] for line in list_file.read_text().splitlines() if line.strip()]
    if not stems:
        _fault(f"{list_file}: the image set is empty", on_error)
    for stem in stems:
        if stem in file_of:
            yield stem, pictures / file_of[stem], folder / "Annotations" / f"{stem}.xml"
        else:
            _fault(f"{pictures / stem}.jpg: no such image, but {set_name} lists it", on_error)


def _read_voc_xml(path: Path) -> tuple[int, int, list[tuple[str, tuple[float, ...], int]]]:
    """Width, height and (name, box, difficult) of each object."""
    try:
        tree = ElementTree.parse(path).getroot()
        width, height = (int(float(_text(tree, f"size/{key}"))) for key in ("width", "height"))
        if width < 1 or height < 1:
            raise ValueError(f"the size is {width} x {height}")
        objects = []
        for element in tree.iter("object"):
            x1, y1, x2, y2 = (float(_text(element, f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax"))
            # VOC's corners are 1-based and inclusive.
            box_xyxy = (x1 - 1, y1 - 1, x2, y2)
            objects.append((_text(element, "name"), box_xyxy, int(element.findtext("difficult") or 0)))
    except (ElementTree.ParseError, ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read as a VOC annotation: {error}") from None
    return width, height, objects


def _text(element: ElementTree.Element, path: str) -> str:
    text = (element.findtext(path) or "").strip()
    if not text:
        raise ValueError(f"<{path.replace('/', '><')}> is missing")
    return text


def read_coco(path: Path, folder: Path, classes: Sequence[str] = (), on_error: str = "raise") -> Annotations:
    """Annotations of a COCO instances file, whose pictures are in `folder`.

    Empty `classes` stands for all of its categories, sorted by id. A faulty entry raises UserError, or is logged and
    left out if `on_error` is "skip". (pycocotools' own reader keeps each annotation as a dict and names no file.)
    """
    document, objects = _parse_coco(path, on_error)
    id_of = _coco_categories(path, document["categories"])
    for name in classes:
        if name not in id_of:
            raise UserError(f"{path}: unknown class '{name}'{did_you_mean(name, id_of)}")
    classes = tuple(classes) or tuple(sorted(id_of, key=id_of.__getitem__))
    category_ids = tuple(id_of[name] for name in classes)
    images, position_of = _coco_images(path, folder, document["images"], on_error)

    # What the annotations refer to must be known.
    label_of = {category_id: label for label, category_id in enumerate(category_ids, start=1)}
    name_of = {category_id: name for name, category_id in id_of.items()}
    for category_id in sorted(set(objects["label"].tolist()) - label_of.keys()):
        name = name_of.get(category_id, f"{category_id:.0f}")
        _fault(f"{path}: unknown class '{name}'{did_you_mean(name, classes)}", on_error)
    unlisted = set(objects["image"].tolist()) - position_of.keys()
    if unlisted:
        _fault(f"{path}: annotations of image {min(unlisted):.0f}, which is not among its images", on_error)

    # COCO's ids become positions and labels. Objects of skipped images and unselected classes are left out.
    objects["image"] = [position_of.get(image_id, -1) for image_id in objects["image"].tolist()]
    objects["label"] = [label_of.get(category_id, 0) for category_id in objects["label"].tolist()]
    known = (objects["image"] >= 0) & (objects["label"] > 0)
    return _assemble(classes, category_ids, images, objects[known], path)


def _parse_coco(path: Path, on_error: str) -> tuple[dict, np.ndarray]:
    """The document, and its annotations as OBJECTs whose "image" and "label" are still COCO's ids."""
    # An annotation becomes eight numbers as soon as it is parsed: as Python objects, those of COCO take gigabytes.
    flat = array("d")

    def keep_numbers_only(entry: dict) -> dict | None:
        try:
            x, y, width, height = entry["bbox"]
            crowd, area = entry.get("iscrowd", 0), entry.get("area", math.nan)
            # An array of its own first: an entry with a value that is no number must add nothing to `flat`.
            flat.extend(array("d", (entry["image_id"], entry["category_id"], x, y, x + width, y + height, crowd, area)))
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
    for entry in document["annotations"]:
        if entry is not None:
            _fault(f"{path}: malformed annotation {str(entry)[:120]}", on_error)
    return document, np.array(flat).view(OBJECT)


def _coco_categories(path: Path, categories: list) -> dict[str, int]:
    """COCO's id of each class name."""
    try:
        id_of = {category["name"]: int(category["id"]) for category in categories}
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: malformed COCO annotations: a category lacks its id or its name") from None
    if len(id_of) < len(categories):
        raise UserError(f"{path}: two categories have the same name")
    return id_of


def _coco_images(path: Path, folder: Path, entries: list, on_error: str) -> tuple[list[Image], dict[int, int]]:
    """The images whose pictures exist, and the position of each COCO image id in them, -1 if it was skipped."""
    pictures = _listing(folder)
    images: list[Image] = []
    position_of: dict[int, int] = {}
    for entry in entries:
        try:
            name, width, height = entry["file_name"], int(entry["width"]), int(entry["height"])
            if position_of.setdefault(entry["id"], -1) >= 0:
                raise ValueError("its id is there twice")
        except (KeyError, TypeError, ValueError) as error:
            _fault(f"{path}: malformed image entry {str(entry)[:120]}: {error}", on_error)
            continue
        # `pictures` lists the folder itself; only a name in a subfolder has to be looked up on disk.
        if not (name in pictures or ("/" in name and (folder / name).is_file())):
            _fault(f"{folder / name}: no such image, but {path} lists it", on_error)
            continue
        position_of[entry["id"]] = len(images)
        images.append((str(PurePosixPath(name).with_suffix("")), str(folder / name), width, height, entry["id"]))
    return images, position_of


def _fault(message: str, on_error: str) -> None:
    """Report a fault of a file: raise UserError, or only log it if `on_error` is "skip"."""
    if on_error != "skip":
        raise UserError(message)
    if distributed.world().main:
        logger.warning("%s; skipped", message)


def _listing(folder: Path) -> set[str]:
    """Names in `folder`, read at once: asking for 118,000 files one by one takes long on a network disk."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    return {entry.name for entry in os.scandir(folder)}


def _assemble(
    classes: tuple[str, ...], category_ids: Iterable[int], images: list[Image], objects: np.ndarray, source: Path
) -> Annotations:
    """Annotations from `images` and their OBJECTs: sorted by image id, clipped to the image, without empty boxes."""
    if not images:
        raise UserError(f"{source}: no readable image is left in this set")
    order = sorted(range(len(images)), key=lambda i: images[i][0])
    images = [images[i] for i in order]
    for one, other in itertools.pairwise(images):
        if one[0] == other[0]:
            raise UserError(f"{source}: image '{one[0]}' is there twice ({one[1]}, {other[1]})")
    sizes = np.array([image[2:4] for image in images], dtype=np.int32)

    # Objects follow the order of the images; those of one image keep theirs.
    owner = np.argsort(order)[objects["image"].astype(np.int64)]
    by_image = np.argsort(owner, kind="stable")
    owner, objects = owner[by_image], objects[by_image]

    # Annotators draw beyond the edge of an image; what is left of such a box is kept.
    boxes = np.clip(objects["box_xyxy"], 0, np.tile(sizes[owner], 2))
    keep = _has_area(boxes)
    dropped = []
    for i in np.flatnonzero(~keep):
        box_xyxy, name = objects["box_xyxy"][i], classes[int(objects["label"][i]) - 1]
        outside = f"lies outside of the image ({sizes[owner[i]].tolist()})"
        reason = outside if _has_area(box_xyxy) else "has no area"
        dropped.append(f"{images[owner[i]][1]}: box {box_xyxy.tolist()} of '{name}' {reason}")
    owner, objects, boxes = owner[keep], objects[keep], boxes[keep]

    width_times_height = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return Annotations(
        classes=classes,
        category_ids=tuple(category_ids),
        boxes=_shared(boxes, np.float32),
        labels=_shared(objects["label"], np.int64),
        ignore=_shared(objects["ignore"], np.bool_),
        area=_shared(np.where(np.isnan(objects["area"]), width_times_height, objects["area"]), np.float32),
        offsets=_offsets(np.bincount(owner, minlength=len(images))),
        sizes=_shared(sizes, np.int32),
        ids=PackedStrings([image[0] for image in images]),
        paths=PackedStrings([image[1] for image in images]),
        dropped=dropped,
        own_ids=PackedStrings([json.dumps(image[4]) for image in images]),
    )


def _has_area(boxes_xyxy: np.ndarray) -> np.ndarray:
    """Whether boxes (..., 4) are wider and higher than one pixel, which is how VOC writes "no area"."""
    # Corners that are not numbers compare as false.
    return (boxes_xyxy[..., 2:] - boxes_xyxy[..., :2] > 1).all(-1)


def _offsets(counts: Sequence[int] | np.ndarray) -> Tensor:
    """(N + 1,) int64: where each of N consecutive groups starts, and the end of the last."""
    return _shared(np.concatenate(([0], np.cumsum(counts))), np.int64)


def _shared(values: np.ndarray, kind: type) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=kind)).share_memory_()
