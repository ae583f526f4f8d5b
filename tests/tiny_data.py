"""VOC and COCO folders of a few small pictures, for the tests that read data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from lib import images
from lib.annotations import Annotations, Pair, assemble, read_pairs
from lib.annotations import read_coco as read_coco_files
from lib.labels import Faults
from lib.layouts import voc_pairs

Boxes = Sequence[tuple]  # (name, x1, y1, x2, y2) continuous pixels from 0, and optionally 1 for difficult or crowd


def write_picture(path: Path, width: int = 48, height: int = 32) -> None:
    pixels = torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(len(path.name)))
    images.write_picture(pixels.to(torch.uint8), path)


def write_voc(
    folder: Path, objects: Mapping[str, Boxes], name: str = "trainval", size: tuple[int, int] = (48, 32)
) -> None:
    """One VOC year (or bare folder) with the pictures `objects` by stem, of size (width, height)."""
    (folder / "Annotations").mkdir(parents=True, exist_ok=True)
    for stem, boxes in objects.items():
        write_picture(folder / "JPEGImages" / f"{stem}.jpg", *size)
        elements = "".join(
            f"<object><name>{label}</name><difficult>{int(bool(rest))}</difficult><bndbox><xmin>{x1 + 1}</xmin>"
            f"<ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
            for label, x1, y1, x2, y2, *rest in boxes
        )
        header = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
        (folder / "Annotations" / f"{stem}.xml").write_text(f"<annotation>{header}{elements}</annotation>")
    sets = folder / "ImageSets" / "Main"
    sets.mkdir(parents=True, exist_ok=True)
    (sets / f"{name}.txt").write_text("".join(f"{stem}\n" for stem in objects))


def write_coco(
    path: Path, objects: Mapping[str, Boxes], category_ids: Mapping[str, int], size: tuple[int, int] = (48, 32)
) -> None:
    """An instances JSON of pictures that are there already; image ids run from 10."""
    image_ids = {stem: 10 + i for i, stem in enumerate(objects)}
    boxes = [(stem, box) for stem, found in objects.items() for box in found]
    annotations = [
        {
            "id": number,
            "image_id": image_ids[stem],
            "category_id": category_ids[label],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": (x2 - x1) * (y2 - y1),
            "iscrowd": int(bool(rest)),
        }
        for number, (stem, (label, x1, y1, x2, y2, *rest)) in enumerate(boxes, start=1)
    ]
    width, height = size
    images = [{"id": i, "file_name": f"{s}.jpg", "width": width, "height": height} for s, i in image_ids.items()]
    categories = [{"id": i, "name": label} for label, i in category_ids.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def read_voc(
    root: Path, sets: Sequence[str], classes: Sequence[str] = (), *options: object, **more: object
) -> Annotations:
    """Annotations of some VOC image sets; `options` are those of Faults."""
    faults = Faults(*options, **more)
    pairs = [pair for name in sets for pair in voc_pairs(root / f"ImageSets/Main/{name}.txt", faults)]
    return assemble(read_pairs(pairs, faults), root, classes, faults)


def read_coco(path: Path, folder: Path, classes: Sequence[str] = (), *options: object) -> Annotations:
    """Annotations of a COCO file whose pictures are in `folder`; `options` are those of Faults."""
    faults = Faults(*options)
    return assemble(read_coco_files(folder, [path], faults), path, classes, faults)


def read_label(root: Path, pair: Pair, names: dict[int, str] | None = None, on_error: str = "raise") -> Annotations:
    """Annotations of one picture with its label file: VOC's, or with `names` YOLO's."""
    faults = Faults(on_error)
    return assemble(read_pairs([pair], faults, names), root, (), faults)
