"""The built-in data set: drawn pictures of shapes on textured backgrounds, written as a VOC folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from lib import UserError
from lib.checkpoint import lock
from lib.images import write_picture

MARKER = "shapes.json"  # says that the folder is ours, and whether it is complete
SCALES = (0.28, 0.6)  # size of a shape, relative to the picture's shorter side
TILT = 0.25  # radians to either side

Box = tuple[int, int, int, int]  # x1, y1, x2, y2, continuous pixels from 0
# Signed distance to the outline of a shape of radius 1, negative inside, at points (u, v) from its centre.
Shape = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    u, v = np.abs(u), np.abs(v)
    return np.maximum(np.maximum(u, v) - 1, np.minimum(u, v) - 0.32)


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # Folded into one of ten equal wedges, the star's outline is the line from a tip to the next notch.
    angle = np.abs((np.arctan2(v, u) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    tip, notch = np.array([1.0, 0.0]), 0.45 * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
    edge = (notch - tip) / np.linalg.norm(notch - tip)
    radius = np.hypot(u, v)
    return (radius * np.cos(angle) - tip[0]) * edge[1] - radius * np.sin(angle) * edge[0]


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    angles = np.pi * np.array([1 / 2, 7 / 6, 11 / 6])
    return np.max([u * np.cos(a) + v * np.sin(a) for a in angles], axis=0) - 0.5


# Colours are drawn independently of the class, so only the form tells one class from another.
SHAPES: dict[str, Shape] = {
    "circle": lambda u, v: np.hypot(u, v) - 1,
    "cross": _cross,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) - 0.8,
    "star": _star,
    "triangle": _triangle,
}
CLASSES = tuple(SHAPES)


def draw_picture(rng: np.random.Generator) -> tuple[np.ndarray, list[tuple[str, Box]]]:
    """One picture (H, W, 3) uint8, 160 to 224 pixels a side, and the class and box of its objects.

    It shows texture, clutter that belongs to no class, and at most 5 shapes; 5% of the pictures are meant to have none.
    """
    height, width = rng.integers(160, 225, size=2)
    canvas = _background(rng, height, width)
    _clutter(rng, canvas)
    objects: list[tuple[str, Box]] = []
    for _ in range(0 if rng.random() < 0.05 else rng.integers(1, 6)):
        name = CLASSES[rng.integers(len(CLASSES))]
        side = min(height, width) * np.exp(rng.uniform(*np.log(SCALES)))
        alpha, box = place(rng, SHAPES[name], side, (height, width), [box for _, box in objects])
        if box is None:
            continue
        # The colour has to differ clearly from what the shape covers.
        covered = canvas[alpha >= 0.5].mean(0)
        colour = covered
        while np.linalg.norm(colour - covered) <= 110:
            colour = rng.uniform(0, 255, size=3)
        _paint(canvas, alpha, colour)
        objects.append((name, box))
    canvas += rng.normal(0, rng.uniform(2, 8), size=canvas.shape).astype(np.float32)
    return canvas.clip(0, 255).astype(np.uint8), objects


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A gradient between two colours with a wavy texture on it, (H, W, 3) float32."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    first, second = rng.uniform(20, 235, size=(2, 3)).astype(np.float32)
    angle, wave = rng.uniform(0, 2 * np.pi, size=2)
    ramp = (x / width - 0.5) * np.cos(angle) + (y / height - 0.5) * np.sin(angle) + 0.5
    ripple = np.sin((x * np.cos(wave) + y * np.sin(wave)) * rng.uniform(0.05, 0.6)) * rng.uniform(0, 18)
    return first + (second - first) * ramp[..., None].astype(np.float32) + ripple[..., None].astype(np.float32)


def _clutter(rng: np.random.Generator, canvas: np.ndarray) -> None:
    """Draw lines and soft blobs, which belong to no class."""
    height, width = canvas.shape[:2]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    for _ in range(rng.integers(0, 6)):
        centre_y, centre_x = rng.uniform(0, height), rng.uniform(0, width)
        angle = rng.uniform(0, np.pi)
        along = (x - centre_x) * np.cos(angle) + (y - centre_y) * np.sin(angle)
        across = (y - centre_y) * np.cos(angle) - (x - centre_x) * np.sin(angle)
        if rng.random() < 0.6:
            outside = np.maximum(np.abs(along) - rng.uniform(10, 80), np.abs(across) - rng.uniform(0.7, 2.5))
            alpha = np.clip(0.5 - outside, 0, 1)
        else:
            alpha = 0.8 * np.exp(-((along / rng.uniform(8, 30)) ** 2) - (across / rng.uniform(4, 15)) ** 2)
        _paint(canvas, alpha, rng.uniform(0, 255, size=3))


def place(
    rng: np.random.Generator, shape: Shape, side: float, size: tuple[int, int], taken: list[Box]
) -> tuple[np.ndarray, Box | None]:
    """Coverage (H, W) in [0, 1] of a rotated, slightly stretched shape at a random place, and its tight box.

    The box is None if ten tries found no place that leaves the shapes in `taken` mostly visible.
    """
    height, width = size
    radius = side / 2
    for _ in range(10):
        angle = rng.uniform(-TILT, TILT)
        stretch = np.exp(rng.uniform(-0.2, 0.2))
        centre_x, centre_y = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
        # From pixels to the shape's own frame, where its radius is 1.
        y, x = np.ogrid[:height, :width]
        x = (x + 0.5 - centre_x) / (radius * stretch)
        y = (y + 0.5 - centre_y) * stretch / radius
        u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        alpha = np.clip(0.5 - shape(u, v) * radius, 0, 1)
        rows = np.flatnonzero((alpha >= 0.5).any(1))
        columns = np.flatnonzero((alpha >= 0.5).any(0))
        box = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
        # Boxes stay tight around the whole shape, so an earlier shape must remain recognisable.
        if all(_covered(other, box) < 0.25 and _covered(box, other) < 0.5 for other in taken):
            return alpha, box
    return alpha, None


def _covered(box: Box, by: Box) -> float:
    """Share of `box` that `by` covers."""
    width = min(box[2], by[2]) - max(box[0], by[0])
    height = min(box[3], by[3]) - max(box[1], by[1])
    return max(width, 0) * max(height, 0) / ((box[2] - box[0]) * (box[3] - box[1]))


def _paint(canvas: np.ndarray, alpha: np.ndarray, colour: np.ndarray) -> None:
    canvas += alpha[..., None].astype(np.float32) * (colour.astype(np.float32) - canvas)


def write_shapes(root: Path, train: int, test: int, seed: int = 0) -> None:
    """Write `train` + `test` pictures to `root`, unless these very pictures are there already.

    The folder is a VOC year (JPEGImages, Annotations, ImageSets/Main). If several processes start at once, one draws
    and the others wait. Raises UserError for a folder that holds other files, and for one that cannot be written to.
    """
    marker = root / MARKER
    complete = {"format": "shapes/1", "train": train, "test": test, "seed": seed, "complete": True}

    def is_complete() -> bool:
        return marker.is_file() and marker.read_bytes() == json.dumps(complete).encode()

    if is_complete():
        return
    # Never write into a folder that the user filled.
    found = [path for path in root.iterdir() if not path.name.startswith(".")] if root.is_dir() else []
    if found and not marker.exists():
        raise UserError(f"{root}: expected the built-in shapes or an empty folder, found other files (data.root)")
    try:
        root.mkdir(parents=True, exist_ok=True)
        with (root / ".lock").open("w") as file:
            lock(file, wait=True)
            if is_complete():  # drawn by another process while this one waited
                return
            # If the drawing is interrupted, the marker shows that the folder is ours and has to be drawn again.
            marker.write_text(json.dumps(complete | {"complete": False}))
            for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
                shutil.rmtree(root / folder, ignore_errors=True)
                (root / folder).mkdir(parents=True)
            _write_set(root, "trainval", train, seed=(seed, 0))
            _write_set(root, "test", test, seed=(seed, 1))
            marker.write_text(json.dumps(complete))
    except OSError as error:
        raise UserError(f"{root}: the built-in pictures cannot be written here: {error.strerror} (data.root)") from None


def _write_set(root: Path, name: str, count: int, seed: tuple[int, int]) -> None:
    """One image set. Each picture has its own seed, so a larger set starts with the pictures of a smaller one."""
    stems = [f"{name}_{number:05d}" for number in range(1, count + 1)]
    for number, stem in enumerate(stems, start=1):
        pixels, objects = draw_picture(np.random.default_rng([*seed, number]))
        write_picture(torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), root / "JPEGImages" / f"{stem}.jpg")
        # VOC's boxes are 1-based and inclusive.
        boxes = "".join(
            f"  <object>\n    <name>{label}</name>\n    <difficult>0</difficult>\n    <bndbox><xmin>{x1 + 1}</xmin>"
            f"<ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox>\n  </object>\n"
            for label, (x1, y1, x2, y2) in objects
        )
        height, width = pixels.shape[:2]
        size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
        xml = f"<annotation>\n  <filename>{stem}.jpg</filename>\n  {size}\n{boxes}</annotation>\n"
        (root / "Annotations" / f"{stem}.xml").write_text(xml)
    (root / "ImageSets" / "Main" / f"{name}.txt").write_text("".join(f"{stem}\n" for stem in stems))
