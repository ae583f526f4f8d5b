"""SSD augmentation of a picture with its boxes, and the plain resize for evaluation, through torchvision's v2."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from lib.config import AugmentConfig

# image (3, H, W) uint8, boxes (M, 4) pixels xyxy, labels (M,) -> image (3, S, S) uint8, boxes in [0, 1], labels
Transform = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
GREY = 127  # what zooming out shows beside the picture: nearly zero once the network has scaled its input


class View(NamedTuple):
    """The part of a picture that will be seen, in its pixels. It may reach beyond the picture on every side."""

    left: int
    top: int
    width: int
    height: int


def scaled(view: View, boxes: Tensor, x: float, y: float) -> tuple[View, Tensor]:
    """A view and boxes of a picture in the pixels of one that is `x` times as wide and `y` times as tall."""
    left, top = round(view.left * x), round(view.top * y)
    right, bottom = round((view.left + view.width) * x), round((view.top + view.height) * y)
    return View(left, top, right - left, bottom - top), boxes * boxes.new_tensor([x, y, x, y])


def train_transform(image_size: int, augment: AugmentConfig | None = None) -> Transform:
    """SSD's augmentation (Liu et al., section 2.2 and 3.6) to `image_size` pixels a side."""
    return TrainTransform(image_size, augment or AugmentConfig())


def eval_transform(image_size: int) -> Transform:
    """Resize to `image_size` pixels a side, nothing random."""
    return EvalTransform(image_size)


