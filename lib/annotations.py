"""The annotations of a data set in flat tensors that loader processes share without a copy."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lib.errors import UserError, did_you_mean
from lib.images import read_size
from lib.labels import (
    OBJECT,
    Faults,
    coco_image,
    folder_of,
    is_there,
    read_coco_json,
    read_voc_xml,
    read_yolo_txt,
    slashes,
    split_of,
    stem,
)
from lib.layouts import Pair, Tree, voc_pairs
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
    dropped: list[str]  # one line for each box that training does not see: where and why
    notes: list[str]  # what else was done to the data, a line each
    held_out: tuple[str, ...] = ()  # the ids that were kept for the test, where the data has no test split of its own

    def __len__(self) -> int:
        return len(self.sizes)

    boxes = property(lambda self: self.objects.boxes)
    labels = property(lambda self: self.objects.labels)
    ignore = property(lambda self: self.objects.ignore)
    area = property(lambda self: self.objects.area)
    offsets = property(lambda self: self.objects.offsets)

    def image_id(self, i: int) -> int | str:
        """The data set's own id of image `i`: COCO's, else the file's name under the image folder, without suffix."""
        return json.loads(self.own_ids[i])

    def target(self, i: int) -> dict[str, Tensor]:
        """What training sees of image `i`: see `Objects.of`."""
        return self.objects.of(i)

    def ground_truth(self, indices: Iterable[int]) -> list[dict[str, Tensor]]:
        """What the detections in some images are compared with, as `lib.metrics` takes it."""
        return [self.truth.of(i) for i in indices]

    def fingerprint(self) -> str:
        """SHA-256 of classes, ids, sizes and objects; it does not depend on where the folder is."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for tensor in (*self.truth, self.sizes, self.ids.bytes, self.ids.offsets):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    def take(self, rows: Sequence[int]) -> Annotations:
        """Those of some images only."""

        def of_rows(objects: Objects) -> Objects:
            counts = objects.offsets.diff()[rows]
            chosen = torch.cat([torch.arange(*objects.offsets[i : i + 2].tolist()) for i in rows])
            columns = (_shared(column[chosen].numpy(), column.numpy().dtype) for column in objects[:-1])
            return Objects(*columns, offsets=_offsets(counts.numpy()))

        objects = of_rows(self.objects)
        strings = {name: [getattr(self, name)[i] for i in rows] for name in ("ids", "own_ids", "paths")}
        shown_paths = set(strings["paths"])
        return replace(
            self,
            objects=objects,
            truth=objects if self.truth is self.objects else of_rows(self.truth),
            sizes=_shared(self.sizes[rows].numpy(), np.int32),
            dropped=[line for line in self.dropped if line.partition(": box ")[0] in shown_paths],
            **{name: PackedStrings(values) for name, values in strings.items()},
        )


class Picture(NamedTuple):
    """One image while the files are read."""

    id: str
    own_id: int | str | None  # COCO's; else it is `id`
    path: str
    size: tuple[int, int]
    source: str  # the label file


def read_voc(
    root: Path, sets: Sequence[str], classes: Sequence[str] = (), on_error: str = "raise", max_skipped: float = 1.0
) -> Annotations:
    """Annotations of some VOC image sets, named as by `layouts.voc_sets`.

    Empty `classes` stands for all names found, sorted. A faulty entry raises UserError, or is logged and left out if
    `on_error` is "skip".
    """
    faults = Faults(on_error, max_skipped)
    pairs = [pair for name in sets for pair in voc_pairs(root, name, faults)]
    return read_pairs(root, pairs, classes, faults)


def read_pairs(
    root: Path,
    pairs: Sequence[Pair],
    classes: Sequence[str],
    faults: Faults,
    yolo_names: Mapping[int, str] | None = None,
    notes: Sequence[str] = (),
) -> Annotations:
    """Annotations of pictures that have a label file each: VOC's, or with `yolo_names`, the classes, YOLO's."""
    pictures: list[Picture] = []
    found: list[tuple] = []  # of OBJECT
    listed = (yolo_names or {}).values()
    number_of = {name: number for number, name in enumerate(listed)}
    swapped = 0
    for name, path, label_file in {pair.picture: pair for pair in pairs}.values():
        try:
            if yolo_names is None:
                voc = read_voc_xml(label_file, faults)
                size = voc.size or read_size(path)
                objects = voc.objects
                swapped += voc.swapped
            else:
                width, height = size = read_size(path)
                boxes = read_yolo_txt(label_file, faults) if label_file else []
                objects = [
                    (
                        yolo_names.get(number, f"class {number}"),
                        (x1 * width, y1 * height, x2 * width, y2 * height),
                        False,
                    )
                    for number, (x1, y1, x2, y2) in boxes
                ]
        except UserError as error:
            faults.add("picture", "unreadable", str(error))
            continue
        for label, box_xyxy, ignore in objects:
            found.append((len(pictures), number_of.setdefault(label, len(number_of)), box_xyxy, ignore, math.nan))
        pictures.append(Picture(name, None, path, size, str(label_file or path)))
    if swapped:
        notes = [*notes, f"{root}: {swapped} boxes had their corners in the wrong order, which was put right"]
    classes = tuple(classes or listed or sorted(number_of))
    ids = range(1, len(classes) + 1)
    return _assemble(classes, ids, pictures, np.array(found, dtype=OBJECT), list(number_of), root, faults, notes)


def read_coco(
    path: Path, folder: Path, classes: Sequence[str] = (), on_error: str = "raise", max_skipped: float = 1.0
) -> Annotations:
    """Annotations of a COCO instances file, whose pictures are in `folder`: see `read_coco_files`."""
    return read_coco_files(path, [(path, folder)], classes, Faults(on_error, max_skipped))


def read_coco_files(
    root: Path,
    files: Sequence[tuple[Path, Path | None]],
    classes: Sequence[str],
    faults: Faults,
    notes: Sequence[str] = (),
    all_classes: bool = True,
) -> Annotations:
    """Annotations of COCO instances files, each with the folder of its pictures (None: found below `root`).

    Empty `classes` stands for all categories, sorted by id. With `all_classes`, each of `classes` must be one of them.
    """
    pictures: list[Picture] = []
    parts: list[np.ndarray] = []
    names: list[str] = []  # of the classes that the objects' numbers stand for
    id_of: dict[str, int] = {}
    for path, folder in files:
        coco = read_coco_json(path, faults)
        notes = [*notes, *coco.notes]
        for category_id, name in coco.categories.items():
            id_of.setdefault(name, category_id)
        position_of = _coco_pictures(path, folder, root, coco.images, pictures, faults)
        # The numbers of images and categories become positions in the list of pictures and in that of the names.
        owner = _renumbered(
            coco.objects["image"], coco.image_ids, position_of, f"{path}: not among its images:", faults
        )
        number_of = {category_id: len(names) + i for i, category_id in enumerate(coco.categories)}
        names += coco.categories.values()
        label = _renumbered(
            coco.objects["label"], coco.category_ids, number_of, f"{path}: not among its categories:", faults
        )
        coco.objects["image"], coco.objects["label"] = owner, label
        parts.append(coco.objects[(owner >= 0) & (label >= 0)])
    for name in classes if all_classes else ():
        if name not in id_of:
            raise UserError(f"{files[0][0]}: unknown class '{name}'{did_you_mean(name, id_of)}")
    classes = tuple(classes) or tuple(sorted(id_of, key=id_of.__getitem__))
    category_ids = [id_of.get(name) for name in classes]
    return _assemble(classes, category_ids, pictures, np.concatenate(parts), names, root, faults, notes)


def _renumbered(
    numbers: np.ndarray, ids: Sequence[int | str], number_of: Mapping, problem: str, faults: Faults
) -> np.ndarray:
    """What `number_of` gives for the id that each of `numbers` stands for; -1 and a fault for an id that is unknown."""
    numbers = numbers.astype(np.int64)
    for number, unknown in enumerate(ids):
        if unknown not in number_of:
            count = int((numbers == number).sum())
            text = f"{problem} {shown(unknown)}, which {count} annotations name"
            faults.add("object", "of an unknown image or class", text, count)
    return np.array([number_of.get(known, -1) for known in ids], dtype=np.int64)[numbers]


def _coco_pictures(
    path: Path, folder: Path | None, root: Path, entries: list, pictures: list[Picture], faults: Faults
) -> dict[int | str, int]:
    """Append the images whose pictures exist. The place of each COCO image id in `pictures`, -1 if it was left out."""
    if folder is not None and not folder.is_dir():
        raise UserError(f"{folder}: no such folder (data.train_images, data.test_images)")
    checked: list[tuple[int | str, str, tuple[int, int] | None]] = []
    position_of: dict[int | str, int] = {}
    for entry in entries:
        try:
            image = coco_image(entry)
            if image[0] in position_of:
                raise ValueError("its id is there twice")
            position_of[image[0]] = -1
            checked.append(image)
        except (TypeError, ValueError) as error:
            faults.add("picture", "malformed entry", f"{path}: malformed image entry {shown(entry)}: {error}")
    folder, dropped, existing = _picture_folder(folder or root, [name for _, name, _ in checked], path)
    listed: set[str] = set()
    for own_id, name, size in checked:
        end = name.split("/", dropped)[-1]
        try:
            if end not in existing:
                raise UserError(f"{folder / end}: no such image, but {path} lists it")
            if end in listed:
                raise UserError(f"{path}: image '{name}' is there twice")
            size = size or read_size(str(folder / end))
        except UserError as error:
            faults.add("picture", "missing or unreadable", str(error))
            continue
        listed.add(end)
        position_of[own_id] = len(pictures)
        pictures.append(Picture(stem(name), own_id, str(folder / end), size, str(path)))
    return position_of


def _picture_folder(root: Path, names: Sequence[str], beside: Path) -> tuple[Path, int, set[str]]:
    """Where the pictures of a COCO file are below `root`: a folder, the number of leading folders of each name that
    are not there, and all pictures in it. Of several, the one most like the path of the file, `beside`."""
    tree = Tree(root)
    pictures = set(tree.pictures)
    folders = {""}
    for name in set(map(folder_of, pictures)):
        folders |= {name, *(parent.as_posix() for parent in PurePosixPath(name).parents)} - {"."}
    sample = names[:: max(1, len(names) // 50)]
    words = set(re.findall(r"[a-z]+|\d+", os.path.relpath(beside, root).lower()))

    def likeness(folder: str) -> tuple[int, int, int]:
        shared = words & set(re.findall(r"[a-z]+|\d+", folder.lower()))
        return split_of(folder) == split_of(beside.as_posix()), len(shared), -len(folder)

    best = ((0,), "", 0)
    for dropped in range(max((name.count("/") for name in sample), default=0) + 1):
        ends = [name.split("/", dropped)[-1] for name in sample]
        for folder in sorted(folders):
            hits = sum((f"{folder}/{end}" if folder else end) in pictures for end in ends)
            best = max(best, ((hits, *likeness(folder)), folder, dropped)) if hits else best
        if best[0][0]:
            break
    prefix = f"{best[1]}/" if best[1] else ""
    found = {name[len(prefix) :] for name in pictures if name.startswith(prefix)}
    return root / best[1], best[2], found


def same_pictures(paths: Sequence[str], others: Sequence[str]) -> list[tuple[str, str]]:
    """Each of `paths` that has the same bytes as one of `others`, with the first of these."""
    known = set(others)
    same = [(path, path) for path in paths if path in known]
    # Only files of a size that both sides have are read.
    rest = [path for path in paths if path not in known]
    sizes = ({_size(path) for path in rest} & {_size(path) for path in others}) - {-1, 0} if rest else set()
    by_digest = {_digest(path): path for path in reversed(others) if _size(path) in sizes}
    for path in rest:
        if _size(path) in sizes and (other := by_digest.get(_digest(path))):
            same.append((path, other))
    return same


def _size(path: str) -> int:
    return Path(path).stat().st_size if is_there(Path(path)) else -1


def _digest(path: str) -> bytes:
    return hashlib.sha256(Path(path).read_bytes()).digest()


def _assemble(
    classes: tuple[str, ...],
    category_ids: Iterable[int | None],
    pictures: list[Picture],
    objects: np.ndarray,
    names: Sequence[str],
    root: Path,
    faults: Faults,
    notes: Sequence[str],
) -> Annotations:
    """Annotations from `pictures` and their OBJECTs, whose labels are numbers in `names`: sorted by image id."""
    label_of = {name: label for label, name in enumerate(classes, start=1)}
    labels = np.array([label_of.get(name, 0) for name in names], dtype=np.int64)[objects["label"].astype(np.int64)]
    for number in np.unique(objects["label"][labels == 0]):
        rows = np.flatnonzero(objects["label"] == number)
        source, name = pictures[int(objects["image"][rows[0]])].source, names[int(number)]
        more = f" ({len(rows)} objects)" if len(rows) > 1 else ""
        text = f"{source}: unknown class '{name}'{did_you_mean(name, classes)}{more}"
        faults.add("object", "of an unknown class", text, len(rows))
    objects, labels = objects[labels > 0], labels[labels > 0]
    notes = [*notes, *faults.close(root, len(pictures), len(objects))]
    if not pictures:
        raise UserError(f"{root}: no readable image is left in this set")
    # An id that several pictures have becomes the path below `root`, with suffix.
    counts = Counter(picture.id for picture in pictures)
    ids = [p.id if counts[p.id] == 1 else slashes(os.path.relpath(p.path, root)) for p in pictures]
    order = sorted(range(len(pictures)), key=ids.__getitem__)
    pictures, ids = [pictures[i] for i in order], [ids[i] for i in order]
    sizes = np.array([picture.size for picture in pictures], dtype=np.int32)

    # Objects follow the order of the images; those of one image keep theirs.
    owner = np.argsort(order)[objects["image"].astype(np.int64)]
    by_image = np.argsort(owner, kind="stable")
    owner, objects, labels = owner[by_image], objects[by_image], labels[by_image]
    truth = _objects(objects["box_xyxy"], objects, labels, owner, len(pictures))

    # Annotators draw beyond the edge of an image, and click twice. Training has no use for that; scoring counts it.
    boxes = np.clip(objects["box_xyxy"], 0, np.tile(sizes[owner], 2))
    keep = _has_area(boxes)
    dropped = []
    for i in np.flatnonzero(~keep):
        box_xyxy, name = objects["box_xyxy"][i], classes[labels[i] - 1]
        outside = f"lies outside of the image ({sizes[owner[i]].tolist()})"
        reason = outside if _has_area(box_xyxy) else "has no area"
        dropped.append(f"{pictures[owner[i]].path}: box {box_xyxy.tolist()} of '{name}' {reason}")
    beyond = np.abs(boxes - objects["box_xyxy"]).max(1, initial=0)[keep]
    overhanging = int((beyond > ROUNDING).sum())
    if overhanging:
        notes.append(f"{root}: {overhanging} boxes reach beyond the edge of their image: cut off for training only")
    same = keep.all() and not beyond.any()
    return Annotations(
        classes=classes,
        category_ids=tuple(category_ids),
        objects=truth if same else _objects(boxes[keep], objects[keep], labels[keep], owner[keep], len(pictures)),
        truth=truth,
        sizes=_shared(sizes, np.int32),
        ids=PackedStrings(ids),
        own_ids=PackedStrings([json.dumps(ids[i] if own is None else own) for i, (_, own, *_) in enumerate(pictures)]),
        paths=PackedStrings([picture.path for picture in pictures]),
        dropped=dropped,
        notes=notes,
    )


def _objects(boxes: np.ndarray, objects: np.ndarray, labels: np.ndarray, owner: np.ndarray, num_images: int) -> Objects:
    width_times_height = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return Objects(
        boxes=_shared(boxes, np.float32),
        labels=_shared(labels, np.int64),
        ignore=_shared(objects["ignore"], np.bool_),
        area=_shared(np.where(np.isnan(objects["area"]), width_times_height, objects["area"]), np.float32),
        offsets=_offsets(np.bincount(owner, minlength=num_images)),
    )


def _has_area(boxes_xyxy: np.ndarray) -> np.ndarray:
    """Whether boxes (..., 4) are wider and higher than one pixel, which is how VOC writes "no area"."""
    return (boxes_xyxy[..., 2:] - boxes_xyxy[..., :2] > 1).all(-1)


def _offsets(counts: Sequence[int] | np.ndarray) -> Tensor:
    """(N + 1,) int64: where each of N consecutive groups starts, and the end of the last."""
    return _shared(np.concatenate(([0], np.cumsum(counts))), np.int64)


def _shared(values: np.ndarray, kind: type) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=kind)).share_memory_()
