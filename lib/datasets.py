"""What the scripts train and score on: annotations by configuration, the train/search split, loaders."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from lib import distributed
from lib.annotations import Annotations, find_voc_sets, read_coco, read_voc
from lib.checkpoint import write_text
from lib.errors import UserError, did_you_mean
from lib.images import UnreadableImage, is_large_jpeg, read_annotated_picture, read_reduced_jpeg
from lib.runtime import die_with_parent
from lib.shapes import CLASSES, write_shapes
from lib.transforms import TrainTransform, Transform, eval_transform, scaled, train_transform

if TYPE_CHECKING:
    from lib.config import AugmentConfig, Config, DataConfig


logger = logging.getLogger(__name__)
SPLIT_FORMAT = "split/1"
CACHE_BYTES = 2 * 1024**3  # of decoded pictures, per process


# ---- annotations


def load_annotations(data: DataConfig, split: Literal["train", "test"]) -> Annotations:
    """Annotations of the training or the test data. The built-in shapes are drawn first if they are missing.

    Without `data.classes`, the classes are those of the training data also for "test", which reads both: whoever
    has the training annotations saves that by putting their classes into `data`. Raises UserError that names the file.
    """
    root = Path(data.root)
    classes: Sequence[str] = data.classes
    if data.dataset_type == "shapes":
        with distributed.in_turns():
            write_shapes(root, data.shapes_train, data.shapes_test)
        classes = classes or CLASSES  # a handful of pictures need not show them all
    if split == "test" and not classes:
        classes = load_annotations(data, "train").classes
    if data.dataset_type == "coco":
        annotations, images = (getattr(data, f"{split}_{what}") for what in ("annotations", "images"))
        annotations = read_coco(root / annotations, root / images, classes, data.on_error)
    else:
        sets = {"train": data.train_sets, "test": data.test_sets}[split]
        found = find_voc_sets(root, sets, {"train": "trainval", "test": "test"}[split])
        annotations = read_voc(root, found, classes, data.on_error)
    if data.num_classes not in (0, len(annotations.classes)):
        names = ", ".join(annotations.classes)
        raise UserError(
            f"data.num_classes: {data.num_classes}, but {root} has {len(annotations.classes)} classes ({names})"
        )
    return annotations


# -------------------------------------------------------------------------------------------------------------- split


def split_indices(annotations: Annotations, data_portion: Sequence[float], seed: int) -> tuple[list[int], list[int]]:
    """Rows of `annotations` that train the supernet and that score candidates: disjoint, in ascending order.

    An image's side follows from the rank of its hash among all, so the split depends on the seed and the image ids
    only, and the proportions are exact. Portions that sum to less than 1 leave images out.
    """
    if len(data_portion) != 2 or min(data_portion) < 0 or sum(data_portion) > 1 + 1e-9:
        raise UserError(f"data.data_portion: expected two shares that sum to at most 1, found {list(data_portion)}")
    hashes = [hashlib.sha256(f"{seed}-{annotations.image_id(i)}".encode()).digest() for i in range(len(annotations))]
    ranked = sorted(range(len(annotations)), key=hashes.__getitem__)
    first, second = round(data_portion[0] * len(annotations)), round(sum(data_portion) * len(annotations))
    train, search = sorted(ranked[:first]), sorted(ranked[first:second])
    for portion, part in zip(data_portion, (train, search), strict=True):
        if portion > 0 and not part:
            raise UserError(f"data.data_portion: {portion} of {len(annotations)} images is no image")
    return train, search


def save_split(path: str | Path, annotations: Annotations, train: Sequence[int], search: Sequence[int]) -> None:
    """Write the split as JSON with image ids, which outlast a new order of the rows."""
    ids = {name: [annotations.image_id(i) for i in part] for name, part in (("train", train), ("search", search))}
    write_text(Path(path), json.dumps({"format": SPLIT_FORMAT, **ids}))


def load_split(path: str | Path, annotations: Annotations) -> tuple[list[int], list[int]]:
    """The rows of a saved split. Raises UserError if it is unreadable, leaks, or names an image that is not there."""
    path = Path(path)
    try:
        content = json.loads(path.read_text())
        if content["format"] != SPLIT_FORMAT:
            raise ValueError(f"its format is {content['format']}, expected {SPLIT_FORMAT}")
        ids: list[list[str]] = [content["train"], content["search"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a saved split: {' '.join(str(error).split())}") from None
    rows = {annotations.image_id(i): i for i in range(len(annotations))}
    for image_id in (image_id for part in ids for image_id in part):
        if image_id not in rows:
            raise UserError(f"{path}: image '{image_id}' is not in the data{did_you_mean(image_id, list(rows)[:1000])}")
    common = set(ids[0]) & set(ids[1])
    if common:
        raise UserError(f"{path}: image '{min(common)}' is on both sides of the split")
    return [rows[i] for i in ids[0]], [rows[i] for i in ids[1]]


# ----------------------------------------------------------------------------------------------------------- pictures


@dataclass(frozen=True)
class Batch:
    """images (B, 3, S, S) uint8; boxes (B, M, 4) in [0, 1] and labels (B, M), both padded with 0; index (B,) rows."""

    images: Tensor
    boxes: Tensor
    labels: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> Batch:
        return Batch(*(t.to(device, non_blocking=True) for t in (self.images, self.boxes, self.labels, self.index)))

    def pin_memory(self) -> Batch:
        """What the DataLoader calls under `pin_memory`."""
        return Batch(*(t.pin_memory() for t in (self.images, self.boxes, self.labels, self.index)))


Sample = tuple[Tensor, Tensor, Tensor, int]  # image, boxes, labels, row


def collate(samples: Sequence[Sample]) -> Batch:
    """A batch from samples with different numbers of objects, even none."""
    images, boxes, labels, index = zip(*samples, strict=True)
    padded = (pad_sequence(tensors, batch_first=True) for tensors in (boxes, labels))
    return Batch(torch.stack(images), *padded, torch.tensor(index))


class DetectionDataset(Dataset):
    """Pictures of some rows of `annotations`, transformed.

    It is asked for (epoch, row): the outcome is a function of (seed, epoch, row) alone, whichever process computes it
    and whatever it did before. Ignored objects are not trained on. Under `on_error: skip`, a picture that cannot be
    read is logged once per process; in training the next readable row stands in for it, in evaluation a black picture
    does, so that its objects count as missed. With `cache`, decoded pictures stay in this process's memory; without,
    training decodes a large JPEG at a half, a quarter or an eighth where it shows no more of it than that.
    """

    def __init__(
        self,
        annotations: Annotations,
        indices: Sequence[int],
        transform: Transform,
        *,
        seed: int = 0,
        training: bool = True,
        on_error: str = "raise",
        cache: bool = False,
    ) -> None:
        self.annotations = annotations
        self.indices = torch.as_tensor(indices, dtype=torch.int64).share_memory_()
        self.transform, self.seed, self.training, self.on_error = transform, seed, training, on_error
        self.cache_room = CACHE_BYTES if cache else 0
        self.reduces = not cache and isinstance(transform, TrainTransform)
        self.cached: dict[int, Tensor] = {}
        self.unreadable: set[int] = set()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, row = key
        if self.reduces and is_large_jpeg(self.annotations.path(row), self.annotations.sizes[row]):
            with contextlib.suppress(UnreadableImage), self._random(epoch, row):
                return *self._reduced(row), row
        if self.on_error == "skip":
            image, shown = self._image_or_stand_in(row)
        else:
            image, shown = self._image(row), row
        with self._random(epoch, row):
            return *self.transform(image, *self._objects(shown)), shown

    @contextlib.contextmanager
    def _random(self, epoch: int, row: int) -> Iterator[None]:
        """Random numbers that depend on the sample alone."""
        digest = hashlib.sha256(f"{self.seed}-{epoch}-{row}".encode()).digest()
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would also reseed the GPU's generator, and that is not forked here.
            torch.default_generator.manual_seed(int.from_bytes(digest[:7], "big"))
            yield

    def _objects(self, row: int) -> tuple[Tensor, Tensor]:
        target = self.annotations.target(row)
        counted = ~target["ignore"]
        return target["boxes"][counted], target["labels"][counted]

    def _reduced(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        """What the transform makes of a picture that is decoded no larger than what will be seen of it needs."""
        width, height = self.annotations.sizes[row].tolist()
        view, boxes, labels = self.transform.choose(width, height, *self._objects(row))
        image = read_reduced_jpeg(self.annotations.path(row), width, height, self.transform.reduction(view))
        view, boxes = scaled(view, boxes, image.shape[2] / width, image.shape[1] / height)
        return self.transform.show(image, view, boxes, labels)

    def _image_or_stand_in(self, row: int) -> tuple[Tensor, int]:
        for candidate in self._candidates(row):
            if candidate in self.unreadable:
                continue
            try:
                return self._image(candidate), candidate
            except UnreadableImage as error:
                self.unreadable.add(candidate)
                logger.warning("%s; skipped", error)
        if self.training:
            raise UnreadableImage(
                f"{self.annotations.path(row)}: neither this nor any other picture of the set can be read"
            )
        width, height = self.annotations.sizes[row].tolist()
        return torch.zeros(3, height, width, dtype=torch.uint8), row

    def _candidates(self, row: int) -> Iterator[int]:
        yield row
        if self.training:
            position = int((self.indices == row).nonzero()[0])
            yield from self.indices.roll(-position)[1:].tolist()

    def _image(self, row: int) -> Tensor:
        if row in self.cached:
            return self.cached[row]
        image = read_annotated_picture(self.annotations.path(row), *self.annotations.sizes[row].tolist())
        if image.numel() <= self.cache_room:
            self.cache_room -= image.numel()
            self.cached[row] = image
        return image


# ------------------------------------------------------------------------------------------------------------ loaders


class EpochSampler:
    """Batches of (epoch, row). The order is a function of (seed, epoch); `set_epoch` says which, and where in it.

    The rows of batch k over all ranks are those of batch k of a single process with `world` times the batch size, and
    every rank has the same number of batches: the last rows are left out, or (`drop_last` false) the first ones come
    again. A set smaller than one batch gives one batch.
    """

    def __init__(
        self,
        indices: Sequence[int],
        batch_size: int,
        seed: int,
        *,
        drop_last: bool = True,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if not len(indices):
            raise UserError("the training set has no image (data.data_portion)")
        self.indices = torch.as_tensor(indices, dtype=torch.int64)
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world
        drop_last = drop_last and len(indices) >= batch_size * world
        per_rank = len(indices) // world if drop_last else -(-len(indices) // world)
        self.batches_per_epoch = per_rank // batch_size if drop_last else -(-per_rank // batch_size)
        self.per_rank = min(per_rank, self.batches_per_epoch * batch_size)
        self.set_epoch(1)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """The next iteration is over `epoch`, without its first `start_batch` batches."""
        self.epoch, self.start_batch = epoch, start_batch

    def __len__(self) -> int:
        """Batches left in this epoch."""
        return max(self.batches_per_epoch - self.start_batch, 0)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        digest = hashlib.sha256(f"{self.seed}-{self.epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        order = self.indices[torch.randperm(len(self.indices), generator=generator)]
        positions = torch.arange(self.rank, self.per_rank * self.world, self.world) % len(order)
        batches = order[positions].split(self.batch_size)
        yield from ([(self.epoch, row) for row in batch.tolist()] for batch in batches[self.start_batch :])


def train_loader(
    annotations: Annotations,
    indices: Sequence[int],
    image_size: int,
    batch_size: int,
    *,
    seed: int = 0,
    augment: AugmentConfig | None = None,
    workers: int = 0,
    on_error: str = "raise",
    cache: bool = False,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world: int = 1,
) -> DataLoader:
    """Augmented batches in an order drawn anew each epoch; `loader.batch_sampler.set_epoch` before each."""
    transform = train_transform(image_size, augment)
    dataset = DetectionDataset(annotations, indices, transform, seed=seed, on_error=on_error, cache=cache)
    sampler = EpochSampler(indices, batch_size, seed, rank=rank, world=world)
    return _loader(dataset, sampler, workers, device)


def configured_train_loader(
    annotations: Annotations,
    indices: Sequence[int],
    image_size: int,
    batch_size: int,
    config: Config,
    device: torch.device,
) -> DataLoader:
    """`train_loader` as `config.data` says; of several processes, each has its share of every batch."""
    data, world = config.data, distributed.world()
    return train_loader(
        annotations,
        indices,
        image_size,
        batch_size // world.size,
        seed=config.seed,
        augment=data.augment,
        workers=data.workers,
        on_error=data.on_error,
        cache=data.cache,
        device=device,
        rank=world.rank,
        world=world.size,
    )


def eval_loader(
    annotations: Annotations,
    indices: Sequence[int],
    image_size: int,
    batch_size: int,
    *,
    workers: int = 0,
    on_error: str = "raise",
    device: torch.device | str = "cpu",
    shared: bool = False,
) -> DataLoader:
    """Resized pictures in the order of `indices`, each once; the last batch may be smaller.

    With `shared`, the batches are dealt out to the processes of the job.
    """
    transform = eval_transform(image_size)
    dataset = DetectionDataset(annotations, indices, transform, training=False, on_error=on_error)
    keys = [(0, int(row)) for row in indices]
    batches = [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]
    return _loader(dataset, distributed.deal(batches) if shared else batches, workers, device)


def _loader(dataset: DetectionDataset, batches: object, workers: int, device: torch.device | str) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.device(device).type == "cuda",
        persistent_workers=workers > 0,
        worker_init_fn=_start_worker,
        # Else each epoch takes a number from the global generator, which a resumed epoch would take a second time.
        generator=torch.Generator(),
    )


def _start_worker(worker: int) -> None:
    """One thread, the main process has the others. Signals are for the main process to act on: Ctrl-C, and the SIGTERM
    that torchrun sends to the whole group of processes."""
    die_with_parent()
    torch.set_num_threads(1)
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