class EvalTransform:
    """See `eval_transform`. A class, since spawned workers pickle it."""

    def __init__(self, image_size: int) -> None:
        self.size = [image_size, image_size]

    def __call__(self, image: Tensor, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        height, width = image.shape[-2:]
        resized = F.resize(tv_tensors.Image(image), self.size, antialias=True)
        return resized.as_subclass(Tensor), boxes / boxes.new_tensor([width, height, width, height]), labels


class TrainTransform:
    """Zoom out, IoU crop, resize, photometric distortion, flip; boxes under a pixel go, with their labels.

    Geometry comes first, as a `View`: neither SSD's canvas of up to 16 times the picture nor a full-size crop is ever
    made, and colours are distorted on the few pixels that are left. Fill is placed last, so that it stays out of the
    distortion, as in SSD. The order saves four fifths of the time that the same v2 classes take in a row.
    """

    def __init__(self, image_size: int, augment: AugmentConfig) -> None:
        self.image_size = image_size
        self.crop_probability = augment.iou_crop
        self.zoom_out = v2.RandomZoomOut(p=augment.zoom_out)
        self.crop = v2.RandomIoUCrop()
        self.distort = v2.RandomPhotometricDistort(p=augment.distort)
        self.flip = v2.RandomHorizontalFlip(p=augment.flip)
        self.sanitize = v2.SanitizeBoundingBoxes(labels_getter=_third)

    def __call__(self, image: Tensor, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        height, width = image.shape[-2:]
        return self.show(image, *self.choose(width, height, boxes, labels))

    def choose(self, width: int, height: int, boxes: Tensor, labels: Tensor) -> tuple[View, Tensor, Tensor]:
        """The part of a picture of that size that will be seen, and the objects in it. Needs no pixel yet."""
        view = random_zoom_out(width, height, self.zoom_out)
        if torch.rand(()) < self.crop_probability:
            view, seen = random_iou_crop(view, boxes, self.crop)
            boxes, labels = boxes[seen], labels[seen]
        return view, boxes, labels

    def reduction(self, view: View) -> int:
        """By how much, 1, 2, 4 or 8, a picture may be smaller and still have all pixels that training will see."""
        return next((by for by in (8, 4, 2) if min(view.width, view.height) >= by * self.image_size), 1)

    def show(self, image: Tensor, view: View, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `choose` chose of a picture, in its pixels, distorted, flipped, at the training's size."""
        patch, boxes, padding = resize_view(image, boxes, view, self.image_size)
        patch = self.distort(patch)
        image, boxes = F.pad(patch, padding, fill=GREY), F.pad(boxes, padding)
        image, boxes, labels = self.sanitize(*self.flip(image, boxes), labels)
        return image.as_subclass(Tensor), boxes.as_subclass(Tensor) / self.image_size, labels


def _third(inputs: tuple) -> Tensor:
    return inputs[2]


def random_zoom_out(width: int, height: int, settings: v2.RandomZoomOut) -> View:
    """The whole picture, or with probability `settings.p` a larger view that holds it somewhere (SSD, section 3.6)."""
    if torch.rand(()) >= settings.p:
        return View(0, 0, width, height)
    low, high = settings.side_range
    ratio, x, y = torch.rand(3).tolist()
    ratio = low + ratio * (high - low)
    outer_width, outer_height = int(width * ratio), int(height * ratio)
    return View(-int((outer_width - width) * x), -int((outer_height - height) * y), outer_width, outer_height)


def random_iou_crop(view: View, boxes_xyxy: Tensor, settings: v2.RandomIoUCrop) -> tuple[View, Tensor]:
    """A part of `view` as v2.RandomIoUCrop draws it, and which boxes (M,) bool have their centre in it.

    SSD, section 2.2: draw a least IoU from `settings.options`; of `settings.trials` random crops take the first that
    reaches it with a box whose centre it holds; if none does, draw anew. All trials are tried at once, where v2's loop
    takes longer than decoding the JPEG.
    """
    everything = torch.ones(len(boxes_xyxy), dtype=torch.bool)
    if len(boxes_xyxy) == 0:
        return view, everything
    boxes = boxes_xyxy.numpy()
    while True:
        least_iou = settings.options[int(torch.randint(len(settings.options), ()))]
        if least_iou >= 1:
            return view, everything
        crops = _draw_crops(view, torch.rand(settings.trials, 4).numpy(), settings)
        inside, iou = _centres_inside(crops, boxes), _iou(crops, boxes)  # (trials, M)
        passed = np.flatnonzero((inside & (iou >= least_iou)).any(1))
        if len(passed):
            left, top, right, bottom = crops[passed[0]].tolist()
            crop = View(int(left), int(top), int(right - left), int(bottom - top))
            return crop, torch.from_numpy(inside[passed[0]])


def _draw_crops(view: View, uniform: np.ndarray, settings: v2.RandomIoUCrop) -> np.ndarray:
    """Crops (T, 4) xyxy of `view` from numbers (T, 4) in [0, 1); too long, too tall and empty ones become empty."""
    full = np.array([view.width, view.height])
    scale = settings.min_scale + (settings.max_scale - settings.min_scale) * uniform[:, :2]
    size = np.floor(full * scale)
    start = np.array([view.left, view.top]) + np.floor((full - size) * uniform[:, 2:])
    ratio = size[:, 0] / np.maximum(size[:, 1], 1)
    fits = (settings.min_aspect_ratio <= ratio) & (ratio <= settings.max_aspect_ratio)
    return np.concatenate((start, start + size * fits[:, None]), axis=1)


def _centres_inside(crops: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    return ((crops[:, None, :2] < centres) & (centres < crops[:, None, 2:])).all(-1)  # (T, M)


def _iou(crops: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """IoU (T, M). NumPy: on arrays this small, torchvision's takes four times as long."""
    corner, opposite = np.maximum(crops[:, None, :2], boxes[:, :2]), np.minimum(crops[:, None, 2:], boxes[:, 2:])
    shared = (opposite - corner).clip(0).prod(-1)
    areas = (crops[:, 2:] - crops[:, :2]).prod(-1)[:, None] + (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    return shared / (areas - shared)


def resize_view(
    image: Tensor, boxes_xyxy: Tensor, view: View, size: int
) -> tuple[tv_tensors.Image, tv_tensors.BoundingBoxes, list[int]]:
    """What `view` shows of the picture, resized as if the view became (size, size), and the padding to make it that.

    Boxes are clipped to what is shown. A view inside of the picture is exactly crop and resize; beside one that
    reaches beyond, the picture's edges are moved to whole pixels of the outcome, and the boxes with them.
    """
    height, width = image.shape[-2:]
    left, right = max(view.left, 0), min(view.left + view.width, width)
    top, bottom = max(view.top, 0), min(view.top + view.height, height)
    x1, x2 = _place(left - view.left, right - view.left, view.width, size)
    y1, y2 = _place(top - view.top, bottom - view.top, view.height, size)
    boxes = tv_tensors.BoundingBoxes(boxes_xyxy, format="XYXY", canvas_size=(height, width))
    where, shape = (top, left, bottom - top, right - left), [y2 - y1, x2 - x1]
    patch = F.resized_crop(tv_tensors.Image(image), *where, size=shape, antialias=True)
    return patch, F.resized_crop(boxes, *where, size=shape), [x1, y1, size - x2, size - y2]


def _place(start: int, stop: int, full: int, size: int) -> tuple[int, int]:
    """[start, stop) of `full` in whole pixels of `size`, at least one."""
    first = min(round(start * size / full), size - 1)
    return first, max(round(stop * size / full), first + 1)
