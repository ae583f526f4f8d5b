"""Pictures in, pictures with detections drawn on them out, and the detections as COCO results."""

from __future__ import annotations

import colorsys
import glob
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchvision.io import write_jpeg
from torchvision.ops import nms
from torchvision.utils import draw_bounding_boxes

from lib.errors import UserError
from lib.postprocess import Detections

SAME_PLACE = 0.6  # IoU from which two detections are of one place
SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp")


def find_pictures(patterns: Sequence[str]) -> list[Path]:
    """Files, folders and globs as a sorted list of picture files. Raises UserError for one that matches nothing."""
    found: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            matches = [p for p in path.iterdir() if p.suffix.lower() in SUFFIXES]
        else:
            matches = [path] if path.is_file() else [Path(p) for p in glob.glob(pattern, recursive=True)]
        if not matches:
            raise UserError(f"{pattern}: no picture here (looked for {', '.join(SUFFIXES)})")
        found += matches
    return sorted(set(found))


def class_colours(count: int) -> list[tuple[int, int, int]]:
    """`count` colours, evenly spaced in hue."""
    hues = [i / max(count, 1) for i in range(count)]
    return [tuple(round(255 * c) for c in colorsys.hsv_to_rgb(h, 0.9, 0.95)) for h in hues]


def draw(image: Tensor, detections: Detections, classes: Sequence[str], threshold: float) -> Tensor:
    """`image` (3, H, W) uint8 with the detections from `threshold` on: a box and a label in the colour of its class."""
    sure = (detections.scores >= threshold).nonzero()[:, 0]
    # A place shows one label: the classes that came second there would be drawn over the best one.
    keep = sure[nms(detections.boxes[sure], detections.scores[sure], SAME_PLACE)]
    if len(keep) == 0:
        return image
    height, width = image.shape[-2:]
    boxes = detections.boxes[keep] * torch.tensor([width, height, width, height])
    labels = (detections.labels[keep] - 1).tolist()
    texts = [f"{classes[k]} {s:.2f}" for k, s in zip(labels, detections.scores[keep].tolist(), strict=True)]
    palette = class_colours(len(classes))
    return draw_bounding_boxes(
        image, boxes, texts, [palette[k] for k in labels], width=max(1, min(height, width) // 150)
    )


def write_picture(image: Tensor, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_jpeg(image, str(path), quality=92)


def coco_results(image_id: str, boxes_xyxy: Tensor, scores: Tensor, category_ids: Sequence[int]) -> list[dict]:
    """Detections of one picture, boxes (K, 4) in pixels, in COCO's results format."""
    x1, y1, x2, y2 = boxes_xyxy.unbind(1)
    xywh = torch.stack((x1, y1, x2 - x1, y2 - y1), 1)
    rows = zip(xywh.tolist(), scores.tolist(), category_ids, strict=True)
    return [
        {"image_id": image_id, "category_id": category, "bbox": [round(v, 2) for v in box], "score": round(score, 5)}
        for box, score, category in rows
    ]
