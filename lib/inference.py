"""A finished detector on pictures: best.pt through PyTorch, or an exported file through its runtime.

    from lib.inference import load

    detector = load("runs/bccd/final/best.pt")  # or detector.onnx, .xml, .tflite
    boxes, scores, names = detector("photo.jpg")

`draw_pictures` writes pictures with their detections drawn, and all detections as COCO results. It never writes where
it reads, nor over a file that it did not write.
"""

import colorsys
import contextlib
import functools
import itertools
import json
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.ops import batched_nms, nms
from torchvision.transforms.functional import pil_to_tensor

from lib import UserError, checkpoint
from lib.config import DataConfig
from lib.converters import detections_of, open_exported
from lib.datasets import load_annotations
from lib.detector import EXPORTED, Detector, detect, load_detector
from lib.elastic import to_device
from lib.images import MAX_PIXELS, UnreadableImage, is_signed, read_picture, write_picture
from lib.log import progress, say
from lib.metrics import to_pixels
from lib.postprocess import Detections
from lib.runtime import pick_device
from lib.transforms import EvalTransform

SAME_PLACE = 0.6  # IoU from which two detections count as one place when they are drawn
SMALLEST_TEXT = 11  # pixels
OVERLAP = 0.2  # of two neighbouring tiles, as a share of their side
DEFAULT_THRESHOLD = 0.4  # of detectors that do not know their best one
LONGEST_JPEG = 65_500  # pixels a side that libjpeg writes
EMPTY_LIST = "[\n]\n"
LIST_START = '{\n "format": "predict/1",\n "images": '  # of pictures.json: says that --predict wrote to that folder


class PictureDetections(NamedTuple):
    """The detections in one picture, best first: boxes (K, 4) xyxy in its pixels, scores (K,), K class names."""

    boxes: Tensor
    scores: Tensor
    names: list[str]


