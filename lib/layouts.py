"""What lies in a folder: VOC, COCO or YOLO, and which files make up its training and its test data.

Nothing is opened but lists of pictures, YAML files, the ends of JSON files, and XML files where names do not decide.
"""

import contextlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from posixpath import basename, dirname, exists
from typing import Any, NamedTuple

from lib import UserError, did_you_mean, labels
from lib.config import DataConfig
from lib.images import (
    SPLIT_OF,
    SUFFIXES,
    Tree,
    bare,
    is_made,
    loose,
    of_another_split,
    slashes,
    split_of,
    splits_by_level,
    stem,
    suffix_of,
)
from lib.labels import Faults
from lib.plain import shown

ONE_OF_MANY = "other"  # VOC has two sets for each class, such as cat_train
IMAGE_SET = re.compile(r"((?:[^/]+/){0,4})ImageSets/(Main/)?([^/]+)\.txt")  # some tools leave Main out
LABEL_COLUMN = re.compile(r"\s+(-1|0|1)$")  # of the image sets of one class
EXPECTED = (
    "VOC (ImageSets/Main/*.txt, or an XML file for each picture), COCO (a JSON file with images, annotations and "
    "categories), YOLO (data.yaml, or classes.txt and a text file for each picture)"
)
NOT_INSTANCES = re.compile(r"captions|keypoints|panoptic|image_info|stuff|results|detections|predictions", re.I)


class Pair(NamedTuple):
    """A picture and its label file; `label` is None where a picture has none."""

    name: str  # of the picture, without suffix: its id if no other has it
    picture: str
    label: Path | None


class Found(NamedTuple):
    """What a folder was recognised as."""

    kind: str  # "voc", "coco" or "yolo"
    what: str
    split_of: dict[str, str]  # of each item (list, file or folder): "train", "trainval", "val", "test", or ""
    parts: Callable[[list[str]], list[Any]]  # of some items: Pairs, or for COCO the JSON files
    names: dict[int, str] | None = None  # YOLO's classes by number
    keypoints: int = 0  # the numbers that YOLO's lines have after a box


def find_layout(data: DataConfig, split: str, faults: Faults) -> tuple[Found, list[Any], bool]:
    """What the folder `data.root` is, the parts of a split ("train" or "test"), and whether test data is to be cut off.

    Raises UserError that says what lies there if it is nothing that is known, or not `data.dataset_type`.
    """
    root = Path(data.root)
    if not (exists(root) and root.is_dir()):
        raise UserError(f"{root}: no such folder (data.root)")
    tree = Tree(root, labels.picture_name)
    ways = (("voc", _voc_lists), ("yolo", _yolo_yaml), ("coco", _coco), ("voc", _voc_files), ("yolo", _yolo_files))
    ways = (*ways, ("coco", partial(_coco, any_name=True)))
    # A key that only one kind has says which one is meant.
    keys = {"voc": data.train_sets or data.test_sets, "coco": data.train_annotations or data.test_annotations}
    auto = [kind for kind, value in keys.items() if value] or ["voc", "yolo", "coco"]
    found = None
    for kind, way in ways:
        if found is None and kind in (auto if data.dataset_type == "auto" else [data.dataset_type]):
            found = way(tree, data, faults)
    if found is None:
        kinds = Counter({kind or "without suffix": len(names) for kind, names in tree.files.items() if names})
        there = ", ".join(f"{kind}: {count}" for kind, count in kinds.most_common(6)) or "nothing"
        raise UserError(f"{root}: expected {EXPECTED}; found {there} (data.root, data.dataset_type)")

    train, test, left_out = _divide(found, data)
    if not train and (split == "train" or not test):
        items, key = _few(sorted(found.split_of)), "train_annotations" if found.kind == "coco" else "train_sets"
        raise UserError(f"{root}: {found.what}: which is the training data? Found {items} (data.{key})")
    notes = [f"{root}: {found.what}; training data: {_few(train)}; test data: {_few(test)}"]
    if left_out:
        notes.append(f"{root}: neither trains nor tests: {_few(left_out)}")
        unsaid = [item for item in left_out if not found.split_of[item]]
        unsaid = [item for item in unsaid if found.kind == "voc" or labels.yolo_label(str(root / item))]
        if not test and len(unsaid) > len(train):  # such as folders of classes, one of which is called train
            text = (
                f"{len(unsaid)} of {len(found.split_of)} files lie in folders that tell no split, beside others that do"
            )
            raise UserError(f"{root}: {text}: {_few(unsaid)}; put train, val or test into every path or into none")
    faults.notes[:0] = [*notes, *(f"{folder}: this folder cannot be read: left out" for folder in tree.unreadable)]
    parts = found.parts(test if split == "test" and test else train)
    faults.notes += tree.namesakes()
    return found, parts, not test


