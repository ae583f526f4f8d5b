"""Pictures in, pictures with detections drawn on them out, and the detections as COCO results."""

from __future__ import annotations

import colorsys
import glob
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from PIL import ImageDraw, ImageFont
from torch import Tensor
from torchvision.io import write_jpeg
from torchvision.ops import nms
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from lib.errors import UserError
from lib.postprocess import Detections

SAME_PLACE = 0.6  # IoU from which two detections are of one place
FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
SMALLEST_TEXT = 11  # pixels
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
    height, width = image.shape[-2:]
    boxes = (detections.boxes[keep] * torch.tensor([width, height, width, height])).tolist()
    labels, palette = (detections.labels[keep] - 1).tolist(), class_colours(len(classes))
    texts = [f"{classes[k]} {s:.2f}" for k, s in zip(labels, detections.scores[keep].tolist(), strict=True)]
    picture = to_pil_image(image)
    pen, line = ImageDraw.Draw(picture), max(1, min(height, width) // 150)
    font = ImageFont.truetype(str(FONT), max(SMALLEST_TEXT, min(height, width) // 28))
    for box, k in zip(boxes, labels, strict=True):
        pen.rectangle(box, outline=palette[k], width=line)
    for box, k, text in reversed(list(zip(boxes, labels, texts, strict=True))):  # the surest is drawn last
        _write_label(pen, text, box, palette[k], font)
    return pil_to_tensor(picture)


def _write_label(
    pen: ImageDraw.ImageDraw,
    text: str,
    box: Sequence[float],
    colour: tuple[int, int, int],
    font: ImageFont.FreeTypeFont,
) -> None:
    """A filled label that stands on the box, or hangs from its upper edge where the picture ends above."""
    across, down = pen.textbbox((0, 0), text, font=font)[2:]
    margin = max(1, down // 8)
    across, down = across + 2 * margin, down + 2 * margin
    x = max(0, min(box[0], pen.im.size[0] - across))
    y = box[1] - down if box[1] >= down else box[1]
    pen.rectangle((x, y, x + across, y + down), fill=colour)
    brightness = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    pen.text((x + margin, y + margin), text, fill="black" if brightness > 128 else "white", font=font)


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
