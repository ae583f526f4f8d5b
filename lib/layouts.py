"""What lies in a folder: VOC, COCO or YOLO, and which files make up its training and its test data.

Nothing is opened but lists of pictures, YAML files and the ends of JSON files.
"""

from __future__ import annotations

import functools
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lib.config import DataConfig
from lib.errors import UserError, did_you_mean
from lib.images import SUFFIXES
from lib.labels import (
    SPLIT_OF,
    Faults,
    bare,
    folder_of,
    is_coco,
    is_there,
    picture_name,
    plain_names,
    read_lines,
    read_text,
    read_yolo_yaml,
    slashes,
    split_of,
    stem,
    suffix_of,
    yolo_label,
)

DEEPEST = 8  # folders below the data set's
USUAL = {"JPEGImages", "Annotations"}
# Pictures in these folders are the masks of others.
MASKS = {"segmentationclass", "segmentationobject", "mask", "masks", "trimaps"}
ONE_OF_MANY = "other"  # VOC has two sets for each class, such as cat_train
LABEL_COLUMN = re.compile(r"(.*\S)\s+(?:-1|0|1)")  # of the image sets of one class
NOT_INSTANCES = re.compile(r"captions|keypoints|panoptic|image_info|stuff|results|detections|predictions", re.I)


class Pair(NamedTuple):
    """A picture and its label file; `label` is None where a picture has none."""

    name: str  # of the picture, without suffix: its id if no other has it
    picture: str
    label: Path | None


class Layout(NamedTuple):
    """What a split consists of: for VOC and YOLO pairs, for COCO JSON files, each with the folder of its pictures."""

    kind: str  # "voc", "coco" or "yolo"
    parts: list[Any]
    cut: bool  # whether the data has no test data of its own
    names: dict[int, str]  # YOLO's classes by number
    notes: list[str]


class Found(NamedTuple):
    """What a folder was recognised as: its items by split ("train", "trainval", "val", "test", ""), and their use."""

    kind: str
    what: str
    groups: dict[str, list[str]]
    parts: Callable[[list[str], str], list[Any]]  # of the chosen items, which are for that split
    names: dict[int, str]
    notes: Sequence[str] = ()