def _few(names: Sequence[str]) -> str:
    return (", ".join(names) or "none") if len(names) <= 4 else f"{len(names)} files from {names[0]} to {names[-1]}"


def _divide(found: Found, data: DataConfig) -> tuple[list[str], list[str], list[str]]:
    """The items that train, those that test (none: there is no test data), and those that do neither.

    Where there is test data, the validation data trains as well, as in VOC's trainval: the search takes its own part
    of the training data. Else it is the test data.
    """
    named: dict[str, list[str]] = {}
    for split in ("train", "test"):
        key = {"voc": f"{split}_sets", "coco": f"{split}_annotations"}.get(found.kind, "")
        values = getattr(data, key, [])
        named[split] = [values] if values and isinstance(values, str) else list(values)
        for name in named[split]:
            if name not in found.split_of:
                raise UserError(f"data.{key}: '{name}' is not there{did_you_mean(name, found.split_of)}")
    free = defaultdict(list)
    for item, split in found.split_of.items():
        if item not in named["train"] + named["test"]:
            free[split].append(item)

    train, val, both = free["train"] or free[""], free["val"], free["trainval"]
    # Validation data that is a part of what trains cannot test.
    overlaps = any(found.split_of[name] == "trainval" for name in named["train"])
    tests = named["test"] or free["test"] or (val if (train or named["train"]) and not overlaps else [])
    tests_val = any(found.split_of[name] == "val" for name in tests)
    chosen = named["train"] or (train if tests_val else []) or both or train + val
    covered = {*chosen, *tests, *(train + val if set(chosen) & set(both) else [])}  # VOC's trainval is train and val
    left_out = [item for item, split in found.split_of.items() if item not in covered and split != ONE_OF_MANY]
    return chosen, tests, left_out


# VOC: with lists of pictures, or an XML file for each picture.


def _voc_lists(tree: Tree, data: DataConfig, faults: Faults) -> Found | None:
    """Image sets of a VOCdevkit ("VOC2007/trainval") or a bare folder ("trainval")."""
    found = list(filter(None, map(IMAGE_SET.fullmatch, tree.files[".txt"])))
    # Beside Main there may be other lists, such as one of the classes.
    file_of = {match[1] + match[3]: match[0] for match in [match for match in found if match[2]] or found}
    named = {*data.train_sets, *data.test_sets}
    empty = [name for name in file_of if name not in named and _split_of_list(name) in ("val", "test")]
    empty = [name for name in empty if not labels.read_lines(tree.root / file_of[name])]
    if 0 < len(empty) < len(file_of):
        faults.notes.append(f"{tree.root}: empty, so left out: {_few([file_of.pop(name) for name in empty])}")
    # A single set trains, whatever it is called.
    unknown = ONE_OF_MANY if len(file_of) > 1 else "train"
    splits = {name: _split_of_list(name) or unknown for name in file_of}

    def pairs(chosen: list[str]) -> list[Pair]:
        return [pair for name in chosen for pair in voc_pairs(tree.root / file_of[name], faults)]

    return Found("voc", "VOC", splits, pairs) if splits else None


