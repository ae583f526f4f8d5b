"""Augmented training pictures a second on one core, against torchvision's own detection reference.

    python bench/data_loading.py /path/to/voc --out data_loading.json

From JPEG files to (3, 300, 300) with boxes, as lib/datasets.py does for training; beside it PIL and the "ssd" preset of
torchvision's references/detection/presets.py (RandomPhotometricDistort, RandomZoomOut, RandomIoUCrop,
RandomHorizontalFlip, here followed by the resize that its model does, PILToTensor, SanitizeBoundingBoxes). Without
anything random both must give the same pictures, but for rounding, and boxes; with it, as many objects on average.
They take turns, a pass over the same pictures each. Takes a VOC folder. Prints a table, writes JSON.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.turns import add_options, begin, print_table, show, spread, take_turns, timed, write
from lib.annotations import Annotations
from lib.config import AugmentConfig, DataConfig
from lib.datasets import DetectionDataset, load_annotations
from lib.errors import UserError
from lib.transforms import train_transform

MEAN = (123, 117, 104)  # of the preset: the fill when zooming out
PIXEL_TOLERANCE = 1.0  # levels of 255, on average: PIL rounds after each direction of a resize
OBJECTS_TOLERANCE = 0.1  # of the mean number of objects left
NOTHING_RANDOM = AugmentConfig(zoom_out=0, iou_crop=0, distort=0, flip=0)
AS_THE_PRESET = AugmentConfig()

Load = Callable[[int, int], tuple[Tensor, Tensor]]  # epoch and row to a picture uint8 and boxes in [0, 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="VOC folder: JPEGImages, Annotations, ImageSets/Main")
    add_options(parser, "data_loading.json", rounds=9, threads=1)
    parser.add_argument("--images", type=int, default=100, help="of the folder, in a pass (default: 100)")
    parser.add_argument("--size", type=int, default=300, help="pixels a side (default: 300)")
    args = parser.parse_args()
    clock = begin(args)
    annotations = load_annotations(DataConfig(dataset_type="voc", root=str(args.data)), "train")
    rows = range(min(args.images, len(annotations)))
    check_plain(annotations, rows, args.size)
    sides = {
        "ours": ours(annotations, args.size, AS_THE_PRESET),
        "torchvision": torchvisions(annotations, args.size, True),
    }
    objects = {name: mean_objects(load, rows) for name, load in sides.items()}
    if abs(objects["ours"] / objects["torchvision"] - 1) > OBJECTS_TOLERANCE:
        raise UserError(f"the mean number of objects left differs: {objects}")
    epochs = iter(range(10**9))

    def one_pass(load: Load) -> None:
        epoch = next(epochs)
        for row in rows:
            load(epoch, row)

    runs = {name: timed(lambda load=load: one_pass(load), clock) for name, load in sides.items()}
    seconds = take_turns(runs, args.rounds)
    report(args, len(rows), seconds, objects)


def ours(annotations: Annotations, size: int, augment: AugmentConfig) -> Load:
    dataset = DetectionDataset(annotations, range(len(annotations)), train_transform(size, augment))

    def load(epoch: int, row: int) -> tuple[Tensor, Tensor]:
        image, boxes, *_ = dataset[epoch, row]
        return image, boxes

    return load


def torchvisions(annotations: Annotations, size: int, augment: bool) -> Load:
    fill = {tv_tensors.Image: MEAN, Image.Image: MEAN, "others": 0}
    random = [
        v2.RandomPhotometricDistort(),
        v2.RandomZoomOut(fill=fill),
        v2.RandomIoUCrop(),
        v2.RandomHorizontalFlip(p=0.5),
    ]
    rest = [v2.Resize([size, size]), v2.PILToTensor(), v2.SanitizeBoundingBoxes()]
    transform = v2.Compose([*random, *rest] if augment else rest)

    def load(_epoch: int, row: int) -> tuple[Tensor, Tensor]:
        image = Image.open(annotations.path(row)).convert("RGB")
        target = annotations.target(row)
        canvas = image.size[::-1]
        sample = {
            "image": image,
            "boxes": tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=canvas),
            "labels": target["labels"],
        }
        sample = transform(sample)
        return sample["image"].as_subclass(Tensor), sample["boxes"].as_subclass(Tensor) / size

    return load


def check_plain(annotations: Annotations, rows: Sequence[int], size: int) -> None:
    mine, theirs = ours(annotations, size, NOTHING_RANDOM), torchvisions(annotations, size, False)
    for row in rows:
        (image, boxes), (their_image, their_boxes) = mine(0, row), theirs(0, row)
        off = (image.float() - their_image.float()).abs().mean().item()
        if off > PIXEL_TOLERANCE or not torch.allclose(boxes, their_boxes, atol=1e-4):
            raise UserError(
                f"{annotations.path(row)}: without anything random, the pictures differ by {off:.2f} levels"
            )


def mean_objects(load: Load, rows: Sequence[int], passes: int = 3) -> float:
    torch.manual_seed(0)
    return sum(len(load(epoch, row)[1]) for epoch in range(passes) for row in rows) / (passes * len(rows))


def report(args: argparse.Namespace, images: int, seconds: dict, objects: dict) -> None:
    rates = {name: spread(images / values) for name, values in seconds.items()}
    faster = spread(seconds["torchvision"] / seconds["ours"])
    print(f"{images} pictures a pass, {args.size} px, {args.threads} thread(s), {args.rounds} rounds")
    table = [(name, show(rates[name], 0), f"{objects[name]:.2f}") for name in rates]
    print_table(("", "pictures a second", "objects left, mean"), table)
    print(f"times faster: {show(faster)}")
    write(args.out, {"images": images, "size": args.size, "rates": rates, "objects": objects, "faster": faster})


if __name__ == "__main__":
    main()