def tile_places(tiles: str, width: int, height: int) -> list[tuple[int, int, int, int]]:
    """The tiles of a picture, xyxy in its pixels, from a value of --tiles: columns x rows as in 2x2, or pixels a side.

    Neighbours overlap by at least `OVERLAP` of their side.
    """
    columns, is_grid, rows = tiles.partition("x")
    if not re.fullmatch(r"[1-9]\d?x[1-9]\d?|[1-9]\d{1,4}", tiles):
        raise UserError(f"--tiles {tiles}: expected columns x rows, such as 2x2, or pixels a side, such as 640")
    spans = []
    for length, number in ((width, int(columns)), (height, int(rows or columns))):
        side = math.ceil(length / (number - (number - 1) * OVERLAP)) if is_grid else min(number, length)
        count = number if is_grid else math.ceil((length - side) / ((1 - OVERLAP) * side)) + 1
        starts = [i * (length - side) // max(count - 1, 1) for i in range(count)]
        spans.append([(start, start + side) for start in starts])
    return [(left, top, right, bottom) for top, bottom in spans[1] for left, right in spans[0]]


@dataclass
class PictureDetector:
    """`detector(picture)` returns PictureDetections; `load` makes one."""

    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    image_size: int
    detect: Callable[[Tensor], list[Detections]]  # of images (B, 3, image_size, image_size) uint8; boxes in [0, 1]
    nms_threshold: float  # IoU, also used where tiles overlap
    threshold: float | None = None  # the score of the best F1 on the test pictures
    max_pixels: int = MAX_PIXELS  # a file with more is refused
    tiles: str = "1x1"  # see `tile_places`

    def detect_picture(self, image: Tensor) -> Detections:
        """Detections, with normalised boxes, of one picture (3, H, W) uint8 RGB of any size."""
        height, width = image.shape[1:]
        resize = EvalTransform(self.image_size)
        found = []
        for left, top, right, bottom in tile_places(self.tiles, width, height):  # one by one, which bounds the memory
            resized, *_ = resize(image[:, top:bottom, left:right], torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
            (detections,) = self.detect(resized[None])
            # A single tile, the whole picture, has nothing to merge.
            if (right - left, bottom - top) == (width, height):
                return detections
            boxes = to_pixels(detections, right - left, bottom - top)["boxes"]
            found.append(detections._replace(boxes=boxes + torch.tensor([left, top, left, top])))
        boxes, scores, labels = map(torch.cat, zip(*found, strict=True))
        # An object where tiles overlap is found in each of them.
        keep = batched_nms(boxes.double(), scores.double(), labels, self.nms_threshold)  # best first
        return Detections(boxes[keep] / torch.tensor([width, height] * 2), scores[keep], labels[keep])

    def __call__(self, picture: Tensor | str | Path) -> PictureDetections:
        """The detections in a picture, which is a file or (3, H, W) uint8 RGB. Raises UnreadableImage, a UserError.

        Boxes belong to the picture as it is shown, see lib/images.py.
        """
        if isinstance(picture, (str, os.PathLike)):
            image = read_picture(str(picture), max_pixels=self.max_pixels)
        else:
            image = picture
            kind = f"{getattr(image, 'dtype', type(image).__name__)} {tuple(getattr(image, 'shape', ()))}"
            if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
                raise UserError(f"expected a picture's file or a torch tensor (3, H, W) uint8 RGB, found {kind}")
            if not image.numel():
                raise UserError(f"expected a picture, found {kind}, without a pixel")
        found = to_pixels(self.detect_picture(image), image.shape[2], image.shape[1])
        names = [self.classes[label - 1] for label in found["labels"].tolist()]
        return PictureDetections(found["boxes"], found["scores"], names)


def load(path: str | Path, device: str = "auto") -> PictureDetector:
    """The detector in a run's folder (its best.pt), a checkpoint, or a file of --export. Raises UserError.

    `device` is a value of --device, and applies to checkpoints; exported files run on the CPU.
    """
    path = Path(path)
    if path.suffix not in EXPORTED:
        return torch_detector(load_detector(path), device)
    metadata, run_file = open_exported(path)
    classes = tuple(metadata.classes)

    def run(images: Tensor) -> list[Detections]:
        try:
            found = detections_of(run_file(images), metadata.postprocess)
        except Exception as error:  # the file may be a stranger's, and the runtimes' exceptions have no common base
            raise UserError(f"{path}: does not run on its pictures: {error}") from None
        if any((image.labels > len(classes)).any() for image in found):
            raise UserError(f"{path}: finds labels above {len(classes)}, the number of its classes")
        return found

    rules = metadata.postprocess.nms_threshold, next(iter(metadata.thresholds), None)
    return PictureDetector(classes, tuple(metadata.category_ids), metadata.image_size, run, *rules)


def torch_detector(loaded: Detector, device: str) -> PictureDetector:
    """A checkpoint of final_train.py, on a PyTorch device."""
    place, config = pick_device(device), loaded.config
    model = to_device(loaded.model, place)

    def run(images: Tensor) -> list[Detections]:
        return detect(model, [images], config, place)

    rules = config.postprocess.nms_threshold, next(iter(loaded.thresholds), None), config.data.max_pixels
    return PictureDetector(loaded.classes, loaded.category_ids, model.image_size, run, *rules)


class Job(NamedTuple):
    """A picture of --predict."""

    path: Path
    image_id: int | str
    target: Path  # the drawn picture, under the output folder


def plan_jobs(paths: Sequence[Path], own_ids: Mapping[Path, int | str]) -> list[Job]:
    """An id and an output for each picture, no two alike, with the folders below the one that all pictures are in.

    An id is the data set's own (`own_ids`), else a number where the file's name is one and no other picture's, else the
    output's name without its suffix.
    """
    whole = [Path(os.path.normpath(path.absolute())) for path in paths]
    root = os.path.commonpath([path.parent for path in whole])
    # 000000000139.jpg is COCO's picture 139. Its ids are int64.
    numbers = {path: int(path.stem) for path in paths if path.stem.isascii() and path.stem.isdigit()}
    times = Counter(numbers.values())
    owner = {image_id: path for path, image_id in reversed(own_ids.items())}
    jobs, taken = [], set()
    for path, name in zip(paths, (path.relative_to(root) for path in whole), strict=True):
        stems = itertools.chain((name.stem, name.name), (f"{name.stem}_{i}" for i in itertools.count(2)))
        # Not every file system tells A.jpg from a.jpg.
        place = next(p for p in map(name.with_name, stems) if str(p).casefold() not in taken)
        taken.add(str(place).casefold())
        target = Path(f"{place}.jpg")
        choices = [own_ids.get(path), place.as_posix(), target.as_posix(), str(path)]
        if path in numbers and numbers[path] < 2**63 and times[numbers[path]] == 1:
            choices.insert(1, numbers[path])
        # The first that is no other picture's.
        image_id = next(c for c in choices if c is not None and owner.setdefault(c, path) == path)
        jobs.append(Job(path, image_id, target))
    return jobs


def find_own_ids(paths: Sequence[Path], data: DataConfig) -> dict[Path, int | str]:
    """The data set's own image id of each picture that belongs to its test or training data."""
    real = {path.resolve(): path for path in paths}
    if not any(path.is_relative_to(Path(data.root).resolve()) for path in real):
        return {}
    if data.dataset_type == "shapes":  # only read: it would be drawn if it were missing
        data = replace(data, dataset_type="voc")
    own_ids: dict[Path, int | str] = {}
    names = {path.name for path in real}
    for split in ("test", "train"):
        try:
            annotations = load_annotations(data, split)
        except UserError as error:
            say(f"note: no image ids of the {split} annotations, but the files' names: {error}")
            continue
        for i, path in enumerate(map(Path, annotations.paths)):
            if path.name in names and path.resolve() in real:
                own_ids.setdefault(real[path.resolve()], annotations.image_id(i))
        if len(own_ids) == len(real):
            break
    return own_ids


def _refuse_to_overwrite(jobs: Sequence[Job], out: Path) -> None:
    """Raise UserError where a picture would be written where one is read, through a link, or over a foreign file."""
    sources = {parent for job in jobs for parent in (job.path.absolute().parent.resolve(), job.path.resolve().parent)}
    real, listed = out.resolve(), out / "pictures.json"
    ours = listed.is_file() and listed.read_bytes().startswith(LIST_START.encode())
    for name in (Path("pictures.json"), Path("detections.json"), *(job.target for job in jobs)):
        path = out / name
        if path.resolve() != real / name or any(parent.is_file() for parent in path.parents):
            reason = "a part of its path is a link or a file"
        elif (real / name).parent in sources:
            reason = "pictures are read from this folder"
        elif path.exists() and not (ours if path.suffix == ".json" else is_signed(path)):
            reason = "exists, and --predict did not write it"
        else:
            continue
        raise UserError(f"{path}: {reason}; name another folder with --out")


def draw_pictures(detector: PictureDetector, jobs: Sequence[Job], out: Path, threshold: float) -> None:
    """Write each picture to `out` with its detections of at least `threshold`, and all detections to detections.json.

    pictures.json lists the id, the file and the drawn picture of each. A picture that cannot be read is reported and
    skipped. Raises UserError if none can be read, or before anything is written if something would be overwritten.
    """
    _refuse_to_overwrite(jobs, out)
    names = ", ".join(name for name in detector.classes if font_of(name) is None)
    if names:
        say(f"note: labels show numbers for {names}: no font here has their letters; put one that has into ~/.fonts")
    pictures = [{"id": job.image_id, "file_name": str(job.path), "drawn": job.target.as_posix()} for job in jobs]
    checkpoint.write_text(out / "pictures.json", LIST_START + json.dumps(pictures, indent=1) + "\n}")
    checkpoint.write_text(out / "detections.json", EMPTY_LIST)
    read, boxes, best = 0, 0, 0.0
    for job in progress(jobs, "predict"):
        try:
            image = read_picture(str(job.path), max_pixels=detector.max_pixels, note=lambda text: say(f"note: {text}"))
            if max(image.shape) > LONGEST_JPEG:
                raise UnreadableImage(f"{job.path}: has a side of more than {LONGEST_JPEG:,} pixels")
        except UnreadableImage as error:
            say(f"skipped: {error}")
            continue
        detections = detector.detect_picture(image)
        found = to_pixels(detections, image.shape[2], image.shape[1])
        append(out / "detections.json", coco_results(job.image_id, found, detector.category_ids))
        write_picture(draw(image, detections, detector.classes, threshold), out / job.target, signed=True)
        read += 1
        boxes += len(visible(detections, threshold))
        best = max([best, *detections.scores[:1].tolist()])
    if not read:
        raise UserError(f"none of the {len(jobs)} pictures could be read")
    skipped = f", skipped {len(jobs) - read} that cannot be read" if read < len(jobs) else ""
    print(f"wrote {read} pictures and detections.json to {out}{skipped}")
    print(f"drew {boxes} boxes; the highest score is {best:.3f}")
    if not boxes:
        print(f"note: no detection reached --threshold {threshold:g}")


def append(path: Path, records: Sequence[dict]) -> None:
    """Append to a JSON list that began as EMPTY_LIST: the file is whole after each call, whatever ends the process."""
    text = "".join(f",\n{json.dumps(record)}" for record in records)
    with path.open("r+b") as file:
        is_empty = file.seek(-3, os.SEEK_END) == 1
        file.write(f"{text.removeprefix(',') if is_empty else text}\n]\n".encode())


def coco_results(image_id: int | str, found: dict[str, Tensor], category_ids: Sequence[int]) -> list[dict]:
    """The detections of one picture, as `to_pixels` gives them, in COCO's results format; not rounded."""
    boxes_xywh = found["boxes"].double()
    boxes_xywh[:, 2:] -= boxes_xywh[:, :2]
    rows = zip(found["labels"].tolist(), boxes_xywh.tolist(), found["scores"].tolist(), strict=True)
    return [
        {"image_id": image_id, "category_id": category_ids[label - 1], "bbox": bbox, "score": score}
        for label, bbox, score in rows
    ]


def visible(detections: Detections, threshold: float) -> Tensor:
    """Indices of the detections of at least `threshold`, one for each place: a second label would hide the first."""
    confident = (detections.scores >= threshold).nonzero()[:, 0]
    return confident[nms(detections.boxes[confident], detections.scores[confident], SAME_PLACE)]


def draw(image: Tensor, detections: Detections, classes: Sequence[str], threshold: float | None) -> Tensor:
    """A copy of `image` (3, H, W) uint8 with the detections of at least `threshold`: a box and a label each.

    Without a threshold they are objects: all are drawn, and their labels have no score.
    """
    keep = torch.arange(len(detections.scores)) if threshold is None else visible(detections, threshold)
    height, width = image.shape[-2:]
    found = to_pixels(Detections(*(column[keep] for column in detections)), width, height)
    shown = list(zip(*(found[name].tolist() for name in ("boxes", "labels", "scores")), strict=True))
    colour_of = [(0, 0, 0), *class_colours(len(classes))]  # by label
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    pen = ImageDraw.Draw(picture)
    text_size = max(SMALLEST_TEXT, min(height, width) // 28)
    for box, label, _ in shown:
        pen.rectangle(box, outline=colour_of[label], width=max(1, min(height, width) // 150))
    # The best detection is drawn last, so that nothing covers its label.
    for box, label, score in reversed(shown):
        name, font = " ".join(classes[label - 1].split()), font_of(classes[label - 1])
        if font is None:
            name, font = f"class {label}", font_of("")
        pen.font = ImageFont.truetype(font, text_size)
        # A filled label on top of the box, or inside its upper edge if there is no room above.
        text = name if threshold is None else f"{name} {score:.2f}"
        *_, text_width, text_height = pen.textbbox((0, 0), text)
        margin = max(1, text_height // 8)
        label_width, label_height = text_width + 2 * margin, text_height + 2 * margin
        x = max(0, min(box[0], width - label_width))
        y = box[1] - label_height if box[1] >= label_height else box[1]
        pen.rectangle((x, y, x + label_width, y + label_height), fill=colour_of[label])
        red, green, blue = colour_of[label]
        is_bright = 0.299 * red + 0.587 * green + 0.114 * blue > 128
        pen.text((x + margin, y + margin), text, fill="black" if is_bright else "white")
    return pil_to_tensor(picture)


@functools.cache
def font_of(text: str) -> str | None:
    """A font file with all letters of `text`: DejaVu Sans, else one of this machine's; None if there is none."""
    from matplotlib import get_data_path  # slow to import, and only needed here
    from matplotlib.font_manager import findSystemFonts
    from matplotlib.ft2font import FT2Font

    # Control and format characters, such as joiners, need no shape of their own.
    letters = {ord(c) for c in text + "0.9" if not c.isspace() and unicodedata.category(c)[0] != "C"}
    standard = f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    for find in (lambda: [standard], findSystemFonts):  # searching takes a while, and is seldom needed
        for path in sorted(find()):
            with contextlib.suppress(RuntimeError, OSError):  # a broken font, or one of bitmaps
                # Apple's LastResort has a sign for each script, and no letters.
                if "LastResort" not in path and all(map(FT2Font(path).get_char_index, letters)):
                    ImageFont.truetype(path, SMALLEST_TEXT)
                    return path
    return None


def class_colours(count: int) -> list[tuple[int, int, int]]:
    """`count` RGB colours, evenly spaced in hue."""
    colours = [colorsys.hsv_to_rgb(i / count, 0.9, 0.95) for i in range(count)]
    return [tuple(round(255 * channel) for channel in colour) for colour in colours]