def voc_pairs(file: Path, faults: Faults) -> list[Pair]:
    """The pictures of an image set, each once.

    The sets of one class have a second column, -1, 0 or 1: whether the picture shows it. It selects nothing, since a
    picture without the class belongs to the set too, and the annotations say what a picture shows.
    """
    folder = next(place.parent for place in file.parents if place.name == "ImageSets")
    tree = Tree(folder, labels.picture_name)
    lines = labels.read_lines(file)
    if not lines:
        faults.add("picture", "empty image set", f"{file}: the image set is empty")
    of_a_class = all(map(LABEL_COLUMN.search, lines))
    pairs: dict[str, Pair] = {}  # a picture that is listed twice counts once
    for line in map(slashes, lines):
        for name in (line, LABEL_COLUMN.sub("", line)) if of_a_class else (line,):
            if picture := tree.find(name, "JPEGImages/"):
                break
        else:
            text = f"{folder / 'JPEGImages' / stem(name)}.jpg: no such image, but {file.name} lists it"
            faults.add("picture", "missing", text)
            continue
        # The id is what is listed, without the folder of the pictures and without folders of another machine.
        image_id = stem(name)
        while "/" in image_id and not stem(picture).endswith(f"/{image_id}"):
            image_id = image_id.partition("/")[2]
        xml = tree.find(image_id, "Annotations/", ".xml")
        if xml and not xml.startswith("Annotations/") and (folder / "Annotations").is_dir():
            xml = None  # of another folder, such as Annotations_old/
        if xml:  # it knows better which picture is its own
            picture = tree.find(name, xml) or picture
        label = folder / (xml or f"Annotations/{image_id}.xml")
        pairs.setdefault(picture, Pair(image_id, str(folder / picture), label))
    faults.notes += tree.namesakes()
    return list(pairs.values())


def _voc_files(tree: Tree, data: DataConfig, faults: Faults) -> Found | None:
    if not tree.files[".xml"] and tree.files[""]:  # the XML files of Stanford Dogs have no suffix
        with contextlib.suppress(OSError), (tree.root / tree.files[""][-1]).open("rb") as file:
            tree.files[".xml"] = tree.files[""] if b"<annotation" in file.read(200) else []
    picture_of = {}
    for xml in tree.files[".xml"]:
        name = basename(xml[:-4] if suffix_of(xml) == ".xml" else xml)
        picture_of[xml] = tree.find(name, xml) or tree.find(labels.picture_name(tree.root / xml) or name, xml)
    if not any(picture_of.values()):
        return None
    for xml in of_another_split(picture_of, lambda xml: split_of(dirname(xml))):
        picture_of[xml] = None
    if foreign := [xml for xml, picture in picture_of.items() if not picture and not labels.is_voc(tree.root / xml)]:
        faults.notes.append(f"{tree.root}: no VOC annotation: {_few(foreign)}")
        for xml in foreign:
            del picture_of[xml]
    first: dict[str, str] = {}
    for xml, picture in picture_of.items():
        other = first.setdefault(picture, xml) if picture else xml
        if other != xml and labels.read_text(tree.root / other) != labels.read_text(tree.root / xml):
            text = f"{tree.root / xml}: {picture} has another XML file, {other}: which one is meant?"
            faults.add("picture", "annotated twice", text)
    splits = {xml: split_of(dirname(xml), dirname(picture or "")) for xml, picture in picture_of.items()}
    if by_level := splits_by_level([dirname(xml) for xml in picture_of]):
        splits = dict(zip(picture_of, by_level, strict=True))
    if lists := _lists(tree):
        split_of_picture = {}
        for split, file in ((split, file) for split, files in lists.items() for file in files):
            for line, picture in _listed(tree, file):
                if picture:
                    split_of_picture[picture] = split
                else:
                    faults.add("picture", "missing", f"{tree.root / file}: no such image, or several: {shown(line)}")
        # Lists of the test alone leave the others to train.
        trains = "train" in lists or "trainval" in lists
        for xml, picture in picture_of.items():
            splits[xml] = split_of_picture.get(picture, "unlisted" if trains else splits[xml] or "train")

    def pairs(chosen: list[str]) -> list[Pair]:
        found = []
        for xml in chosen:
            if picture := picture_of[xml]:
                found.append(Pair(stem(basename(picture)), str(tree.root / picture), tree.root / xml))
            else:
                faults.add("picture", "missing", f"{tree.root / xml}: the picture that it belongs to is not there")
        return found

    used = {basename(loose(bare(picture))) for picture in picture_of.values() if picture}
    if rest := sum(kind == "pictures" and name not in used for kind, name in tree.by_stem):
        faults.notes.append(f"{tree.root}: {rest} pictures have no XML file, so they were not annotated: left out")
    return Found("voc", "VOC, an XML file for each picture", splits, pairs)


