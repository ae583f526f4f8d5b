"""How long COCO's evaluation takes: lib/coco_eval.py against pycocotools, on the same detections.

    OMP_NUM_THREADS=1 python bench/coco_eval.py --out coco_eval.json

Both run in turns, and all of their numbers must agree to 1e-9. "small" is what a search does for every candidate,
"large" has the size of COCO's val2017. Times are CPU times, which other programs on the machine disturb least.
Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.coco_eval import NAMES
from lib.metrics import coco_metrics, voc_metrics

# images, classes, mean of objects in an image, detections of an image
CASES = {"small": (29, 3, 13, 200), "large": (5000, 80, 7, 100)}
TOLERANCE = 1e-9


def synthetic(images: int, classes: int, mean_objects: float, most: int, rng: np.random.Generator) -> tuple[list, list]:
    """Ground truth, and `most` detections of each image: objects found up to thrice, the rest clutter of low score."""
    truth, found = [], []
    for _ in range(images):
        count = rng.poisson(mean_objects)
        boxes, labels = random_boxes(count, rng), rng.integers(1, classes + 1, count)
        truth.append(record(boxes, labels, ignore=torch.from_numpy(rng.random(count) < 0.02)))
        seen = np.repeat(np.arange(count), rng.integers(0, 4, count))[:most]
        sizes = np.tile(boxes[seen, 2:] - boxes[seen, :2], 2)
        near = boxes[seen] + rng.normal(0, 0.08, (len(seen), 4)) * sizes
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        clutter = most - len(seen)
        near_labels = np.where(rng.random(len(seen)) < 0.9, labels[seen], rng.integers(1, classes + 1, len(seen)))
        all_labels = np.concatenate([near_labels, rng.integers(1, classes + 1, clutter)])
        scores = np.concatenate([rng.beta(4, 3, len(seen)), rng.beta(1, 8, clutter)])
        boxes = np.concatenate([near, random_boxes(clutter, rng)])
        found.append(record(boxes, all_labels, scores=torch.from_numpy(scores).float()))
    return truth, found


def random_boxes(count: int, rng: np.random.Generator) -> np.ndarray:
    """Boxes xyxy in pixels, sides of 8 to 400."""
    corner, size = rng.uniform(0, 400, (count, 2)), np.exp(rng.uniform(np.log(8), np.log(400), (count, 2)))
    return np.concatenate([corner, corner + size], 1)


def record(boxes: np.ndarray, labels: np.ndarray, **columns: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"boxes": torch.from_numpy(boxes).float(), "labels": torch.from_numpy(labels), **columns}


def seconds(function, *arguments, **options) -> tuple[float, dict]:
    start = time.process_time()
    result = function(*arguments, **options)
    return time.process_time() - start, result


def compare(name: str, runs: int) -> dict:
    """Time both in turns, and check that the numbers are equal; a dict for the JSON."""
    images, classes, mean_objects, most = CASES[name]
    case = (*synthetic(images, classes, mean_objects, most, np.random.default_rng(0)), classes)
    times: dict[str, list[float]] = {"pycocotools": [], "coco_eval": [], "voc": []}
    for _ in range(runs):
        reference_seconds, reference = seconds(coco_metrics, *case, reference=True)
        own_seconds, own = seconds(coco_metrics, *case)
        gap = largest_gap(own, reference)
        if not gap <= TOLERANCE:
            sys.exit(f"{name}: the numbers differ by {gap:.1e}")
        for key, value in (("pycocotools", reference_seconds), ("coco_eval", own_seconds)):
            times[key].append(value)
        times["voc"].append(seconds(voc_metrics, *case)[0])
    medians = {key: statistics.median(values) for key, values in times.items()}
    setting = {"images": images, "classes": classes, "detections_per_image": most, "runs": runs}
    numbers = {number: own[number] for number in NAMES}
    ratio = medians["coco_eval"] / medians["pycocotools"]
    return {**setting, "seconds": medians, "ratio": ratio, "gap": gap, "numbers": numbers}


def largest_gap(a: dict, b: dict) -> float:
    ours, theirs = (np.array([*(metrics[name] for name in NAMES), *metrics["per_class"]]) for metrics in (a, b))
    if not (np.isnan(ours) == np.isnan(theirs)).all():
        return float("inf")
    return float(np.nanmax(np.abs(ours - theirs)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="of each case, the median counts (default: 3)")
    parser.add_argument("--case", choices=[*CASES], action="append", help="only this one (default: both)")
    parser.add_argument("--out", type=Path, default=Path("coco_eval.json"), help="default: coco_eval.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    print("| images x classes x detections | AP | pycocotools | coco_eval | ratio | largest difference | voc_metrics |")
    print("|---|---|---|---|---|---|---|")
    for name in args.case or CASES:
        results[name] = row = compare(name, args.runs)
        took = {key: f"{1000 * value:.1f} ms" for key, value in row["seconds"].items()}
        print(
            f"| {row['images']} x {row['classes']} x {row['detections_per_image']} | {row['numbers']['AP']:.3f} "
            f"| {took['pycocotools']} | {took['coco_eval']} | {row['ratio']:.4f} | {row['gap']:.0e} | {took['voc']} |"
        )
    args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
