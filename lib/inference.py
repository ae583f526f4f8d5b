"""A finished detector on pictures: best.pt through PyTorch, or an exported detector.onnx through onnxruntime.

    from lib.inference import load

    detector = load("runs/bccd/final/best.pt")  # or detector.onnx
    boxes, scores, names = detector("photo.jpg")

`draw_pictures` writes pictures with their detections drawn, and all detections as COCO results.
"""

from __future__ import annotations

import colorsys
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import ImageDraw, ImageFont
from torch import Tensor
from torchvision.ops import box_convert, nms
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
from lib.transforms import EvalTransform

SAME_PLACE = 0.6  # IoU from which two detections count as one place when they are drawn
SMALLEST_TEXT = 11  # pixels


class PictureDetections(NamedTuple):
    """The detections in one picture, best first: boxes (K, 4) xyxy in its pixels, scores (K,), K class names."""

    boxes: Tensor
    scores: Tensor
    names: list[str]


class PictureDetector(ABC):
    """`detector(picture)` returns PictureDetections. A subclass implements `detect` for a batch."""

    def __init__(self, classes: Sequence[str], category_ids: Sequence[int], image_size: int):
        self.classes = tuple(classes)
        self.category_ids = tuple(category_ids)
        self.image_size = image_size
        self._resize = EvalTransform(image_size)

    @abstractmethod
    def detect(self, images: Tensor) -> list[Detections]:
        """Detections, with normalised boxes, of images (B, 3, S, S) uint8, S = `image_size`."""

    def detect_picture(self, image: Tensor) -> Detections:
        """Detections, with normalised boxes, of one picture (3, H, W) uint8 RGB of any size."""
        resized, *_ = self._resize(image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
        return self.detect(resized[None])[0]

    def __call__(self, picture: Tensor | str | Path) -> PictureDetections:
        """The detections in a picture, which is a file or (3, H, W) uint8 RGB. Raises UnreadableImage, a UserError."""
        image = picture if isinstance(picture, Tensor) else read_picture(str(picture))
        found = to_pixels(self.detect_picture(image), image.shape[2], image.shape[1])
        names = [self.classes[label - 1] for label in found["labels"].tolist()]
        return PictureDetections(found["boxes"], found["scores"], names)


class TorchDetector(PictureDetector):
    """A checkpoint of final_train.py, on a PyTorch device."""

    def __init__(self, path: Path, device: str = "auto"):
        loaded = load_detector(path)
        super().__init__(loaded.classes, loaded.category_ids, loaded.model.image_size)
        self.config = loaded.config
        self.device = pick_device(device)
        self.model = loaded.model.to(self.device, memory_format=torch.channels_last)

    def detect(self, images: Tensor) -> list[Detections]:
        return detect(self.model, [images], self.config, self.device)


class OnnxDetector(PictureDetector):
    """A file of final_train.py --export that includes NMS, on the CPU."""

    def __init__(self, path: Path):
        self.session = open_session(path)
        metadata = read_metadata(self.session, path)
        if [output.name for output in self.session.get_outputs()] != list(DETECTIONS):
            raise UserError(f"{path}: was exported with --no-nms, so it has no detections as its output")
        super().__init__(metadata.classes, metadata.category_ids, metadata.image_size)
        self._path = path

    def detect(self, images: Tensor) -> list[Detections]:
        try:
            found = unpad(*run_session(self.session, images, DETECTIONS))
        except Exception as error:  # the graph may be a stranger's, and onnxruntime's exceptions have no common base
            raise UserError(f"{self._path}: does not run on its pictures: {error}") from None
        if any(len(image.labels) and image.labels.max() > len(self.classes) for image in found):
            raise UserError(f"{self._path}: finds labels above {len(self.classes)}, the number of its classes")
        return found


def load(path: str | Path, device: str = "auto") -> PictureDetector:
    """The detector in a run's folder (its best.pt), a checkpoint, or an exported .onnx file. Raises UserError.

    `device` is auto, cpu, cuda or cuda:N, and applies to checkpoints; onnxruntime runs on the CPU.
    """
    path = Path(path)
    if path.suffix == ".onnx":
        return OnnxDetector(path)
    return TorchDetector(path / "best.pt" if path.is_dir() else path, device)


def draw_pictures(detector: PictureDetector, paths: Sequence[Path], out: Path, threshold: float) -> None:
    """Write each picture to `out` with its detections of at least `threshold`, and all detections to detections.json.

    A picture that cannot be read is reported and skipped.
    """
    results: list[dict] = []
    drawn = 0
    start = time.perf_counter()
    for path in progress(paths, "predict"):
        try:
            image = read_picture(str(path))
        except UnreadableImage as error:
            say(f"skipped: {error}")
            continue
        detections = detector.detect_picture(image)
        found = to_pixels(detections, image.shape[2], image.shape[1])
        category_ids = [detector.category_ids[label - 1] for label in found["labels"].tolist()]
        results += coco_results(path.stem, found["boxes"], found["scores"], category_ids)
        write_picture(draw(image, detections, detector.classes, threshold), out / f"{path.stem}.jpg")
        drawn += 1
    # The folder does not exist yet if no picture could be read.
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.write_text(out / "detections.json", json.dumps(results) + "\n")
    rate = drawn / (time.perf_counter() - start)
    print(f"wrote {drawn} pictures and detections.json to {out} ({rate:.1f} images/s)")


def coco_results(image_id: str, boxes_xyxy: Tensor, scores: Tensor, category_ids: Sequence[int]) -> list[dict]:
    """The detections of one picture, boxes (K, 4) in pixels, in COCO's results format."""
    boxes_xywh = box_convert(boxes_xyxy, "xyxy", "xywh").tolist()
    results = []
    for box_xywh, score, category_id in zip(boxes_xywh, scores.tolist(), category_ids, strict=True):
        bbox = [round(value, 2) for value in box_xywh]
        results.append({"image_id": image_id, "category_id": category_id, "bbox": bbox, "score": round(score, 5)})
    return results


def draw(image: Tensor, detections: Detections, classes: Sequence[str], threshold: float) -> Tensor:
    """A copy of `image` (3, H, W) uint8 with the detections of at least `threshold`: a box and a label each."""
    from matplotlib import get_data_path  # slow to import, and only needed here

    confident = (detections.scores >= threshold).nonzero()[:, 0]
    # One label for each place: those of less likely classes would hide it.
    keep = confident[nms(detections.boxes[confident], detections.scores[confident], SAME_PLACE)]
    height, width = image.shape[-2:]
    boxes = (detections.boxes[keep] * torch.tensor([width, height, width, height])).tolist()
    labels = (detections.labels[keep] - 1).tolist()
    shown = list(zip(boxes, labels, detections.scores[keep].tolist(), strict=True))
    colour_of = class_colours(len(classes))

    picture = to_pil_image(image)
    pen = ImageDraw.Draw(picture)
    # Class names may need letters that Pillow's own font lacks.
    text_size = max(SMALLEST_TEXT, min(height, width) // 28)
    pen.font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", text_size)
    for box, label, _ in shown:
        pen.rectangle(box, outline=colour_of[label], width=max(1, min(height, width) // 150))
    # The best detection is drawn last, so that nothing covers its label.
    for box, label, score in reversed(shown):
        _write_label(pen, f"{classes[label]} {score:.2f}", box, colour_of[label])
    return pil_to_tensor(picture)


def class_colours(count: int) -> list[tuple[int, int, int]]:
    """`count` RGB colours, evenly spaced in hue."""
    colours = [colorsys.hsv_to_rgb(i / count, 0.9, 0.95) for i in range(count)]
    return [tuple(round(255 * channel) for channel in colour) for colour in colours]


def _write_label(pen: ImageDraw.ImageDraw, text: str, box: Sequence[float], colour: tuple[int, int, int]) -> None:
    """A filled label on top of the box, or inside its upper edge if there is no room above."""
    width, height = pen.textbbox((0, 0), text)[2:]
    margin = max(1, height // 8)
    width, height = width + 2 * margin, height + 2 * margin
    x = max(0, min(box[0], pen.im.size[0] - width))
    y = box[1] - height if box[1] >= height else box[1]
    pen.rectangle((x, y, x + width, y + height), fill=colour)
    brightness = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    pen.text((x + margin, y + margin), text, fill="black" if brightness > 128 else "white")