def _split_of_list(path: str) -> str | None:
    return SPLIT_OF.get(re.sub("^autosplit_|[_-]?(list|set|images|files)?([.]txt)?$", "", basename(path).lower()))


def _lists(tree: Tree) -> dict[str, list[str]]:
    """Text files that list the pictures of a split by its name, such as train.txt or test_list.txt, by split."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in tree.files[".txt"]:
        split = _split_of_list(path)
        if split and any(picture for _, picture in _listed(tree, path)):
            found[split].append(path)
    # Of two lists that name a picture the later one decides: a test picture never trains, and what validates does.
    order = ("trainval", "train", "val", "test") if "train" in found else ("val", "trainval", "test")
    return {split: found[split] for split in order if split in found}


def _listed(tree: Tree, file: str) -> Iterator[tuple[str, str | None]]:
    """The lines of a list, each with the picture that it names; it may go on, with a label file or a class's number."""
    for line in map(slashes, labels.read_lines(tree.root / file)):
        picture = tree.find(line) or tree.find(line.split()[0])
        if picture or not line.startswith("#"):
            yield line, picture


# COCO.


def _coco(tree: Tree, data: DataConfig, faults: Faults, any_name: bool = False) -> Found | None:
    paths = [path for path in tree.files[".json"] if labels.is_coco(tree.root / path)]
    others = [path for path in paths if NOT_INSTANCES.search(basename(path)) and not any_name]
    if others:
        paths = [path for path in paths if path not in others]
    if others and paths:
        faults.notes.append(f"{tree.root}: not read as annotations, by its name: {_few(others)}")
    splits = {path: split_of(path) for path in paths}
    named = {"train": data.train_annotations, "test": data.test_annotations}
    for split, path in named.items():
        if path and exists(tree.root / path):
            splits.setdefault(path, split)
    for split in dict.fromkeys(splits.values()):
        files = [path for path in splits if splits[path] == split]
        which = "test" if split == "test" else "train"
        if len(files) > 1 and not named[which] and (split or "train" not in splits.values()):
            raise UserError(f"{tree.root}: several COCO files, {_few(files)}: data.{which}_annotations names the one")

    known = splits or any(named.values())
    return Found("coco", "COCO", splits, lambda chosen: [tree.root / path for path in chosen]) if known else None


# YOLO.


