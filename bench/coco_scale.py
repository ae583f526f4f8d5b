"""Annotations of COCO's size: time and memory to index and split them, and what each worker process adds.

    python bench/coco_scale.py --out coco_scale.json

118,000 images with 860,000 boxes of 80 classes are made up (annotations only; the pictures are empty files). Measured
in a process of its own: reading and splitting, and its peak memory. Then what a worker of a loader and of a search hold
privately (Private_Clean + Private_Dirty of /proc, Linux), before and after a whole pass over the annotations, less what
the same workers hold with a set of 100 images. Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.annotations import Annotations, read_coco
from lib.datasets import DetectionDataset, _loader, split_indices
from lib.log import progress
from lib.scoring import load_scoring_data, save_scoring_data

CLASSES, BOXES_PER_IMAGE = 80, 860 / 118
SEARCH_SHARE = 0.1


def write_annotations(path: Path, images: int, seed: int = 0) -> None:
    """A COCO instances file with all the keys of COCO's own, masks as short polygons; a folder of empty pictures."""
    rng = np.random.default_rng(seed)
    boxes = round(images * BOXES_PER_IMAGE)
    image_of = rng.integers(1, images + 1, boxes).tolist()
    label = rng.integers(1, CLASSES + 1, boxes).tolist()
    corner, size = rng.uniform(0, 400, (boxes, 2)).round(2), rng.uniform(8, 80, (boxes, 2)).round(2)
    content = {
        "images": [
            {
                "id": i,
                "file_name": f"{i:012d}.jpg",
                "width": 640,
                "height": 480,
                "license": 3,
                "coco_url": f"http://{i}",
            }
            for i in range(1, images + 1)
        ],
        "categories": [{"id": c, "name": f"class {c}", "supercategory": "thing"} for c in range(1, CLASSES + 1)],
        "annotations": [
            {
                "id": k,
                "image_id": image_of[k],
                "category_id": label[k],
                "bbox": [x, y, w, h],
                "area": w * h,
                "iscrowd": 0,
            }
            | {"segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]}
            for k, ((x, y), (w, h)) in enumerate(zip(corner.tolist(), size.tolist(), strict=True))
        ],
    }
    path.write_text(json.dumps(content))
    folder = path.parent / path.stem
    folder.mkdir()
    for image in content["images"]:
        (folder / image["file_name"]).touch()


class BlackPictures(DetectionDataset):
    """The data set with pictures that need no file."""

    def _image(self, row: int) -> torch.Tensor:
        return torch.zeros(3, 8, 8, dtype=torch.uint8)


def tiny_transform(image, boxes, labels):
    return image, boxes, labels


def private_mb(pid: int) -> float:
    """Memory that belongs to this process alone."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean", "Private_Dirty"))) / 1024


def highest_mb() -> float:
    """Peak memory of this process since it was started."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def index(path: Path) -> tuple[Annotations, list[int], list[int], float]:
    start = time.perf_counter()
    annotations = read_coco(path, path.parent / path.stem, [], "raise")
    train, search = split_indices(annotations, [1 - SEARCH_SHARE, SEARCH_SHARE], 0)
    return annotations, train, search, time.perf_counter() - start


def loader_workers(annotations: Annotations, train: list[int]) -> dict[str, float]:
    """Private memory of a loader's worker after its first batches, and after every row has been through it."""
    dataset = BlackPictures(annotations, train, tiny_transform)
    keys = [(1, row) for row in train]
    batches = [keys[i : i + 64] for i in range(0, len(keys), 64)]
    loader = _loader(dataset, batches, 1, "cpu")
    found = {}
    for k, _ in enumerate(progress(loader, "loader")):
        if k == 0:
            found["before"] = private_mb(multiprocessing.active_children()[0].pid)
    found["after"] = private_mb(multiprocessing.active_children()[0].pid)
    return found


def search_worker(data: str, pipe) -> None:
    """What a search's worker holds of the ground truth: loaded, then read as often as a metric does."""
    loaded = load_scoring_data(Path(data))
    found = {"before": private_mb(os.getpid())}
    for _ in range(3):
        sum(float(target["boxes"].sum()) for target in loaded["truth"])
        len(loaded["sizes"])
    found["after"] = private_mb(os.getpid())
    pipe.send(found)


def search_workers(annotations: Annotations, search: list[int], folder: Path) -> dict[str, float]:
    pictures = torch.zeros(len(search), 3, 8, 8, dtype=torch.uint8)
    sizes = annotations.sizes[torch.as_tensor(search)].tolist()
    truth = annotations.ground_truth(search)
    path = folder / "images.pt"
    save_scoring_data({"images": pictures, "truth": truth, "sizes": sizes, "classes": list(annotations.classes)}, path)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=search_worker, args=(str(path), theirs))
    process.start()
    found = ours.recv()
    process.join()
    return found


def measure(path: Path) -> None:
    """In a process of its own: one line of JSON."""
    annotations, train, search, seconds = index(path)
    peak = highest_mb()
    found = {"images": len(annotations), "boxes": len(annotations.boxes), "seconds": seconds, "peak_mb": peak}
    found["loader"], found["search"] = (
        loader_workers(annotations, train),
        search_workers(annotations, search, path.parent),
    )
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=118_000)
    parser.add_argument("--out", type=Path, default=Path("coco_scale.json"))
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure)
        return
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, images in (("whole", args.images), ("few", 100)):
            path = Path(folder) / f"{name}.json"
            write_annotations(path, images)
            command = [sys.executable, __file__, "--measure", str(path)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[name] = json.loads(done.stdout.splitlines()[-1])
    whole, few = found["whole"], found["few"]
    added = {k: {when: whole[k][when] - few[k][when] for when in ("before", "after")} for k in ("loader", "search")}
    print(
        f"\n{whole['images']} images, {whole['boxes']} boxes: indexed and split in {whole['seconds']:.1f} s, ", end=""
    )
    print(f"peak {whole['peak_mb']:.0f} MB ({few['peak_mb']:.0f} MB with 100 images)\n")
    print("| each worker adds | before a pass | after it |\n|---|---|---|")
    for kind, sizes in added.items():
        print(f"| {kind} worker | {sizes['before']:.1f} MB | {sizes['after']:.1f} MB |")
    args.out.write_text(json.dumps({**found, "added_mb": added}, indent=1) + "\n")
    print(f"\nwrote {args.out}")


if __name__ == "__main__":
    main()
