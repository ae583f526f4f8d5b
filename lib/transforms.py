"""SSD's augmentation of a picture with its boxes, and the plain resize for evaluation, built on torchvision's v2."""

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

# image (3, H, W) uint8, boxes (M, 4) xyxy in pixels, labels (M,) -> image (3, S, S) uint8, boxes in [0, 1], labels, and
# settings of `distort` (12,) where that is left to a GPU
Transform = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]
GREY = 127  # fill around a picture that is zoomed out; the network's input scaling maps it to nearly zero


class View(NamedTuple):
    """The part of a picture that a sample shows, in the picture's pixels. It may extend beyond every edge."""

    left: int
    top: int
    width: int
    height: int


class EvalTransform:
    """Resize to `image_size` pixels a side; nothing is random."""

    def __init__(self, image_size: int) -> None:
        self.size = [image_size, image_size]

    def __call__(self, image: Tensor, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        height, width = image.shape[-2:]
        resized = F.resize(tv_tensors.Image(image), self.size, antialias=True)
        return resized.as_subclass(Tensor), boxes / boxes.new_tensor([width, height, width, height]), labels


class TrainTransform:
    """Zoom out, IoU crop, resize, photometric distortion, flip (SSD, Liu et al., ECCV 2016, sections 2.2 and 3.6).

    Boxes smaller than a pixel are removed together with their labels.

    The geometry is chosen first, as a `View`. So neither SSD's canvas of up to 16 times the picture nor a full-size
    crop is made, and colours are distorted on the small result only. The fill is added last: as in SSD, it is not
    distorted. This takes a fifth of the time of the same v2 classes applied one after the other.

    With `distort_later`, the photometric distortion is only drawn; `distort` applies it to a whole batch, on a GPU.
    """

    def __init__(self, image_size: int, augment: AugmentConfig | None = None, distort_later: bool = False) -> None:
        augment = augment or AugmentConfig()
        self.image_size = image_size
        self.distort_later = distort_later
        self.crop_probability = augment.iou_crop
        self.zoom_out = v2.RandomZoomOut(p=augment.zoom_out)
        self.crop = v2.RandomIoUCrop()
        self.distort = v2.RandomPhotometricDistort(p=augment.distort)
        self.flip = v2.RandomHorizontalFlip(p=augment.flip)

    def __call__(self, image: Tensor, boxes: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        height, width = image.shape[-2:]
        view, boxes, labels = self.choose(width, height, boxes, labels)
        return self.render(image, view, boxes, labels, self.image_size)

    def choose(self, width: int, height: int, boxes: Tensor, labels: Tensor) -> tuple[View, Tensor, Tensor]:
        """A random view of a picture of that size, and the objects in it. Needs no pixels yet."""
        view = random_zoom_out(width, height, self.zoom_out)
        if torch.rand(()) < self.crop_probability:
            view, inside = random_iou_crop(view, boxes, self.crop)
            boxes, labels = boxes[inside], labels[inside]
        return view, boxes, labels

    def render(self, image: Tensor, view: View, boxes: Tensor, labels: Tensor, size: int) -> tuple[Tensor, ...]:
        """The sample of `size` pixels a side that shows `view`; `view` and `boxes` are in pixels of `image`."""
        patch, boxes, padding = resize_view(image, boxes, view, size)
        # Distorted before it is padded: the fill keeps its grey.
        patch = patch if self.distort_later else self.distort(patch)
        image, boxes = F.pad(patch, padding, fill=GREY), F.pad(boxes, padding)
        settings = []
        if self.distort_later:
            left, top, right, bottom = padding
            corners = [left, top, size - right, size - bottom]
            region = tv_tensors.BoundingBoxes([corners], format="XYXY", canvas_size=(size, size))
            image, boxes, region = self.flip(image, boxes, region)
            settings = [torch.cat([draw_distortion(self.distort), region.as_subclass(Tensor)[0]])]
        else:
            image, boxes = self.flip(image, boxes)
        boxes = boxes.as_subclass(Tensor)
        kept = (boxes[:, 2:] - boxes[:, :2] >= 1).all(1)  # v2.SanitizeBoundingBoxes takes a tenth of a sample's time
        return image.as_subclass(Tensor), boxes[kept] / size, labels[kept], *settings


def draw_distortion(rule: v2.RandomPhotometricDistort) -> Tensor:
    """Random settings (8,) of `rule`: brightness, contrast, saturation, hue, whether contrast is first, channels."""
    ranges = torch.tensor([rule.brightness, rule.contrast, rule.saturation, rule.hue])
    drawn = ranges[:, 0] + torch.rand(4) * (ranges[:, 1] - ranges[:, 0])
    factors = torch.where(torch.rand(4) < rule.p, drawn, torch.tensor([1.0, 1.0, 1.0, 0.0]))
    channels = torch.randperm(3) if torch.rand(()) < rule.p else torch.arange(3)
    return torch.cat([factors, torch.rand(1).round(), channels])


def distort(images: Tensor, settings: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) uint8, each as v2.RandomPhotometricDistort makes it with its own row of settings (B, 12).

    A row is that of `draw_distortion` and the region xyxy in pixels that is no fill. The host waits for nothing.
    """
    brightness, contrast, saturation, hue, contrast_first = settings[:, :5, None, None, None].unbind(1)  # (B, 1, 1, 1)
    left, top, right, bottom = settings[:, 8:, None, None, None].unbind(1)
    rows, columns = (torch.arange(length, device=images.device) for length in images.shape[2:])
    rows = rows[:, None]
    inside = (left <= columns) & (columns < right) & (top <= rows) & (rows < bottom)  # (B, 1, H, W)

    def change_contrast(x: Tensor, where: Tensor) -> Tensor:
        grey = F.rgb_to_grayscale(x) * inside
        mean = grey.sum((1, 2, 3), keepdim=True) / inside.sum((1, 2, 3), keepdim=True)
        return torch.lerp(mean, x, 1 + where * (contrast - 1)).clamp(0, 1)

    x = (images / 255 * brightness).clamp(0, 1)
    x = change_contrast(x, contrast_first)
    x = torch.lerp(F.rgb_to_grayscale(x), x, saturation).clamp(0, 1)
    x = change_contrast(turn_hue(x, hue), 1 - contrast_first)
    channels = settings[:, 5:8, None, None].long().expand_as(x)
    return torch.where(inside, (255 * x).round().to(torch.uint8).gather(1, channels), images)


def turn_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] with their hue turned by (B, 1, 1, 1) whole turns, value and saturation kept."""
    red, green, blue = x.split(1, 1)
    value = x.amax(1, keepdim=True)
    chroma = value - x.amin(1, keepdim=True)
    # The hue in sixths of a turn (Smith, SIGGRAPH 1978). Grey has none: whatever it is, its chroma is 0.
    greater = torch.where(value == green, 2 * chroma + blue - red, 4 * chroma + red - green)
    sixths = torch.where(value == red, green - blue, greater) / chroma.clamp(min=1e-6)
    position = (sixths + 6 * turns + torch.arange(5, 0, -2, device=x.device)[:, None, None]) % 6
    return value - chroma * torch.minimum(position, 4 - position).clamp(0, 1)


def random_zoom_out(width: int, height: int, settings: v2.RandomZoomOut) -> View:
    """The whole picture, or with probability `settings.p` a larger view that contains it (SSD, section 3.6)."""
    if torch.rand(()) >= settings.p:
        return View(0, 0, width, height)
    low, high = settings.side_range
    ratio, x, y = torch.rand(3).tolist()
    ratio = low + ratio * (high - low)
    outer_width, outer_height = int(width * ratio), int(height * ratio)
    return View(-int((outer_width - width) * x), -int((outer_height - height) * y), outer_width, outer_height)


def random_iou_crop(view: View, boxes_xyxy: Tensor, settings: v2.RandomIoUCrop) -> tuple[View, Tensor]:
    """A part of `view`, drawn as v2.RandomIoUCrop does, and which boxes (M,) bool have their centre in it.

    SSD, section 2.2: draw a minimum IoU from `settings.options`. The first of `settings.trials` random crops wins that
    has this IoU with a box whose centre is in the crop. If there is none, start again.
    """
    everything = torch.ones(len(boxes_xyxy), dtype=torch.bool)
    if len(boxes_xyxy) == 0:
        return view, everything
    boxes = boxes_xyxy.numpy()
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    while True:
        min_iou = settings.options[int(torch.randint(len(settings.options), ()))]
        if min_iou >= 1:
            return view, everything
        # All trials are evaluated at once: v2's loop over them takes longer than decoding the JPEG.
        crops = _draw_crops(view, torch.rand(settings.trials, 4).numpy(), settings)  # (T, 4)
        inside = ((crops[:, None, :2] < centres) & (centres < crops[:, None, 2:])).all(-1)  # (T, M)
        passed = np.flatnonzero((inside & (_iou(crops, boxes) >= min_iou)).any(1))
        if len(passed):
            left, top, right, bottom = crops[passed[0]].astype(int).tolist()
            return View(left, top, right - left, bottom - top), torch.from_numpy(inside[passed[0]])


def _draw_crops(view: View, uniform: np.ndarray, settings: v2.RandomIoUCrop) -> np.ndarray:
    """Crops (T, 4) xyxy of `view` from numbers (T, 4) in [0, 1). Those with a wrong aspect ratio become empty."""
    full = np.array([view.width, view.height])
    scale = settings.min_scale + (settings.max_scale - settings.min_scale) * uniform[:, :2]
    size = np.floor(full * scale)
    start = np.array([view.left, view.top]) + np.floor((full - size) * uniform[:, 2:])
    # An empty crop contains no centre, so it never passes.
    ratio = size[:, 0] / np.maximum(size[:, 1], 1)
    fits = (settings.min_aspect_ratio <= ratio) & (ratio <= settings.max_aspect_ratio)
    return np.concatenate((start, start + size * fits[:, None]), axis=1)


def _iou(crops: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """IoU (T, M). On arrays this small, torchvision's box_iou takes four times as long."""
    corner = np.maximum(crops[:, None, :2], boxes[:, :2])
    opposite = np.minimum(crops[:, None, 2:], boxes[:, 2:])
    shared = (opposite - corner).clip(0).prod(-1)
    areas = (crops[:, 2:] - crops[:, :2]).prod(-1)[:, None] + (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    return shared / (areas - shared)


def scale_view(view: View, boxes: Tensor, x: float, y: float) -> tuple[View, Tensor]:
    """The same view and boxes in the pixels of a picture resized by `x` in width and `y` in height."""
    left, right = round(view.left * x), round((view.left + view.width) * x)
    top, bottom = round(view.top * y), round((view.top + view.height) * y)
    return View(left, top, right - left, bottom - top), boxes * boxes.new_tensor([x, y, x, y])


def reduction(view: View, size: int) -> int:
    """The largest of 1, 2, 4 and 8 by which a picture can be reduced before `view` has to be enlarged to `size`."""
    return next((by for by in (8, 4, 2) if min(view.width, view.height) >= by * size), 1)


def resize_view(
    image: Tensor, boxes_xyxy: Tensor, view: View, size: int
) -> tuple[tv_tensors.Image, tv_tensors.BoundingBoxes, list[int]]:
    """The picture's part in `view` at the scale that makes the view (size, size), and the padding to that size.

    Boxes are clipped to that part. For a view inside the picture this is exactly crop and resize. For one that extends
    beyond it, the picture's edges, and the boxes with them, are moved to whole pixels of the result.
    """
    # The region that the view and the picture have in common, in the picture and in the result.
    height, width = image.shape[-2:]
    left, right = max(view.left, 0), min(view.left + view.width, width)
    top, bottom = max(view.top, 0), min(view.top + view.height, height)
    x1, x2 = _to_pixels(left - view.left, right - view.left, view.width, size)
    y1, y2 = _to_pixels(top - view.top, bottom - view.top, view.height, size)
    boxes = tv_tensors.BoundingBoxes(boxes_xyxy, format="XYXY", canvas_size=(height, width))
    region = (top, left, bottom - top, right - left)
    shape = [y2 - y1, x2 - x1]
    patch = F.resized_crop(tv_tensors.Image(image), *region, size=shape, antialias=True)
    return patch, F.resized_crop(boxes, *region, size=shape), [x1, y1, size - x2, size - y2]


def _to_pixels(start: int, stop: int, full: int, size: int) -> tuple[int, int]:
    """[start, stop) of `full` in whole pixels of `size`; at least one pixel."""
    first = min(round(start * size / full), size - 1)
    return first, max(round(stop * size / full), first + 1)