def _yolo_yaml(tree: Tree, data: DataConfig, faults: Faults) -> Found | None:
    found = {}
    for path in (name for name in tree.files[".yaml"] + tree.files[".yml"] if name.count("/") < 2):
        try:
            description = labels.read_yolo_yaml(tree.root / path, tree.root)
        except UserError:
            if data.dataset_type == "yolo" or path == "data.yaml":
                raise
            continue
        if description[1]["train"] or description[1]["val"]:
            found[path] = description
    if not found:
        return None
    first, *others = [path for path in found if stem(path) in ("data.yaml", "data.yml")] or found
    for other in others:
        if (dirname(other), found[other]) != (dirname(first), found[first]):
            raise UserError(f"{tree.root}: {first} and {other} describe two data sets: --data names the folder of one")
    names, places, keypoints = found[first]
    orders = {path: list(description[0].values()) for path, description in found.items()}
    orders |= {
        path: labels.read_lines(tree.root / path) for path in tree.files[".txt"] if basename(path) == "classes.txt"
    }
    for other, order in orders.items():
        if order != orders[first] and sorted(order) == sorted(orders[first]):
            raise UserError(f"{tree.root}: {first} and {other} list the classes in another order: keep one")
    return _yolo(tree, first, names, places, faults)._replace(keypoints=keypoints)


def _yolo_files(tree: Tree, data: DataConfig, faults: Faults) -> Found | None:
    texts = tree.files[".txt"]
    files = [name for name in texts if basename(name) == "classes.txt"]
    files += [*tree.files[".names"], *(name for name in tree.files[".labels"] if basename(name) == "_darknet.labels")]
    labelled = texts and any(labels.yolo_label(str(tree.root / name)) for name in tree.pictures)
    if not labelled or not (files or data.classes or any("labels" in name.lower().split("/") for name in texts)):
        return None
    if not files and not data.classes:
        raise UserError(f"{tree.root}: YOLO labels without class names: add data.yaml or classes.txt, or data.classes")
    # labelImg leaves a list in each folder, with the classes that were known by then.
    lists = {name: labels.read_lines(tree.root / name) for name in files}
    files = sorted(files, key=lambda name: -len(lists[name]))
    for other in files[1:]:
        if lists[files[0]][: len(lists[other])] != lists[other]:
            raise UserError(f"{tree.root}: {files[0]} and {other} list other classes, or in another order: keep one")
    source = files[0] if files else ""
    classes = labels.read_text(tree.root / source).rstrip().splitlines() if files else data.classes
    names = labels.plain_names(tree.root / source, dict(enumerate(classes)))
    # Lists by their usual names, as darknet's, or all pictures by the names of their folders.
    places = _lists(tree)
    if "train" not in places and "trainval" not in places:
        listed = {picture for files in places.values() for file in files for _, picture in _listed(tree, file)}
        unknown = "train" if places else ""
        free = [path for path in _shown(tree, faults) if path not in listed]
        folders = [dirname(path) for path in free]
        for path, split in zip(free, splits_by_level(folders) or map(split_of, folders), strict=True):
            places.setdefault(split or unknown, []).append(path)
    return _yolo(tree, source, names, places, faults)


