"""The files below a folder, and which of them a name in somebody else's file means."""

from __future__ import annotations

import functools
import os
import re
from collections import Counter, defaultdict
from pathlib import Path

from lib.images import SUFFIXES
from lib.labels import picture_name

DEEPEST = 8  # folders below the data set's
SPLIT_WORDS = {
    "train": "train training default",
    "trainval": "trainval",
    "val": "val valid validation",
    "test": "test testing",
}
SPLIT_OF = {word: split for split, words in SPLIT_WORDS.items() for word in words.split()}
USUAL = {"JPEGImages", "Annotations"}
# Pictures in these folders are the masks of others.
MASKS = {"segmentationclass", "segmentationobject", "mask", "masks", "trimaps"}


def stem(name: str) -> str:
    """`name` without the suffix of a picture."""
    suffix = suffix_of(name)
    return name[: -len(suffix)] if suffix in SUFFIXES else name


def _bare(path: str) -> str:
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
            found[_bare(path).rpartition("/")[2]].append(path)
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
            if (suffix_of(path) == ".xml") == xml and f"/{_bare(path)}".endswith(f"/{wanted}")
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
        counts = {
            {"": "files without suffix", "picture": "pictures"}.get(kind, kind): len(names)
            for kind, names in self.files.items()
            if names
        }
        few = sorted(counts.items(), key=lambda item: -item[1])[:6]
        return ", ".join(f"{kind}: {count}" for kind, count in few)
