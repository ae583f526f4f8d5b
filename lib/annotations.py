"""The annotations of a data set in flat tensors that loader processes share without a copy."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from posixpath import basename
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lib import UserError, did_you_mean
from lib.images import SUFFIXES, Tree, of_another_split, read_size, slashes, split_of, stem
from lib.labels import OBJECT, Faults, read_coco_json, read_voc_xml, read_yolo_txt
from lib.layouts import Pair
from lib.plain import shown

ROUNDING = 0.01  # pixels; shares of a picture, written with few digits, are off by less


class PackedStrings:
    """Strings in two shared tensors: a forked process that reads a list of Python strings ends up copying it."""

    def __init__(self, strings: Sequence[str]) -> None:
        # A file name need not be valid UTF-8: what is not stands in it as lone surrogates.
        encoded = [string.encode(errors="surrogatepass") for string in strings]
        self.bytes = _shared(np.frombuffer(bytearray(b"".join(encoded)), dtype=np.uint8), np.uint8)
        self.offsets = _offsets([len(part) for part in encoded])

    def __getitem__(self, i: int) -> str:
        start, stop = self.offsets[i], self.offsets[i + 1]
        return self.bytes[start:stop].numpy().tobytes().decode(errors="surrogatepass")


class Objects(NamedTuple):
    """M objects of N images, image by image, in the order of the files. All tensors are in shared memory."""

    boxes: Tensor  # (M, 4) float32 xyxy, continuous pixels from 0
    labels: Tensor  # (M,) int64, from 1
    ignore: Tensor  # (M,) bool: "difficult" in VOC, "iscrowd" in COCO
    area: Tensor  # (M,) float32: COCO's own, else width x height
    offsets: Tensor  # (N + 1,) int64: the objects of image i are offsets[i] to offsets[i + 1]

    def of(self, i: int) -> dict[str, Tensor]:
        """Views of boxes (K, 4), labels (K,), ignore (K,) and area (K,) of image `i`."""
        rows = slice(int(self.offsets[i]), int(self.offsets[i + 1]))
        return {name: getattr(self, name)[rows] for name in ("boxes", "labels", "ignore", "area")}


@dataclass(frozen=True)
class Annotations:
    """N images, sorted by id, with the objects that training sees and those that detections are compared with."""

    classes: tuple[str, ...]
    category_ids: tuple[int | None, ...]  # COCO's own (None: its file lacks the class), else 1..C
    objects: Objects  # for training: inside the image, wider and higher than a pixel
    truth: Objects  # for scoring: all, exactly as the files have them
    sizes: Tensor  # (N, 2) int32: width, height
    ids: PackedStrings  # the files' names under the image folder, without suffix
    own_ids: PackedStrings  # see `image_id`; as JSON
    paths: PackedStrings  # of the pictures
    notes: list[str]  # what was done to the data, a line each
    held_out: tuple[str, ...] = ()  # the ids that were kept for the test, where the data has no test split of its own

    def __len__(self) -> int:
        return len(self.sizes)

    def image_id(self, i: int) -> int | str:
        """The data set's own id of image `i`: COCO's, else the file's name under the image folder, without suffix."""
        return json.loads(self.own_ids[i])

    def ground_truth(self, indices: Iterable[int]) -> list[dict[str, Tensor]]:
        """What the detections in some images are compared with, as `lib.metrics` takes it."""
        return [self.truth.of(i) for i in indices]

    def subset(self, rows: Sequence[int]) -> Annotations:
        """The images of some rows, in their order."""

        def objects(of: Objects) -> Objects:
            parts = [of.of(i) for i in rows]
            columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            return Objects(**columns, offsets=_offsets([len(part["labels"]) for part in parts]))

        strings = {name: PackedStrings([getattr(self, name)[i] for i in rows]) for name in ("ids", "own_ids", "paths")}
        return replace(
            self, objects=objects(self.objects), truth=objects(self.truth), sizes=self.sizes[list(rows)], **strings
        )

    def fingerprint(self) -> str:
        """SHA-256 of classes, ids, sizes and objects; it does not depend on where the folder is."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for tensor in (*self.truth, self.sizes, self.ids.bytes, self.ids.offsets):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()


class Picture(NamedTuple):
    """One image while the files are read."""

    id: str
    own_id: int | str | None  # COCO's; else it is `id`
    path: str
    size: tuple[int, int]
    source: str  # the label file


class Content(NamedTuple):
    """What the files of a data set hold."""

    pictures: list[Picture]
    objects: np.ndarray  # (M,) of labels.OBJECT: places in `pictures` and in `names`
    names: Sequence[str]  # of classes
    classes: Sequence[str]  # in the data set's own order
    category_ids: dict[str, int] | None = None  # COCO's


def read_pairs(
    pairs: Iterable[Pair], faults: Faults, yolo_names: dict[int, str] | None = None, keypoints: int = 0
) -> Content:
    """The content of pictures with a label file each: VOC's, or with `yolo_names`, the classes by number, YOLO's."""
    pictures: list[Picture] = []
    found: list[tuple] = []  # of OBJECT
    number_of: dict[str, int] = {}
    picture_of: dict[Path, str] = {}  # by label file
    once: dict[str, Pair] = {}
    for pair in pairs:
        once.setdefault(pair.picture, pair)
    for name, path, label_file in once.values():
        try:
            if label_file and picture_of.setdefault(label_file, path) != path:
                raise UserError(f"{label_file}: belongs to two pictures, {picture_of[label_file]} and {path}")
            if yolo_names is None:
                voc = read_voc_xml(label_file, faults)
                size, objects = voc.size or read_size(path), voc.objects
            else:
                size = read_size(path)
                objects = read_yolo_txt(label_file, yolo_names, size, faults, keypoints) if label_file else []
        except UserError as error:
            faults.add("picture", "unreadable", str(error))
            continue
        for label, box_xyxy, ignore in objects:
            found.append((len(pictures), number_of.setdefault(label, len(number_of)), box_xyxy, ignore, math.nan))
        pictures.append(Picture(name, None, path, size, str(label_file or path)))
    classes = sorted(number_of) if yolo_names is None else list(yolo_names.values())
    return Content(pictures, np.array(found, dtype=OBJECT), list(number_of), classes)


def read_coco(folder: Path, files: Sequence[Path], faults: Faults) -> Content:
    """The content of COCO instances files, whose pictures are found below `folder`."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder (data.train_images, data.test_images)")
    tree = Tree(folder)
    pictures: list[Picture] = []
    parts: list[np.ndarray] = []
    names: list[str] = []
    id_of: dict[str, int] = {}
    for path in files:
        coco = read_coco_json(path, faults)
        place_of = _coco_pictures(path, tree, coco.images, pictures, faults)
        number_of = {category_id: len(names) + i for i, category_id in enumerate(coco.categories)}
        names += coco.categories.values()
        id_of = {name: category_id for category_id, name in coco.categories.items()} | id_of
        # The numbers of ids become places in the lists of pictures and of names, or -1, which is left out.
        for column, what, ids, known in (
            ("image", "images", coco.image_ids, place_of),
            ("label", "categories", coco.category_ids, number_of),
        ):
            numbers = coco.objects[column]
            for number, count in enumerate(np.bincount(numbers).tolist()):
                if count and ids[number] not in known:
                    text = f"{path}: not among its {what}: {shown(ids[number])}, which {count} annotations name"
                    faults.add("object", "of an unknown image or class", text, count)
            coco.objects[column] = np.array([known.get(own_id, -1) for own_id in ids], dtype=np.int64)[numbers]
        parts.append(coco.objects[(coco.objects["image"] >= 0) & (coco.objects["label"] >= 0)])
    faults.notes += tree.namesakes()
    return Content(pictures, np.concatenate(parts), names, sorted(id_of, key=id_of.__getitem__), id_of)