def _yolo(tree: Tree, source: str, names: dict[int, str], places: Mapping[str, list[str]], faults: Faults) -> Found:
    """`places`, by split, are folders, text files that list pictures, or pictures."""
    file = tree.root / source
    bases = [file.parent, tree.root]
    splits: dict[str, str] = {}
    for split, values in places.items():
        for value in values:
            place = labels.locate(bases, value)
            if place is None:
                if suffix_of(value) in SUFFIXES:
                    faults.add("picture", "missing", f"{tree.root / value}: no such picture")
                elif split == "train":
                    raise UserError(f"{file}: train: no folder or list '{value}' here")
                else:
                    faults.notes.append(f"{file}: {split}: no folder or list '{value}'")
            elif split != "train" and place in [
                labels.locate(bases, name) for name in splits if splits[name] == "train"
            ]:
                faults.notes.append(f"{file}: {split}: not test data, since it is the training data: '{value}'")
            elif split != "train" and not labels.has_labels(place):
                faults.notes.append(f"{file}: {split}: no picture with a label file, so left out: '{value}'")
            else:
                splits[value] = split
                if place not in [base / value for base in bases] or tree.root not in (place, *place.parents):
                    faults.notes.append(f"{file}: {split}: '{value}' is {place}")

    def pairs(chosen: list[str]) -> list[Pair]:
        pictures: dict[str, None] = {}  # each once, in order
        for place in (labels.locate(bases, value) for value in chosen):
            if place.is_dir():
                pictures |= dict.fromkeys(str(place / name) for name in _shown(Tree(place), faults))
            elif suffix_of(place.name) in SUFFIXES:
                pictures[str(place)] = None
            else:
                for line in (slashes(line) for line in labels.read_lines(place) if not line.startswith("# ")):
                    # Not down to its bare name, which may be that of a picture of another split.
                    name = re.sub("^([A-Za-z]:)?/+", "", line)
                    path = labels.locate([place.parent, *bases], line) or tree.root / (tree.find(name) or line)
                    pictures[str(path)] = None
        found = [Pair(stem(basename(name)), name, labels.yolo_label(name)) for name in pictures]
        if orphans := _without_picture(tree, found):
            faults.notes.append(f"{file}: {len(orphans)} label files belong to no picture, the first: {orphans[0]}")
        for _, picture, label in found:
            if label and (other := labels.other_label(picture, label)):
                faults.add("picture", "annotated twice", f"{label} and {other} differ: which one is meant?")
            namesakes = tree.by_stem.get(("pictures", basename(loose(stem(picture)))), ()) if label else ()
            for other in (str(tree.root / path) for path in namesakes if not is_made(path)):
                if labels.yolo_label(other) == label and os.path.realpath(other) != os.path.realpath(picture):
                    faults.add("picture", "annotated twice", f"{label}: belongs to two pictures, {picture} and {other}")
        alone = [pair.picture for pair in found if not pair.label]
        if orphans and len(alone) > len(found) / 2:
            text = f"{len(alone)} of {len(found)} pictures have no label file, such as {alone[0]}"
            raise UserError(f"{file}: {text}, and {len(orphans)} label files no picture, such as {orphans[0]}")
        if alone:
            text = f"{len(alone)} of {len(found)} pictures have no label file, so they show no object"
            faults.notes.append(f"{file}: {text}; the first: {alone[0]}")
        if found and not any(pair.label for pair in found):
            if not exists(found[0].picture):
                raise UserError(f"{found[0].picture}: no such picture, which {_few(chosen)} names")
            where = "in a folder labels/ beside images/ or next to it"
            text = f"none of {len(found)} pictures of {_few(chosen)} has a label file, {found[0].name}.txt, {where}"
            raise UserError(f"{file}: {text}")
        return found

    return Found("yolo", f"YOLO, {source or 'a text file for each picture'}", splits, pairs, names)


def _shown(tree: Tree, faults: Faults) -> list[str]:
    """The pictures of a folder without masks and the like, which have the names of others and no label file."""
    made = {path for path in tree.pictures if tree.has_masks and is_made(path)}
    made = {path for path in made if not labels.yolo_label(str(tree.root / path))}
    if made:
        faults.notes.append(f"{tree.root}: {len(made)} pictures are masks or the like of others: left out")
    return [path for path in tree.pictures if path not in made]


def _without_picture(tree: Tree, pairs: Sequence[Pair]) -> list[Path]:
    """The YOLO label files beside those of some pictures that belong to no picture."""
    names = {loose(stem(basename(pair.picture))) for pair in pairs} | {name for _, name in tree.by_stem}
    found = []
    for folder in sorted({pair.label.parent for pair in pairs if pair.label}):
        for text in sorted(folder.glob("*.txt")):
            if not names.isdisjoint((loose(text.stem), loose(stem(text.stem)))):
                continue
            with contextlib.suppress(UserError):  # a folder, or a link to nothing
                if re.match(r"\d+(\s[\d.]+){4}", labels.read_text(text)):
                    found.append(text)
    return found
