"""BCCD read as VOC and as COCO: the same annotations, and the same AP from the same detections.

python bench/voc_coco.py /path/to/bccd
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.annotations import Annotations, read_coco, read_voc
from lib.metrics import coco_metrics, voc_metrics


def read_both(root: Path, name: str) -> tuple[Annotations, Annotations]:
    coco = read_coco(root / "coco" / f"instances_{name}.json", root / "JPEGImages")
    return read_voc(root, [name], coco.classes), coco


def noisy_detections(truth: list[dict], classes: int, rng: np.random.Generator) -> list[dict]:
    """Each object found once or twice with noise, some under a wrong class, and a few false alarms."""
    found = []
    for record in truth:
        boxes = np.repeat(np.asarray(record["boxes"]), 2, axis=0)
        labels = np.repeat(np.asarray(record["labels"]), 2)
        boxes = boxes + rng.normal(0, 6, boxes.shape)
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        wrong = rng.random(len(labels)) < 0.2
        labels = np.where(wrong, rng.integers(1, classes + 1, len(labels)), labels)
        keep = rng.random(len(labels)) < 0.8
        found.append({"boxes": boxes[keep], "labels": labels[keep], "scores": rng.random(int(keep.sum()))})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder with Annotations, ImageSets, JPEGImages and coco/")
    root = parser.parse_args().root
    for name in ("trainval", "test"):
        voc, coco = read_both(root, name)
        names = [Path(voc.path(i)).name for i in range(len(voc))]
        same = voc.fingerprint() == coco.fingerprint()
        by_file = {Path(coco.path(i)).name: i for i in range(len(coco))}
        order = [by_file[file] for file in names]
        truths = voc.ground_truth(range(len(voc))), coco.ground_truth(order)
        found = noisy_detections(truths[0], len(voc.classes), np.random.default_rng(0))
        results = [(coco_metrics(t, found, len(voc.classes)), voc_metrics(t, found, len(voc.classes))) for t in truths]
        gaps = [abs(results[0][k][m] - results[1][k][m]) for k, m in ((0, "AP"), (0, "AP50"), (1, "mAP"))]
        print(
            f"{name}: {len(voc)} images, {len(voc.boxes)} boxes, annotations {'equal' if same else 'DIFFER'}, "
            f"AP {results[0][0]['AP']:.6f} and {results[1][0]['AP']:.6f}, largest difference {max(gaps):.1e}"
        )
        if not same or max(gaps) > 1e-6:
            sys.exit(1)


if __name__ == "__main__":
    main()