def _coco_pictures(path: Path, tree: Tree, images: dict, pictures: list[Picture], faults: Faults) -> dict:
    """Append the images whose pictures exist. The place of each COCO image id in `pictures`, -1 if it was left out."""
    folder, beside = str(tree.root), os.path.relpath(path, tree.root)
    files = {own_id: tree.find(name, beside) for own_id, (name, _) in images.items()}
    if not any(files.values()):
        # The names have folders that are not here.
        files = {own_id: tree.find(basename(name), beside) for own_id, (name, _) in images.items()}
    for own_id in of_another_split(files, lambda _: split_of(beside)):
        if "/" not in images[own_id][0]:  # a name with that folder would mean it
            files[own_id] = None
    place_of = dict.fromkeys(images, -1)
    used = set()
    for own_id, (name, size) in images.items():
        picture = f"{folder}/{files[own_id] or name}"
        try:
            if files[own_id] is None or picture in used:
                problem = "listed twice in" if files[own_id] else "no such image, or several, which is listed in"
                if not files[own_id] and Path(folder, name).exists():
                    problem = f"not a picture's name ({', '.join(SUFFIXES)}), which is listed in"
                raise UserError(f"{picture}: {problem} {path}")
            size = size or read_size(picture)
        except UserError as error:
            faults.add("picture", "missing or unreadable", str(error))
            continue
        used.add(picture)
        place_of[own_id] = len(pictures)
        pictures.append(Picture(stem(name), own_id, picture, size, str(path)))
    return place_of


