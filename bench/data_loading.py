"""Augmented training pictures a second on one core, against torchvision's own detection reference.

    python bench/data_loading.py /path/to/voc

From JPEG files to (3, 300, 300) with boxes, as lib/datasets.py does for training; beside it PIL and the "ssd" preset of
torchvision's references/detection/presets.py (RandomPhotometricDistort, RandomZoomOut, RandomIoUCrop,
RandomHorizontalFlip, then the resize of its model, PILToTensor, SanitizeBoundingBoxes). Where a GPU trains, the
distortion of colours is only drawn here and done there: "ours, beside a GPU". Without the random steps both must give
the same pictures (to rounding) and boxes; with them, as many objects on average. Each turn is one pass over the same
pictures.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from pathlib import Path

import common
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from lib import UserError
from lib.annotations import Annotations
from lib.config import AugmentConfig, DataConfig
from lib.datasets import DetectionDataset, load_annotations
from lib.runtime import run
from lib.transforms import TrainTransform

MEAN = (123, 117, 104)  # the preset's fill when zooming out
PIXEL_TOLERANCE = 1.0  # levels of 255, on average: PIL rounds after each direction of a resize
OBJECTS_TOLERANCE = 0.1  # of the mean number of objects left
NOTHING_RANDOM = AugmentConfig(zoom_out=0, iou_crop=0, distort=0, flip=0)
AS_THE_PRESET = AugmentConfig()

Load = Callable[[int, int], tuple[Tensor, Tensor]]  # epoch and row -> picture uint8 (3, S, S), boxes in [0, 1]


def main() -> None:
    parser = common.bench_parser(__doc__, "data_loading.json", rounds=9, threads=1)
    parser.add_argument("data", type=Path, help="VOC folder: JPEGImages, Annotations, ImageSets/Main")
    parser.add_argument("--images", type=int, default=100, help="in a pass (default: 100)")
    parser.add_argument("--size", type=int, default=300, help="pixels a side (default: 300)")
    args = parser.parse_args()
    clock = common.begin(args)
    annotations = load_annotations(DataConfig(dataset_type="voc", root=str(args.data)), "train")
    rows = range(min(args.images, len(annotations)))
    check_plain(annotations, rows, args.size)
    sides = {
        "ours": our_loader(annotations, args.size, AS_THE_PRESET),
        "ours, beside a GPU": our_loader(annotations, args.size, AS_THE_PRESET, distort_later=True),
        "torchvision": torchvision_loader(annotations, args.size, augment=True),
    }
    objects = {name: mean_objects(load, rows) for name, load in sides.items()}
    if abs(objects["ours"] / objects["torchvision"] - 1) > OBJECTS_TOLERANCE:
        raise UserError(f"the mean number of objects left differs: {objects}")
    epochs = count()

    def one_pass(load: Load) -> None:
        epoch = next(epochs)
        for row in rows:
            load(epoch, row)

    runs = {name: common.timed(partial(one_pass, load), clock) for name, load in sides.items()}
    seconds = common.take_turns(runs, args.rounds)
    table = [
        {"": name, "pictures a second": common.spread(len(rows) / took), "objects left, mean": objects[name]}
        | {"times faster": common.ratio(seconds["torchvision"], took)}
        for name, took in seconds.items()
    ]
    common.report(args, table)


def our_loader(annotations: Annotations, size: int, augment: AugmentConfig, distort_later: bool = False) -> Load:
    transform = TrainTransform(size, augment, distort_later)
    dataset = DetectionDataset(annotations, range(len(annotations)), transform, DataConfig())

    def load(epoch: int, row: int) -> tuple[Tensor, Tensor]:
        image, boxes, *_ = dataset[epoch, row]
        return image, boxes

    return load


def torchvision_loader(annotations: Annotations, size: int, augment: bool) -> Load:
    random = [
        v2.RandomPhotometricDistort(),
        v2.RandomZoomOut(fill={tv_tensors.Image: MEAN, Image.Image: MEAN, "others": 0}),
        v2.RandomIoUCrop(),
        v2.RandomHorizontalFlip(p=0.5),
    ]
    rest = [v2.Resize([size, size]), v2.PILToTensor(), v2.SanitizeBoundingBoxes()]
    transform = v2.Compose([*random, *rest] if augment else rest)

    def load(_epoch: int, row: int) -> tuple[Tensor, Tensor]:
        image = Image.open(annotations.paths[row]).convert("RGB")
        target = annotations.objects.of(row)
        boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=image.size[::-1])
        sample = transform({"image": image, "boxes": boxes, "labels": target["labels"]})
        return sample["image"].as_subclass(Tensor), sample["boxes"].as_subclass(Tensor) / size

    return load


def check_plain(annotations: Annotations, rows: Sequence[int], size: int) -> None:
    ours = our_loader(annotations, size, NOTHING_RANDOM)
    torchvisions = torchvision_loader(annotations, size, augment=False)
    for row in rows:
        image, boxes = ours(0, row)
        other_image, other_boxes = torchvisions(0, row)
        off = (image.float() - other_image.float()).abs().mean().item()
        if off > PIXEL_TOLERANCE or not torch.allclose(boxes, other_boxes, atol=1e-4):
            raise UserError(f"{annotations.paths[row]}: without random steps, the pictures differ by {off:.2f} levels")


def mean_objects(load: Load, rows: Sequence[int], passes: int = 3) -> float:
    torch.manual_seed(0)
    return sum(len(load(epoch, row)[1]) for epoch in range(passes) for row in rows) / (passes * len(rows))


if __name__ == "__main__":
    run(main)
