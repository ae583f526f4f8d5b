"""A finished detector on pictures, from best.pt through torch or from detector.onnx through onnxruntime.

from lib.inference import load
detector = load("runs/bccd/final/best.pt")  # or detector.onnx
boxes, scores, names = detector("photo.jpg")
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lib import checkpoint
from lib.engine import detect, to_pixels
from lib.errors import UserError
from lib.models import load_detector
from lib.onnx_file import DETECTIONS, open_session, read_metadata, run_session, unpad
from lib.picture_files import UnreadableImage, read_picture
from lib.pictures import coco_results, draw, write_picture
from lib.postprocess import Detections
from lib.runlog import progress, say
from lib.runtime import pick_device
from lib.transforms import eval_transform


class Objects(NamedTuple):
    """What was found in one picture, best first: boxes (K, 4) xyxy in its pixels, scores (K,), K class names."""

    boxes: Tensor
    scores: Tensor
    names: list[str]


class PictureDetector(ABC):
    """`detector(picture)` gives Objects. A subclass knows how to `detect` in a batch."""

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

    def __call__(self, picture: Tensor | str | Path) -> Objects:
        """What is in a picture, a file or (3, H, W) uint8 RGB. Raises UnreadableImage, a UserError, for a bad file."""
        image = picture if isinstance(picture, Tensor) else read_picture(str(picture))
        pixels = to_pixels(self.detect_picture(image), image.shape[2], image.shape[1])
        names = [self.classes[k - 1] for k in pixels["labels"].tolist()]
        return Objects(pixels["boxes"], pixels["scores"], names)


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
