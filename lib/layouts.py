"""What lies in a folder: VOC, COCO or YOLO, and which files make up its training and its test data.

Nothing is opened but lists of pictures, YAML files, the ends of JSON files, and XML files where names do not decide.
"""

from __future__ import annotations

import functools
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from posixpath import basename, dirname, exists
from typing import Any, NamedTuple

from lib import labels
from lib.config import DataConfig
from lib.errors import UserError, did_you_mean
from lib.images import SUFFIXES
from lib.labels import SPLIT_OF, Faults, slashes, split_of, stem, suffix_of

DEEPEST = 8  # folders below the data set's
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


class Found(NamedTuple):
    """What a folder was recognised as: its items by split ("train", "trainval", "val", "test", ""), and their use."""

    kind: str  # "voc", "coco" or "yolo"
    what: str
    groups: Mapping[str, list[str]]
    # Of some items, and whether they train or test: for VOC and YOLO Pairs, for COCO JSON files, each with the folder
    # of its pictures.
    parts: Callable[[list[str], str], list[Any]]
    names: dict[int, str] | None = None  # YOLO's classes by number


class Tree:
    """The files below a folder by suffix, as paths relative to it, sorted."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files: dict[str, list[str]] = defaultdict(list)
        seen = set()
        for folder, folders, names in os.walk(root, followlinks=True):
            below = Path(folder).relative_to(root).as_posix()
            real = Path(folder).resolve()
            if real in seen or below.count("/") >= DEEPEST:
                folders.clear()  # a link back, or too deep
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                if not name.startswith("."):
                    kind = "picture" if suffix_of(name) in SUFFIXES else suffix_of(name)
                    self.files[kind].append(name if below == "." else f"{below}/{name}")
        self.pictures = self.files["picture"]

    @functools.cached_property
    def by_stem(self) -> dict[str, list[str]]:
        """Pictures and XML files, each by its name without folder and suffix; some tools name the latter a.jpg.xml."""
        found = defaultdict(list)
        for path in (*self.pictures, *self.files[".xml"]):
            found[stem(basename(bare(path)))].append(path)
        return found

    def find(self, name: str, xml: bool = False, beside: str = "") -> str | None:
        """The picture (or the XML file) of this name, with or without folders and suffix; None if there is none.

        Of several pictures, the one that the annotation `beside` names, then the one whose folders have most in common
        with it, then no mask, then a JPEG. None if that does not tell.
        """
        wanted = stem(name)
        candidates = [
            path
            for path in self.by_stem.get(basename(wanted), ())
            if (suffix_of(path) == ".xml") == xml and f"/{bare(path)}".endswith(f"/{wanted}")
        ]
        if len(candidates) < 2:
            return candidates[0] if candidates else None
        filename = labels.picture_name(self.root / beside) if beside.endswith(".xml") else ""

        def unlike(path: str) -> tuple:
            folders, suffix = path.split("/")[:-1], suffix_of(path)
            shared = Counter(folders) & Counter(beside.split("/")[:-1])
            return (
                not f"/{path}".endswith(f"/{name}"),
                basename(path) != filename,
                -shared.total(),
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


def bare(path: str) -> str:
    """The path of a picture or an XML file without its suffix."""
    return stem(path[:-4] if suffix_of(path) == ".xml" else path)


def find_layout(data: DataConfig, split: str, faults: Faults) -> tuple[Found, list[Any], bool]:
    """What the folder `data.root` is, the parts of a split ("train" or "test"), and whether test data is to be cut off.

    Raises UserError that says what lies there if it is nothing that is known, or not `data.dataset_type`.
    """
    root = Path(data.root)
    found = _recognise(root, data, faults)
    train, test, left_out = _divide(found, data)
    if not train and (split == "train" or not test):
        items = _few(sorted(item for group in found.groups.values() for item in group))
        raise UserError(f"{root}: {found.what}: which is the training data? Found {items} (data.train_sets)")
    notes = [f"{root}: {found.what}; training data: {_few(train)}; test data: {_few(test)}"]
    if left_out:
        notes.append(f"{root}: neither trains nor tests: {_few(left_out)}")
    faults.notes[:0] = notes
    return found, found.parts(test if split == "test" and test else train, split), not test


def _few(names: Sequence[str]) -> str:
    return (", ".join(names) or "none") if len(names) <= 4 else f"{len(names)} files from {names[0]} to {names[-1]}"


def _recognise(root: Path, data: DataConfig, faults: Faults) -> Found:
    if not (exists(root) and root.is_dir()):
        raise UserError(f"{root}: no such folder (data.root)")
    tree = Tree(root)
    ways = (("voc", _voc_lists), ("yolo", _yolo_yaml), ("coco", _coco), ("voc", _voc_files), ("yolo", _yolo_files))
    for kind, way in ways:
        if data.dataset_type in ("auto", kind) and (found := way(tree, data, faults)):
            return found
    expected = {
        "voc": "VOC (ImageSets/Main/*.txt, or an XML file for each picture)",
        "coco": "COCO (a JSON file with images, annotations and categories)",
        "yolo": "YOLO (data.yaml, or classes.txt and a text file for each picture)",
    }
    wanted = expected.get(data.dataset_type, ", ".join(expected.values()))
    kinds = Counter({kind: len(names) for kind, names in tree.files.items() if names}).most_common(6)
    called = {"": "files without suffix", "picture": "pictures"}
    there = ", ".join(f"{called.get(kind, kind)}: {count}" for kind, count in kinds)
    raise UserError(f"{root}: expected {wanted}; found {there or 'nothing'} (data.root, data.dataset_type)")


def _divide(found: Found, data: DataConfig) -> tuple[list[str], list[str], list[str]]:
    """The items that train, those that test (none: there is no test data), and those that do neither.

    Where there is test data, the validation data trains as well, as in VOC's trainval: the search takes its own part
    of the training data. Else it is the test data.
    """
    group_of = {item: split for split, items in found.groups.items() for item in items}
    named: dict[str, list[str]] = {"train": [], "test": []}
    for split in named:
        key = {"voc": f"{split}_sets", "coco": f"{split}_annotations"}.get(found.kind)
        values = getattr(data, key) if key else []
        named[split] = [values] if values and isinstance(values, str) else list(values)
        for name in named[split]:
            if name not in group_of:
                raise UserError(f"data.{key}: '{name}' is not there{did_you_mean(name, group_of)}")

    def free(split: str) -> list[str]:
        return [item for item in found.groups.get(split, ()) if item not in (*named["train"], *named["test"])]

    train, val, both = free("train") or free(""), free("val"), free("trainval")
    # Validation data that is a part of what trains cannot test.
    overlaps = any(group_of[name] == "trainval" for name in named["train"])
    tests = named["test"] or free("test") or (val if (train or named["train"]) and not overlaps else [])
    tests_val = any(group_of[name] == "val" for name in tests)
    chosen = named["train"] or (train if tests_val else []) or both or train + val
    covered = {*chosen, *tests, *(train + val if set(chosen) & set(both) else [])}  # VOC's trainval is train and val
    left_out = [item for item, split in group_of.items() if item not in covered and split != ONE_OF_MANY]
    return chosen, tests, left_out


# VOC: with lists of pictures, or an XML file for each picture.


def _voc_lists(tree: Tree, data: DataConfig, faults: Faults) -> Found | None:
    """Image sets of a VOCdevkit ("VOC2007/trainval") or a bare folder ("trainval")."""
    sets: list[str] = []
    for place in ("ImageSets/Main/", "ImageSets/"):  # some tools leave Main out
        found = [name for name in tree.files[".txt"] if re.fullmatch(rf"([^/]+/){{0,2}}{place}[^/]+\.txt", name)]
        sets = sets or [name[: -len(".txt")].replace(place, "") for name in found]
    groups = defaultdict(list)
    for name in sets:
        # A single set trains, whatever it is called.
        groups[SPLIT_OF.get(basename(name).lower(), ONE_OF_MANY if len(sets) > 1 else "train")].append(name)

    def pairs(chosen: list[str], _: str) -> list[Pair]:
        return [pair for name in chosen for pair in voc_pairs(tree.root, name, faults)]

    return Found("voc", "VOC", groups, pairs) if sets else None


def voc_pairs(root: Path, set_name: str, faults: Faults) -> list[Pair]:
    """The pictures of an image set, each once.

    The sets of one class have a second column, -1, 0 or 1: whether the picture shows it. It selects nothing, since a
    picture without the class belongs to the set too, and the annotations say what a picture shows.
    """
    folder = root / dirname(set_name)
    file = folder / "ImageSets" / "Main" / f"{basename(set_name)}.txt"
    file = file if exists(file) else folder / "ImageSets" / file.name
    tree, lines = Tree(folder), [slashes(line) for line in labels.read_lines(file)]
    if not lines:
        faults.add("picture", "empty image set", f"{file}: the image set is empty")
    columns = [LABEL_COLUMN.fullmatch(line) for line in lines]
    if all(columns) and not all(tree.find(line) for line in lines):
        lines = [column[1] for column in columns]
    pairs: dict[str, Pair] = {}  # a picture that is listed twice counts once
    for line in map(tree.tail, lines):
        name, picture = stem(line), tree.find(line, beside="JPEGImages/")
        if picture is None:
            text = f"{folder / 'JPEGImages' / name}.jpg: no such image, but {set_name} lists it"
            faults.add("picture", "missing", text)
            continue
        if stem(picture) == name:  # the list names the folder of the pictures as well
            name = name.split("/", 1)[-1]
        xml = tree.find(name, xml=True, beside="Annotations/")
        picture = tree.find(line, beside=xml or "JPEGImages/") or picture
        pairs.setdefault(picture, Pair(name, str(folder / picture), folder / (xml or f"Annotations/{name}.xml")))
    return list(pairs.values())


def _voc_files(tree: Tree, data: DataConfig, faults: Faults) -> Found | None:
    picture_of = {}
    for xml in tree.files[".xml"]:
        name = basename(xml)[: -len(".xml")]
        picture = tree.find(name, beside=xml)
        picture_of[xml] = picture or tree.find(labels.picture_name(tree.root / xml) or name, beside=xml)
    if not any(picture_of.values()):
        return None
    groups = defaultdict(list)
    for xml, picture in picture_of.items():
        groups[split_of(dirname(xml), dirname(picture or ""))].append(xml)

    def pairs(chosen: list[str], _: str) -> list[Pair]:
        for xml in chosen:
            if not picture_of[xml]:
                faults.add("picture", "missing", f"{tree.root / xml}: the picture that it belongs to is not there")
        found = ((picture_of[xml], tree.root / xml) for xml in chosen if picture_of[xml])
        return [Pair(stem(basename(picture)), str(tree.root / picture), xml) for picture, xml in found]

    others = set(tree.pictures) - set(picture_of.values())
    rest = sum(MASKS.isdisjoint(name.lower().split("/")) for name in others)
    if rest:
        faults.notes.append(f"{tree.root}: {rest} pictures have no XML file, so they were not annotated: left out")
    return Found("voc", "VOC, an XML file for each picture", groups, pairs)


# COCO.


def _coco(tree: Tree, data: DataConfig, faults: Faults) -> Found | None:
    groups = defaultdict(list)
    for path in tree.files[".json"]:
        if not NOT_INSTANCES.search(basename(path)) and labels.is_coco(tree.root / path):
            groups[split_of(path)].append(path)
    named = {"train": data.train_annotations, "test": data.test_annotations}
    for split, key in named.items():
        if key and exists(tree.root / key) and not any(key in names for names in groups.values()):
            groups[split].append(key)
    for split, names in groups.items():
        which = "test" if split == "test" else "train"
        if len(names) > 1 and not named[which] and (split or not groups.get("train")):
            raise UserError(f"{tree.root}: several COCO files, {_few(names)}: data.{which}_annotations names the one")

    def parts(chosen: list[str], split: str) -> list[tuple[Path, Path | None]]:
        folder = data.train_images if split == "train" else data.test_images
        return [(tree.root / name, tree.root / folder if folder else None) for name in chosen]

    return Found("coco", "COCO", groups, parts) if groups or any(named.values()) else None


# YOLO.


def _yolo_yaml(tree: Tree, data: DataConfig, faults: Faults) -> Found | None:
    for path in (name for name in tree.files[".yaml"] + tree.files[".yml"] if name.count("/") < 2):
        try:
            names, base, groups = labels.read_yolo_yaml(tree.root / path)
        except UserError:
            if data.dataset_type == "yolo" or path == "data.yaml":
                raise
            continue
        if groups["train"] or groups["val"]:
            return _yolo_lists(tree, path, names, base, groups, faults)
    return None


def _yolo_files(tree: Tree, data: DataConfig, faults: Faults) -> Found | None:
    texts = tree.files[".txt"]
    files = [name for name in texts if basename(name) == "classes.txt"] + tree.files[".names"] + tree.files[".labels"]
    labelled = texts and any(labels.yolo_label(str(tree.root / name)) for name in tree.pictures)
    if not labelled or not (files or data.classes or any("labels" in name.split("/") for name in texts)):
        return None
    if not files and not data.classes:
        raise UserError(f"{tree.root}: YOLO labels without class names: add data.yaml or classes.txt, or data.classes")
    source = files[0] if files else ""
    classes = labels.read_text(tree.root / source).rstrip().splitlines() if files else data.classes
    names = labels.plain_names(tree.root / source, dict(enumerate(classes)))
    lists = {SPLIT_OF[name[:-4]]: [name] for name in texts if name[:-4] in SPLIT_OF}
    if lists.get("train"):
        return _yolo_lists(tree, source, names, "", lists, faults)
    groups = defaultdict(list)
    for path in tree.pictures:
        groups[split_of(dirname(path))].append(path)

    def pairs(chosen: list[str], _: str) -> list[Pair]:
        return _yolo_pairs(tree.root, [str(tree.root / path) for path in chosen])

    return Found("yolo", "YOLO, a text file for each picture", groups, pairs, names)


def _yolo_lists(
    tree: Tree, source: str, names: dict[int, str], base: str, groups: dict[str, list[str]], faults: Faults
) -> Found:
    """What data.yaml names: folders, or text files that list pictures."""
    file = tree.root / source
    bases = [file.parent / base, file.parent, tree.root / base, tree.root.parent / base]
    for split, values in groups.items():
        for value in list(values):
            problem = "no folder or list" if _locate(bases, value) is None else ""
            if split == "train" and problem:
                raise UserError(f"{file}: train: {problem} '{value}' here")
            if split != "train" and value in groups["train"]:
                problem = "not test data, since it is the training data:"
            if problem:
                values.remove(value)
                faults.notes.append(f"{file}: {split}: {problem} '{value}'")

    def pairs(chosen: list[str], _: str) -> list[Pair]:
        pictures: dict[str, None] = {}  # each once, in order
        for place in (_locate(bases, value) for value in chosen):
            if place.is_dir():
                pictures |= {str(place / name): None for name in Tree(place).pictures}
                continue
            for line in map(slashes, labels.read_lines(place)):
                pictures[str(_locate([place.parent, *bases], line) or place.parent / line)] = None
        return _yolo_pairs(tree.root, list(pictures))

    return Found("yolo", f"YOLO, {source or 'lists'}", groups, pairs, names)


def _locate(bases: Sequence[Path], value: str) -> Path | None:
    """The file or folder that a path of data.yaml means: as it is, or where its leading folders are not here."""
    for base in bases:
        if exists(base / value):
            return base / value
    parts = [part for part in value.split("/") if part not in ("", "..", ".")]
    # Not down to the bare name of a picture or of images/, which may be another one.
    ends = ["/".join(parts[start:]) for start in range(len(parts)) if start < len(parts) - 1 or split_of(parts[-1])]
    return next((base / end for end in ends or parts for base in bases if exists(base / end)), None)


def _yolo_pairs(root: Path, pictures: list[str]) -> list[Pair]:
    pairs = [Pair(stem(basename(name)), name, labels.yolo_label(name)) for name in pictures]
    if pairs and not any(pair.label for pair in pairs):
        where = "in a folder labels/ beside images/ or next to it"
        raise UserError(f"{root}: none of {len(pairs)} pictures has a label file, {pairs[0].name}.txt, {where}")
    return pairs
