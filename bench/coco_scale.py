"""Annotations of COCO's size: time and memory to index and split them, and what each worker process adds.

    python bench/coco_scale.py

118,000 images with 860,000 boxes of 80 classes are made up (annotations only; the picture files are empty). A process
of its own measures reading and splitting with its peak memory, and then the private memory (Private_Clean and
Private_Dirty in /proc, so Linux) of a loader's and of a search's worker, before and after a whole pass over the
annotations. What the same workers hold with 100 images is subtracted.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import common
import numpy as np
import torch

from lib.annotations import Annotations, assemble, read_coco
from lib.config import DataConfig
from lib.datasets import DetectionDataset, make_loader, split_indices
from lib.labels import Faults
from lib.log import progress
from lib.runtime import run
from lib.scoring import load_scoring_data, save_scoring_data

CLASSES, BOXES_PER_IMAGE = 80, 860 / 118
SEARCH_SHARE = 0.1


def main() -> None:
    parser = common.bench_parser(__doc__, "coco_scale.json")
    parser.add_argument("--images", type=int, default=118_000)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, images in (("all", args.images), ("few", 100)):
            path = Path(folder) / f"{name}.json"
            write_annotations(path, images)
            command = [sys.executable, __file__, "--measure", str(path)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[name] = json.loads(done.stdout.splitlines()[-1])
    many, few = found["all"], found["few"]
    print(
        f"\n{many['images']} images, {many['boxes']} boxes: indexed and split in {many['seconds']:.1f} s, "
        f"peak {many['peak_mb']:.0f} MB ({few['peak_mb']:.0f} MB with 100 images)\n"
    )
    rows = []
    for kind in ("loader", "search"):
        before, after = (many[kind][when] - few[kind][when] for when in ("before", "after"))
        rows.append({"a worker of": kind, "adds MB before a pass": before, "after it": after})
    common.report(args, rows, found=found)


def measure(path: Path) -> dict:
    """What the process of its own measures on one annotation file."""
    start = time.perf_counter()
    faults = Faults()
    annotations = assemble(read_coco(path.parent / path.stem, [path], faults), path, [], faults)
    train, search = split_indices(annotations, [1 - SEARCH_SHARE, SEARCH_SHARE], 0)
    seconds = time.perf_counter() - start
    return {
        "images": len(annotations),
        "boxes": len(annotations.objects.boxes),
        "seconds": seconds,
        "peak_mb": memory_mb("/proc/self/status", "VmHWM"),
        "loader": loader_worker_mb(annotations, train),
        "search": search_worker_mb(annotations, search, path.parent / "images.pt"),
    }


def write_annotations(path: Path, images: int) -> None:
    """A COCO instances file with all the keys of COCO's own, masks as short polygons; a folder of empty pictures."""
    rng = np.random.default_rng(0)
    boxes = round(images * BOXES_PER_IMAGE)
    image_of = rng.integers(1, images + 1, boxes).tolist()
    label = rng.integers(1, CLASSES + 1, boxes).tolist()
    corner = rng.uniform(0, 400, (boxes, 2)).round(2).tolist()
    size = rng.uniform(8, 80, (boxes, 2)).round(2).tolist()
    folder = path.parent / path.stem
    folder.mkdir()
    content = {"images": [], "annotations": []}
    content["categories"] = [{"id": c, "name": f"class {c}", "supercategory": "thing"} for c in range(1, CLASSES + 1)]
    for i in range(1, images + 1):
        image = {"id": i, "file_name": f"{i:012d}.jpg", "width": 640, "height": 480}
        content["images"].append({**image, "license": 3, "coco_url": f"http://{i}"})
        (folder / image["file_name"]).touch()
    for k, ((x, y), (w, h)) in enumerate(zip(corner, size, strict=True)):
        box = {"bbox": [x, y, w, h], "area": w * h, "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]}
        content["annotations"].append({"id": k, "image_id": image_of[k], "category_id": label[k], "iscrowd": 0, **box})
    path.write_text(json.dumps(content))


def memory_mb(file: str, *names: str) -> float:
    """The sum of the named lines of a /proc file, which are in kB."""
    lines = Path(file).read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(names)) / 1024


def private_mb(pid: int) -> float:
    """Memory that belongs to this process alone."""
    return memory_mb(f"/proc/{pid}/smaps_rollup", "Private_Clean", "Private_Dirty")


class BlackPictures(DetectionDataset):
    """The data set with pictures that need no file."""

    def read_image(self, row: int) -> torch.Tensor:
        return torch.zeros(3, 8, 8, dtype=torch.uint8)


def unchanged(*sample: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return sample


def loader_worker_mb(annotations: Annotations, train: list[int]) -> dict[str, float]:
    """Private memory of a loader's worker after its first batch, and after every row has been through it."""
    keys = [(1, row) for row in train]
    batches = [keys[i : i + 64] for i in range(0, len(keys), 64)]
    loader = make_loader(BlackPictures(annotations, train, unchanged, DataConfig()), batches, 1, "cpu")
    found = {}
    for _ in progress(loader, "loader"):
        found.setdefault("before", private_mb(multiprocessing.active_children()[0].pid))
    found["after"] = private_mb(multiprocessing.active_children()[0].pid)
    return found


def search_worker_mb(annotations: Annotations, search: list[int], path: Path) -> dict[str, float]:
    """Private memory of a process that loads the scoring data, before and after it reads the ground truth."""
    data = {
        "images": {8: torch.zeros(len(search), 3, 8, 8, dtype=torch.uint8)},
        "truth": annotations.ground_truth(search),
        "sizes": annotations.sizes[torch.as_tensor(search)].tolist(),
        "classes": list(annotations.classes),
    }
    save_scoring_data(data, path)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=search_worker, args=(path, theirs))
    process.start()
    found = ours.recv()
    process.join()
    return found


def search_worker(path: Path, pipe: Connection) -> None:
    data = load_scoring_data(path)
    found = {"before": private_mb(os.getpid())}
    for _ in range(3):  # as often as a metric reads it
        sum(float(target["boxes"].sum()) for target in data["truth"])
        len(data["sizes"])
    pipe.send({**found, "after": private_mb(os.getpid())})


if __name__ == "__main__":
    run(main)