def assemble(
    content: Content,
    root: Path,
    classes: Sequence[str],
    faults: Faults,
    split: str = "train",
    test_portion: float | None = None,
) -> Annotations:
    """Annotations from the content of files below `root`. Empty `classes` stands for the data set's own.

    With `test_portion`, that share of the pictures is kept for the test; the result is that part, or for the split
    "train" the other.
    """
    pictures, objects, names = content.pictures, content.objects, content.names
    classes = tuple(classes) or tuple(content.classes)
    label_of = {name: label for label, name in enumerate(classes, start=1)}
    labels = np.array([label_of.get(name, 0) for name in names], dtype=np.int64)[objects["label"]]
    for number in np.unique(objects["label"][labels == 0]):
        rows = np.flatnonzero(objects["label"] == number)
        source, name = pictures[objects["image"][rows[0]]].source, names[number]
        text = f"{source}: unknown class '{name}'{did_you_mean(name, classes)} of {len(rows)} objects"
        faults.add("object", "of an unknown class", text, len(rows))
    notes = faults.close(root, len(pictures), int((labels > 0).sum()))
    spelt = {name.casefold(): name for name in reversed(classes)}
    if other := next((name for name in classes if spelt[name.casefold()] != name), ""):
        notes.append(f"{root}: '{spelt[other.casefold()]}' and '{other}' are two classes")
    if not pictures:
        raise UserError(f"{root}: no readable image is left of the {split} data")
    # An id that several pictures have becomes the path below `root`, with suffix.
    counts = Counter(picture.id for picture in pictures)
    ids = [p.id if counts[p.id] == 1 else slashes(os.path.relpath(p.path, root)) for p in pictures]
    order = sorted(range(len(pictures)), key=ids.__getitem__)
    held_out: set[str] = set()
    if test_portion is not None:
        kept = round(test_portion * len(ids))
        share = f"{kept} of {len(ids)} images are kept for the test (data.test_portion={test_portion:g})"
        if kept == (len(ids) if split == "train" else 0):
            raise UserError(f"{root}: no test data here, and {share}")
        notes.append(f"{root}: {share}, whatever the seed")
        # By the ids alone: with another seed, in another stage or for another network, it is the same test set, so no
        # score rests on pictures that something has been trained on.
        held_out = {ids[i] for i in first_ranked(ids, "test", kept)}
        order = [i for i in order if (ids[i] in held_out) == (split == "test")]
    pictures, ids = [pictures[i] for i in order], [ids[i] for i in order]
    sizes = np.array([picture.size for picture in pictures], dtype=np.int32)

    # Objects follow the order of the images; those of one image keep theirs.
    place_of = np.full(len(content.pictures), -1)
    place_of[order] = np.arange(len(order))
    owner = place_of[objects["image"]]
    rows = np.argsort(owner, kind="stable")
    rows = rows[(owner[rows] >= 0) & (labels[rows] > 0)]
    objects = objects[rows]
    objects["image"] = owner[rows]
    objects["label"] = labels[rows]
    truth = _objects(objects, len(pictures))
    columns = np.column_stack([objects["image"], objects["label"], objects["box_xyxy"]])
    # Equal objects have equal sums, so they stand together; a sort by six columns takes ten times as long.
    in_order = columns[np.argsort(columns @ np.sqrt([2, 3, 5, 7, 11, 13]))]
    if doubled := int((np.diff(in_order, axis=0) == 0).all(1).sum()):
        notes.append(
            f"{root}: {doubled} objects stand in the files twice, with the same class and box, and count twice"
        )

    # Annotators draw beyond the edge of an image, and click twice. Training has no use for that; scoring counts it.
    boxes = np.clip(objects["box_xyxy"], 0, np.tile(sizes[objects["image"]], 2))
    keep = (boxes[:, 2:] - boxes[:, :2] > 1).all(1)  # a box of one pixel is how VOC writes "no area"
    shares = len(objects) > 0 and np.abs(objects["box_xyxy"]).max() <= 1
    if len(objects) and not keep.any() and (split == "train" or shares):
        hint = "; they look like shares of the picture, where pixels are expected" if shares else ""
        raise UserError(f"{root}: none of the {len(objects)} boxes is wider and higher than a pixel{hint}")
    if lost := objects["image"][~keep].tolist():
        notes.append(f"{root}: {len(lost)} boxes without area do not train; the first: {pictures[lost[0]].path}")
    beyond = np.abs(boxes - objects["box_xyxy"]).max(1, initial=0)[keep]
    if overhanging := int((beyond > ROUNDING).sum()):
        notes.append(f"{root}: {overhanging} boxes reach beyond the edge of their image: cut off for training only")
    same = keep.all() and not beyond.any()
    objects["box_xyxy"] = boxes
    known = content.category_ids
    return Annotations(
        classes=classes,
        category_ids=tuple(label_of.values() if known is None else map(known.get, classes)),
        objects=truth if same else _objects(objects[keep], len(pictures)),
        truth=truth,
        sizes=_shared(sizes, np.int32),
        ids=PackedStrings(ids),
        own_ids=PackedStrings([json.dumps(ids[i] if own is None else own) for i, (_, own, *_) in enumerate(pictures)]),
        paths=PackedStrings([picture.path for picture in pictures]),
        notes=notes,
        held_out=tuple(sorted(held_out)),
    )


