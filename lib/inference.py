"""Pictures in, pictures with detections drawn on them out, and the detections as COCO results.

A finished detector on pictures, from best.pt through torch or from detector.onnx through onnxruntime.

from lib.inference import load
detector = load("runs/bccd/final/best.pt")  # or detector.onnx
boxes, scores, names = detector("photo.jpg")
"""

from __future__ import annotations

import colorsys
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from PIL import ImageDraw, ImageFont
from torch import Tensor
from torchvision.ops import nms
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from lib import checkpoint
from lib.detector import detect, load_detector
from lib.errors import UserError
from lib.export import DETECTIONS, open_session, read_metadata, run_session, unpad
from lib.images import UnreadableImage, read_picture, write_picture
from lib.log import progress, say
from lib.metrics import to_pixels
from lib.postprocess import Detections
from lib.runtime import pick_device
from lib.transforms import eval_transform

SAME_PLACE = 0.6  # IoU from which two detections are of one place
FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
SMALLEST_TEXT = 11  # pixels


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


def coco_results(image_id: str, boxes_xyxy: Tensor, scores: Tensor, category_ids: Sequence[int]) -> list[dict]:
    """Detections of one picture, boxes (K, 4) in pixels, in COCO's results format."""
    x1, y1, x2, y2 = boxes_xyxy.unbind(1)
    xywh = torch.stack((x1, y1, x2 - x1, y2 - y1), 1)
    rows = zip(xywh.tolist(), scores.tolist(), category_ids, strict=True)
    return [
        {"image_id": image_id, "category_id": category, "bbox": [round(v, 2) for v in box], "score": round(score, 5)}
        for box, score, category in rows
    ]


class PictureDetections(NamedTuple):
    """What was found in one picture, best first: boxes (K, 4) xyxy in its pixels, scores (K,), K class names."""

    boxes: Tensor
    scores: Tensor
    names: list[str]


class PictureDetector(ABC):
    """`detector(picture)` gives PictureDetections. A subclass knows how to `detect` in a batch."""

    def __init__(self, classes: Sequence[str], category_ids: Sequence[int], image_size: int):
        self.classes, self.category_ids, self.image_size = tuple(classes), tuple(category_ids), image_size
        self._transform = eval_transform(image_size)

    @abstractmethod
    def detect(self, images: Tensor) -> list[Detections]:
        """Detections of images (B, 3, S, S) uint8, S = `image_size`, boxes normalised."""

    def detect_picture(self, image: Tensor) -> Detections:
        """Detections of one picture (3, H, W) uint8 RGB of any size, boxes normalised."""
        small, *_ = self._transform(image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
        return self.detect(small[None])[0]

    def __call__(self, picture: Tensor | str | Path) -> PictureDetections:
        """What is in a picture, a file or (3, H, W) uint8 RGB. Raises UnreadableImage, a UserError, for a bad file."""
        image = picture if isinstance(picture, Tensor) else read_picture(str(picture))
        pixels = to_pixels(self.detect_picture(image), image.shape[2], image.shape[1])
        names = [self.classes[k - 1] for k in pixels["labels"].tolist()]
        return PictureDetections(pixels["boxes"], pixels["scores"], names)


class TorchDetector(PictureDetector):
    """A checkpoint of final_train.py on a device of torch."""

    def __init__(self, path: Path, device: str = "auto"):
        loaded = load_detector(path)
        super().__init__(loaded.classes, loaded.category_ids, loaded.model.image_size)
        self.device, self.config = pick_device(device), loaded.config
        self.model = loaded.model.to(self.device, memory_format=torch.channels_last)

    def detect(self, images: Tensor) -> list[Detections]:
        return detect(self.model, [images], self.config, self.device)


class OnnxDetector(PictureDetector):
    """A file of final_train.py --export with NMS inside, on the CPU."""

    def __init__(self, path: Path):
        self.session = open_session(path)
        metadata = read_metadata(self.session, path)
        if [output.name for output in self.session.get_outputs()] != list(DETECTIONS):
            raise UserError(f"{path}: was exported with --no-nms, and gives no detections by itself")
        super().__init__(metadata["classes"], metadata["category_ids"], metadata["image_size"])

    def detect(self, images: Tensor) -> list[Detections]:
        return unpad(*run_session(self.session, images, DETECTIONS))


def load(path: str | Path, device: str = "auto") -> PictureDetector:
    """The detector in a run's folder (its best.pt), a checkpoint, or an exported .onnx file.

    `device` is auto, cpu, cuda or cuda:N, for a checkpoint; onnxruntime runs on the CPU. Raises UserError.
    """
    path = Path(path)
    if path.suffix == ".onnx":
        return OnnxDetector(path)
    return TorchDetector(path / "best.pt" if path.is_dir() else path, device)


def draw_pictures(detector: PictureDetector, paths: Sequence[Path], out: Path, threshold: float) -> None:
    """Write each picture to `out` with the detections from `threshold` on, and all detections to detections.json."""
    results: list[dict] = []
    drawn, start = 0, time.perf_counter()
    for path in progress(paths, "predict"):
        try:
            image = read_picture(str(path))
        except UnreadableImage as error:
            say(f"skipped: {error}")
            continue
        found = detector.detect_picture(image)
        pixels = to_pixels(found, image.shape[2], image.shape[1])
        categories = [detector.category_ids[k - 1] for k in pixels["labels"].tolist()]
        results += coco_results(path.stem, pixels["boxes"], pixels["scores"], categories)
        write_picture(draw(image, found, detector.classes, threshold), out / f"{path.stem}.jpg")
        drawn += 1
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.write_text(out / "detections.json", json.dumps(results) + "\n")
    rate = drawn / (time.perf_counter() - start)
    print(f"wrote {drawn} pictures and detections.json to {out} ({rate:.1f} images/s)")
