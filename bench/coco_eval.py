"""How long COCO's evaluation takes: lib/coco_eval.py against pycocotools, on the same detections.

    OMP_NUM_THREADS=1 python bench/coco_eval.py

Both run in turns, and all of their numbers must agree to 1e-9. "small" has the size of a candidate's evaluation in a
search, "large" that of COCO's val2017. Times are CPU times of one thread, medians over `--runs`.
"""

import statistics
import time

import common
import numpy as np
import torch

from lib import UserError
from lib.coco_eval import NAMES
from lib.metrics import Evaluation
from lib.runtime import run

# images, classes, mean number of objects in an image, detections in an image
CASES = {"small": (29, 3, 13, 200), "large": (5000, 80, 7, 100)}
MOST_GAP = 1e-9


def main() -> None:
    parser = common.bench_parser(__doc__, "coco_eval.json")
    parser.add_argument("--runs", type=int, default=3, help="of each case (default: 3)")
    parser.add_argument("--case", choices=[*CASES], action="append", help="only this one (default: both)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    common.report(args, [compare(name, args.runs) for name in args.case or CASES])


def compare(name: str, runs: int) -> dict:
    images, classes, mean_objects, detections = CASES[name]
    truth, found = synthetic(images, classes, mean_objects, detections, np.random.default_rng(0))
    seconds: dict[str, list[float]] = {"pycocotools": [], "coco_eval": []}
    for _ in range(runs):
        numbers = {}
        for key, took in seconds.items():
            start = time.process_time()
            numbers[key] = Evaluation(classes, truth, found).coco(reference=key == "pycocotools")
            took.append(time.process_time() - start)
        gap = largest_gap(numbers["coco_eval"], numbers["pycocotools"])
        if not gap <= MOST_GAP:
            raise UserError(f"{name}: the numbers differ by {gap:.1e}, expected at most {MOST_GAP}")
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    return {
        "images x classes x detections of an image": f"{images} x {classes} x {detections}",
        "AP": numbers["coco_eval"]["AP"],
        "pycocotools ms": 1000 * medians["pycocotools"],
        "coco_eval ms": 1000 * medians["coco_eval"],
        "share": medians["coco_eval"] / medians["pycocotools"],
        "gap": gap,
    }


def largest_gap(a: dict, b: dict) -> float:
    """Over the twelve numbers and the AP of every class; infinity where only one of them is nan."""
    a, b = (np.array([*(metrics[name] for name in NAMES), *metrics["per_class"]]) for metrics in (a, b))
    if not (np.isnan(a) == np.isnan(b)).all():
        return float("inf")
    return float(np.nanmax(np.abs(a - b)))


def synthetic(
    images: int, classes: int, mean_objects: float, detections: int, rng: np.random.Generator
) -> tuple[list[dict], list[dict]]:
    """Ground truth, and detections of each image: objects found up to three times, the rest clutter of low score."""
    truth, found = [], []
    for _ in range(images):
        count = rng.poisson(mean_objects)
        boxes, labels = random_boxes(count, rng), rng.integers(1, classes + 1, count)
        truth.append(tensors(boxes, labels, ignore=rng.random(count) < 0.02))
        seen = np.repeat(np.arange(count), rng.integers(0, 4, count))[:detections]
        sizes = np.tile(boxes[seen, 2:] - boxes[seen, :2], 2)
        near = boxes[seen] + rng.normal(0, 0.08, (len(seen), 4)) * sizes
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        clutter = detections - len(seen)
        near_labels = np.where(rng.random(len(seen)) < 0.9, labels[seen], rng.integers(1, classes + 1, len(seen)))
        all_labels = np.concatenate([near_labels, rng.integers(1, classes + 1, clutter)])
        scores = np.concatenate([rng.beta(4, 3, len(seen)), rng.beta(1, 8, clutter)]).astype(np.float32)
        found.append(tensors(np.concatenate([near, random_boxes(clutter, rng)]), all_labels, scores=scores))
    return truth, found


def random_boxes(count: int, rng: np.random.Generator) -> np.ndarray:
    """Boxes xyxy in pixels, sides of 8 to 400."""
    corner = rng.uniform(0, 400, (count, 2))
    size = np.exp(rng.uniform(np.log(8), np.log(400), (count, 2)))
    return np.concatenate([corner, corner + size], 1)


def tensors(boxes: np.ndarray, labels: np.ndarray, **columns: np.ndarray) -> dict[str, torch.Tensor]:
    columns = {name: torch.from_numpy(values) for name, values in columns.items()}
    return {"boxes": torch.from_numpy(boxes).float(), "labels": torch.from_numpy(labels), **columns}


if __name__ == "__main__":
    run(main)