def without_objects(pictures: Sequence[Path], classes: Sequence[str], faults: Faults) -> Annotations:
    """Pictures as a test set without objects, in which detections have no AP."""
    pairs = [Pair(str(path), str(path), None) for path in pictures]
    content = read_pairs(pairs, faults, dict(enumerate(classes)))
    return assemble(content, pictures[0].parent, classes, faults)


def photo_of(image_id: str) -> str:
    """The id without what Roboflow appends to each of several augmented copies of one photo."""
    return re.sub(r"\.rf\.\w+(\.\w+)?$", "", image_id)


def ranked(ids: Sequence[str], salt: object) -> list[int]:
    """Rows in the order of a hash of their ids: the order in which images are read does not matter."""
    hashes = [hashlib.sha256(f"{salt}-{photo_of(i)}".encode(errors="surrogatepass")).digest() for i in ids]
    return sorted(range(len(ids)), key=lambda i: (hashes[i], ids[i]))


def first_ranked(ids: Sequence[str], salt: object, count: int) -> list[int]:
    """The first `count` rows in that order, and the other copies of the last one's photo."""
    order = ranked(ids, salt)
    while 0 < count < len(order) and photo_of(ids[order[count]]) == photo_of(ids[order[count - 1]]):
        count += 1
    return order[:count]


def _objects(found: np.ndarray, num_images: int) -> Objects:
    """From (M,) of OBJECT in the order of the images, with labels from 1."""
    sides = found["box_xyxy"][:, 2:] - found["box_xyxy"][:, :2]
    return Objects(
        boxes=_shared(found["box_xyxy"], np.float32),
        labels=_shared(found["label"], np.int64),
        ignore=_shared(found["ignore"], np.bool_),
        area=_shared(np.where(np.isnan(found["area"]), sides.prod(1), found["area"]), np.float32),
        offsets=_offsets(np.bincount(found["image"], minlength=num_images)),
    )


def _offsets(counts: Sequence[int] | np.ndarray) -> Tensor:
    """(N + 1,) int64: where each of N consecutive groups starts, and the end of the last."""
    return _shared(np.concatenate(([0], np.cumsum(counts))), np.int64)


def _shared(values: np.ndarray, kind: type) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=kind)).share_memory_()