class Tree:
    """The files below a folder by suffix, as paths relative to it, sorted."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files: dict[str, list[str]] = defaultdict(list)
        seen = set()
        for folder, folders, names in os.walk(root, followlinks=True):
            below = os.path.relpath(folder, root).replace(os.sep, "/")
            try:
                place = Path(folder).stat()
            except OSError:  # may not be entered
                continue
            if (place.st_dev, place.st_ino) in seen or below.count("/") >= DEEPEST:
                folders.clear()  # a link back, or too deep
                continue
            seen.add((place.st_dev, place.st_ino))
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                suffix = suffix_of(name)
                kind = "picture" if suffix in SUFFIXES else suffix
                if not name.startswith("."):
                    self.files[kind].append(name if below == "." else f"{below}/{name}")
        self.pictures = self.files["picture"]

    @functools.cached_property
    def by_stem(self) -> dict[str, list[str]]:
        """Pictures and XML files, each by its name without folder and suffix."""
        found = defaultdict(list)
        for path in (*self.pictures, *self.files[".xml"]):
            found[bare(path).rpartition("/")[2]].append(path)
        return found

    def find(self, name: str, xml: bool = False, beside: str = "") -> str | None:
        """The picture (or the XML file) of this name, with or without folders and suffix; None if there is none.

        Of several pictures, the one that the annotation `beside` names, then the one whose folders have most in common
        with it, then no mask, then a JPEG. None if that does not tell.
        """
        wanted = stem(name)
        candidates = [
            path
            for path in self.by_stem.get(wanted.rpartition("/")[2], ())
            if (suffix_of(path) == ".xml") == xml and f"/{bare(path)}".endswith(f"/{wanted}")
        ]
        if len(candidates) < 2:
            return candidates[0] if candidates else None
        filename = picture_name(self.root / beside) if beside.endswith(".xml") else ""

        def unlike(path: str) -> tuple:
            folders, suffix = path.split("/")[:-1], suffix_of(path)
            shared = Counter(folders) & Counter(beside.split("/")[:-1])
            return (
                not f"/{path}".endswith(f"/{name}"),
                path.rpartition("/")[2] != filename,
                -sum(shared.values()),
                USUAL.isdisjoint(folders),
                not MASKS.isdisjoint(folder.lower() for folder in folders),
                len(folders),
                SUFFIXES.index(suffix) if suffix in SUFFIXES else 0,
            )

        best, second = sorted(candidates, key=unlike)[:2]
        return best if unlike(best) < unlike(second) else None

    def tail(self, name: str) -> str:
        """Of a path on another machine, the longest end that is a picture here; `name` if none is."""
        parts = name.split("/")
        # Without its folders, only a path that certainly comes from elsewhere is looked for.
        foreign = re.match(r"/|[A-Za-z]:", name) is not None
        ends = ("/".join(parts[start:]) for start in range(len(parts) - (not foreign)))
        return next((end for end in ends if self.find(end)), name)

    def describe(self) -> str:
        called = {"": "files without suffix", "picture": "pictures"}
        counts = {called.get(kind, kind): len(names) for kind, names in self.files.items() if names}
        few = sorted(counts.items(), key=lambda item: -item[1])[:6]
        return ", ".join(f"{kind}: {count}" for kind, count in few)


def find_layout(data: DataConfig, split: str, faults: Faults) -> Layout:
    """The files of a split ("train" or "test") of the data set in `data.root`.

    Raises UserError that says what lies there if it is nothing that is known, or not `data.dataset_type`.
    """
    root = Path(data.root)
    found = _recognise(root, data, faults)
    keys = {"voc": (data.train_sets, data.test_sets), "coco": ([data.train_annotations], [data.test_annotations])}
    train_keys, test_keys = keys.get(found.kind, ([], []))
    named = {"train": [key for key in train_keys if key], "test": [key for key in test_keys if key]}
    train, test, left_out = _divide(found, named)
    if not train and (split == "train" or not test):
        items = _few(sorted(item for group in found.groups.values() for item in group))
        raise UserError(f"{root}: {found.what}: which is the training data? Found {items} (data.train_sets)")
    notes = [f"{root}: {found.what}; training data: {_few(train)}; test data: {_few(test)}"]
    if left_out:
        notes.append(f"{root}: neither trains nor tests: {_few(left_out)}")
    chosen = test if split == "test" and test else train
    return Layout(found.kind, found.parts(chosen, split), not test, found.names, [*notes, *found.notes])


def _few(names: Sequence[str]) -> str:
    return (", ".join(names) or "none") if len(names) <= 4 else f"{len(names)} files from {names[0]} to {names[-1]}"


def _recognise(root: Path, data: DataConfig, faults: Faults) -> Found:
    kind = data.dataset_type
    if not (is_there(root) and root.is_dir()):
        raise UserError(f"{root}: no such folder (data.root)")
    if kind in ("auto", "voc") and (found := _voc_lists(root, faults)):
        return found
    tree = Tree(root)
    for name, way in (
        ("yolo", lambda: _yolo_yaml(tree, data)),
        ("coco", lambda: _coco(tree, data)),
        ("voc", lambda: _voc_files(tree, faults)),
        ("yolo", lambda: _yolo_files(tree, data)),
    ):
        if kind in ("auto", name) and (found := way()):
            return found
    expected = {
        "voc": "VOC (ImageSets/Main/*.txt, or an XML file for each picture)",
        "coco": "COCO (a JSON file with images, annotations and categories)",
        "yolo": "YOLO (data.yaml, or classes.txt and a text file for each picture)",
    }
    wanted = expected.get(kind, ", ".join(expected.values()))
    raise UserError(f"{root}: expected {wanted}; found {tree.describe() or 'nothing'} (data.root, data.dataset_type)")


def _divide(found: Found, named: dict[str, list[str]]) -> tuple[list[str], list[str], list[str]]:
    """The items that train, those that test (none: there is no test data), and those that do neither.

    `named` are those that the configuration names for each split. Where there is test data, the validation data trains
    as well, as in VOC's trainval: the search takes its own part of the training data. Else it is the test data.
    """
    everything = [item for items in found.groups.values() for item in items]
    for split, names in named.items():
        for name in names:
            if name not in everything:
                key = f"data.{split}_{'annotations' if found.kind == 'coco' else 'sets'}"
                raise UserError(f"{key}: '{name}' is not there{did_you_mean(name, everything)}")
    taken = {*named["train"], *named["test"]}
    group_of = {item: split for split, items in found.groups.items() for item in items}
    free = {split: [item for item in items if item not in taken] for split, items in found.groups.items()}
    train, val, both, test = (free.get(split, []) for split in ("train", "val", "trainval", "test"))
    train = train or free.get("", [])
    if named["train"]:
        # Validation data that is a part of what trains cannot test.
        val = [] if "trainval" in {group_of[name] for name in named["train"]} else val
        chosen, tests = named["train"], named["test"] or test or val
    elif named["test"]:
        tests = named["test"]
        chosen = train if train and "val" in {group_of[name] for name in tests} else both or train + val
    elif test:
        chosen, tests = both or train + val, test
    else:
        chosen, tests = (train, val) if train and val else (both or train or val, [])
    # VOC's trainval is train and val.
    covered = {*chosen, *tests, *(train + val if set(chosen) & set(both) else [])}
    left_out = [item for item in everything if item not in covered and group_of[item] != ONE_OF_MANY]
    return chosen, tests, left_out


# VOC: with lists of pictures, or an XML file for each picture.


def _voc_lists(root: Path, faults: Faults) -> Found | None:
    names = voc_sets(root)
    if not names:
        return None
    groups = defaultdict(list)
    for name in names:
        groups[SPLIT_OF.get(name.rpartition("/")[2].lower(), ONE_OF_MANY)].append(name)
    if len(names) == 1 and ONE_OF_MANY in groups:  # whatever it is called
        groups = {"train": names}

    def pairs(sets: list[str], _: str) -> list[Pair]:
        return [pair for name in sets for pair in voc_pairs(root, name, faults)]

    return Found("voc", "VOC", groups, pairs, {})


def voc_sets(root: Path) -> list[str]:
    """Image sets under `root`, which is a VOCdevkit ("VOC2007/trainval") or a bare folder ("trainval")."""
    for below in ("ImageSets/Main", "ImageSets"):  # some tools leave Main out
        for_parents = (root.glob(f"{parent}{below}/*.txt") for parent in ("", "*/", "VOCdevkit/*/"))
        if files := sorted(file for found in for_parents for file in found):
            folders = [file.parents[below.count("/") + 1] for file in files]
            return [(d.relative_to(root) / file.stem).as_posix() for d, file in zip(folders, files, strict=True)]
    return []


def voc_pairs(root: Path, set_name: str, faults: Faults) -> list[Pair]:
    """The pictures of an image set, each once.

    The sets of one class have a second column, -1, 0 or 1: whether the picture shows it. It selects nothing, since a
    picture without the class belongs to the set too, and the annotations say what a picture shows.
    """
    parent, _, name = set_name.rpartition("/")
    folder = root / parent
    file = folder / "ImageSets" / "Main" / f"{name}.txt"
    file = file if is_there(file) else folder / "ImageSets" / f"{name}.txt"
    tree, lines = Tree(folder), [slashes(line) for line in read_lines(file)]
    if not lines:
        faults.add("picture", "empty image set", f"{file}: the image set is empty")
    columns = [LABEL_COLUMN.fullmatch(line) for line in lines]
    if all(columns) and not all(tree.find(line) for line in lines):
        lines = [column[1] for column in columns]
    pairs: dict[str, Pair] = {}
    for line in lines:
        line = tree.tail(line)
        picture = tree.find(line, beside="JPEGImages/")
        name = stem(line)
        if picture and stem(picture) == name:  # the list names the folder of the pictures as well
            name = name.split("/", 1)[-1]
        xml = tree.find(name, xml=True, beside="Annotations/")
        picture = tree.find(line, beside=xml or "JPEGImages/")
        if picture is None:
            text = f"{folder / 'JPEGImages' / name}.jpg: no such image, but {set_name} lists it"
            faults.add("picture", "missing", text)
            continue
        # Listed twice, it counts once.
        pairs.setdefault(picture, Pair(name, str(folder / picture), folder / (xml or f"Annotations/{name}.xml")))
    return list(pairs.values())


def _voc_files(tree: Tree, faults: Faults) -> Found | None:
    picture_of = {}
    for xml in tree.files[".xml"]:
        name = xml[: -len(".xml")].rpartition("/")[2]
        picture_of[xml] = tree.find(name, beside=xml) or tree.find(picture_name(tree.root / xml) or name, beside=xml)
    if not any(picture_of.values()):
        return None
    groups = defaultdict(list)
    for xml, picture in picture_of.items():
        groups[split_of(folder_of(xml), folder_of(picture or ""))].append(xml)

    def pairs(chosen: list[str], _: str) -> list[Pair]:
        found = []
        for xml in chosen:
            if picture := picture_of[xml]:
                found.append(Pair(stem(picture).rpartition("/")[2], str(tree.root / picture), tree.root / xml))
            else:
                faults.add("picture", "missing", f"{tree.root / xml}: the picture that it belongs to is not there")
        return found

    others = set(tree.pictures) - set(picture_of.values())
    rest = sum(MASKS.isdisjoint(name.lower().split("/")) for name in others)
    notes = [f"{tree.root}: {rest} pictures have no XML file, so they were not annotated: left out"] if rest > 0 else []
    return Found("voc", "VOC, an XML file for each picture", groups, pairs, {}, notes)


# COCO.


def _coco(tree: Tree, data: DataConfig) -> Found | None:
    groups = defaultdict(list)
    for path in tree.files[".json"]:
        if not NOT_INSTANCES.search(path.rpartition("/")[2]) and is_coco(tree.root / path):
            groups[split_of(path)].append(path)
    for split, key in (("train", data.train_annotations), ("test", data.test_annotations)):
        if key and not any(key in names for names in groups.values()):
            if not is_there(tree.root / key):
                near = did_you_mean(key, [name for names in groups.values() for name in names])
                raise UserError(f"{tree.root / key}: no such annotation file (data.{split}_annotations){near}")
            groups[split].append(key)
    for split, names in groups.items():
        named = data.test_annotations if split == "test" else data.train_annotations
        if named or len(names) < 2:
            continue
        # Beside others of their split, COCO's own names decide.
        own = [name for name in names if name.rpartition("/")[2].startswith(("instances", "_annotations.coco"))]
        groups[split] = own if len(own) == 1 else names
        if len(own) != 1 and (split or not groups.get("train")):
            which = "test" if split == "test" else "train"
            raise UserError(f"{tree.root}: several COCO files, {_few(names)}: data.{which}_annotations names the one")

    def parts(chosen: list[str], split: str) -> list[tuple[Path, Path | None]]:
        folder = data.train_images if split == "train" else data.test_images
        return [(tree.root / name, tree.root / folder if folder else None) for name in chosen]

    return Found("coco", "COCO", groups, parts, {}) if groups else None


# YOLO.


def _yolo_yaml(tree: Tree, data: DataConfig) -> Found | None:
    for path in (name for name in tree.files[".yaml"] + tree.files[".yml"] if name.count("/") < 2):
        try:
            names, base, groups = read_yolo_yaml(tree.root / path)
        except UserError:
            if data.dataset_type == "yolo" or path == "data.yaml":
                raise
            continue
        if groups["train"] or groups["val"]:
            return _yolo_lists(tree, path, names, base, groups)
    return None


def _yolo_files(tree: Tree, data: DataConfig) -> Found | None:
    files = [name for name in tree.files[".txt"] if name.rpartition("/")[2] == "classes.txt"]
    files += tree.files[".names"] + tree.files[".labels"]
    in_labels = any("labels" in name.split("/") for name in tree.files[".txt"])
    labelled = (tree.files[".txt"] or None) and any(yolo_label(str(tree.root / name)) for name in tree.pictures)
    if not labelled or not (files or data.classes or in_labels):
        return None
    if not files and not data.classes:
        raise UserError(f"{tree.root}: YOLO labels without class names: add data.yaml or classes.txt, or data.classes")
    source = files[0] if files else ""
    names = dict(enumerate(read_text(tree.root / source).rstrip().splitlines() if files else data.classes))
    lists = {SPLIT_OF[name[:-4]]: [name] for name in tree.files[".txt"] if name[:-4] in SPLIT_OF}
    if lists.get("train"):
        return _yolo_lists(tree, source, names, "", lists)
    groups = defaultdict(list)
    for folder in dict.fromkeys(map(folder_of, tree.pictures)):
        groups[split_of(folder)].append(folder or ".")

    def pairs(chosen: list[str], _: str) -> list[Pair]:
        return _yolo_pairs(tree.root, [str(tree.root / p) for p in tree.pictures if (folder_of(p) or ".") in chosen])

    return Found("yolo", "YOLO, a text file for each picture", groups, pairs, plain_names(tree.root / source, names))


def _yolo_lists(tree: Tree, source: str, names: dict[int, str], base: str, groups: dict[str, list[str]]) -> Found:
    """What data.yaml names: folders, or text files that list pictures."""
    file = tree.root / source
    bases = [file.parent / base, file.parent, tree.root / base, tree.root.parent / base]
    notes = []
    for split, values in groups.items():
        for value in list(values):
            problem = "no folder or list" if _locate(bases, value) is None else ""
            if split == "train" and problem:
                raise UserError(f"{file}: train: {problem} '{value}' here")
            if split != "train" and value in groups["train"]:
                problem = "not test data, since it is the training data:"
            if problem:
                values.remove(value)
                notes.append(f"{file}: {split}: {problem} '{value}'")

    def pairs(chosen: list[str], _: str) -> list[Pair]:
        pictures: dict[str, None] = {}  # each once, in order
        for value in chosen:
            place = _locate(bases, value)
            if place.is_dir():
                pictures |= {str(place / name): None for name in Tree(place).pictures}
                continue
            for line in map(slashes, read_lines(place)):
                picture = _locate([place.parent, *bases], line)
                pictures[str(picture or place.parent / line)] = None
        return _yolo_pairs(tree.root, list(pictures))

    return Found("yolo", f"YOLO, {source or 'lists'}", groups, pairs, plain_names(file, names), notes)


def _locate(bases: Sequence[Path], value: str) -> Path | None:
    """The file or folder that a path of data.yaml means: as it is, or where its leading folders are not here."""
    parts = [part for part in value.split("/") if part not in ("", "..", ".")]
    for base in bases:
        if is_there(base / value):
            return base / value
    # Not down to the bare name of a picture or of images/, which may be another one.
    ends = ["/".join(parts[start:]) for start in range(len(parts)) if start < len(parts) - 1 or split_of(parts[-1])]
    found = (base / end for end in ends or parts for base in bases if is_there(base / end))
    return next(found, None)


def _yolo_pairs(root: Path, pictures: list[str]) -> list[Pair]:
    pairs = [Pair(stem(name.rpartition("/")[2]), name, yolo_label(name)) for name in pictures]
    if pairs and not any(pair.label for pair in pairs):
        raise UserError(
            f"{root}: none of {len(pairs)} pictures has a label file, {Path(pictures[0]).stem}.txt, in a "
            "folder labels/ beside images/ or next to it"
        )
    return pairs
