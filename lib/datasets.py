"""The pictures that the scripts train and score on: the configured annotations, the train/search split, the loaders."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from lib import UserError, did_you_mean, distributed
from lib.annotations import Annotations, assemble, first_ranked, read_coco, read_pairs
from lib.checkpoint import write_text
from lib.config import Config, DataConfig
from lib.images import UnreadableImage, read_picture
from lib.labels import Faults
from lib.layouts import find_layout
from lib.plain import check, read_json
from lib.runtime import start_loader_process
from lib.shapes import CLASSES, write_shapes
from lib.transforms import EvalTransform, TrainTransform, Transform, distort, reduction, scale_view

Device = torch.device | str
logger = logging.getLogger(__name__)
SPLIT_FORMAT = "split/1"
CACHE_BYTES = 2 * 1024**3  # of decoded pictures
LARGE_PICTURE = 1_000_000  # pixels; a smaller JPEG gains nothing from reduced decoding
MOST_WORKERS = 16  # of an `auto` number


def load_annotations(data: DataConfig, split: Literal["train", "test"]) -> Annotations:
    """Annotations of the training or the test data. The built-in shapes are drawn first if they are missing.

    Without `data.classes`, both splits have those of the training data, which "test" then reads too. Data without a
    test split gives `data.test_portion` of its pictures. Raises UserError that names the file.
    """
    root = Path(data.root)
    if data.dataset_type == "shapes":
        write_shapes(root, data.shapes_train, data.shapes_test)
        # A small set may not show all classes.
        return load_annotations(replace(data, dataset_type="voc", classes=data.classes or list(CLASSES)), split)
    faults = Faults(data.on_error, data.max_skipped)
    found, parts, cut = find_layout(data, split, faults)
    tests = split == "test" and not cut  # read from files of its own
    classes: Sequence[str] = data.classes
    if tests and not classes:
        classes = load_annotations(data, "train").classes
    if found.kind == "coco":
        folder = data.test_images if tests else data.train_images
        content = read_coco(root / folder, parts, faults)
    else:
        content = read_pairs(parts, faults, found.names, found.keypoints)
    known = content.category_ids
    unknown = [name for name in classes if name not in known] if known is not None else []
    if unknown and not tests:
        raise UserError(f"{root}: unknown class '{unknown[0]}'{did_you_mean(unknown[0], known)}")
    if unknown:
        # The ids of classes that a COCO file does not list: those of the training data, where they are free.
        theirs: dict[str, int] = {}
        with contextlib.suppress(UserError):  # an evaluation may have the test data alone
            train = load_annotations(replace(data, classes=[]), "train")
            theirs = dict(zip(train.classes, train.category_ids, strict=True))
        for name in unknown:
            free = name in theirs and theirs[name] not in known.values()
            known[name] = theirs[name] if free else max(known.values(), default=0) + 1
    annotations = assemble(content, root, classes, faults, split, data.test_portion if cut else None)
    if bool(annotations.truth.ignore.all()):
        text = f"{root}: none of the {len(annotations)} {split} images has an object to find"
        if split == "train":
            raise UserError(text)
        annotations.notes.append(text)
    count = len(annotations.classes)
    if data.num_classes not in (0, count):
        names = ", ".join(annotations.classes)
        raise UserError(f"data.num_classes: {data.num_classes}, but {root} has {count} classes ({names})")
    return annotations


def split_indices(annotations: Annotations, data_portion: Sequence[float], seed: int) -> tuple[list[int], list[int]]:
    """Rows of `annotations` that train the supernet, and rows that score candidates: disjoint, in ascending order.

    The split depends on the seed and the image ids alone. Portions that sum to less than 1 leave images out. They are
    exact, except that augmented copies of one photo stay together.
    """
    count = len(annotations)
    ids = [annotations.ids[i] for i in range(count)]
    both = first_ranked(ids, seed, round(sum(data_portion) * count))
    train = first_ranked(ids, seed, round(data_portion[0] * count))
    train, search = sorted(train), sorted(both[len(train) :])
    for portion, rows in zip(data_portion, (train, search), strict=True):
        if not rows:
            raise UserError(f"data.data_portion: {portion} of {count} images rounds to zero images")
    return train, search


class SavedSplit(NamedTuple):
    train: list[str]  # image ids, which stay valid if the order of the rows changes
    search: list[str]


def save_split(path: Path, annotations: Annotations, train: Sequence[int], search: Sequence[int]) -> None:
    ids = {"train": [annotations.ids[i] for i in train], "search": [annotations.ids[i] for i in search]}
    if annotations.held_out:
        ids["test"] = list(annotations.held_out)
    write_text(path, json.dumps({"format": SPLIT_FORMAT, **ids}))


def split_digest(annotations: Annotations, train: Sequence[int], search: Sequence[int]) -> str:
    """What a supernet's checkpoint remembers of its split: SHA-256 of the ids on both sides."""
    ids = [[annotations.ids[i] for i in rows] for rows in (train, search)]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def load_split(path: Path, annotations: Annotations, digest: str = "") -> tuple[list[int], list[int]]:
    """The rows (train, search) of a saved split.

    Raises UserError if it cannot be read, names an image that `annotations` lack, or has one twice, or if its
    `split_digest` is not `digest`, that of the supernet beside it ("": unknown).
    """
    refuse_seen(path, annotations)  # the data may have changed since the split was saved
    saved = check(read_json(path, SPLIT_FORMAT), SavedSplit, str(path))
    both = [*saved.train, *saved.search]
    if not saved.train or not saved.search or len(set(both)) < len(both):
        raise UserError(f"{path}: expected images on both sides of the split, each once")
    row_of = {annotations.ids[i]: i for i in range(len(annotations))}
    for image_id in both:
        if image_id not in row_of:
            raise UserError(f"{path}: image '{image_id}' is not in the data")
    train, search = [row_of[i] for i in saved.train], [row_of[i] for i in saved.search]
    if digest not in ("", split_digest(annotations, train, search)):
        raise UserError(f"{path}: is not the split that {path.with_name('last.pt')} was trained with")
    return train, search


def refuse_seen(path: Path, annotations: Annotations) -> None:
    """Raise UserError if images that are kept for the test have trained, or chosen, what the split in `path` is of."""
    if not annotations.held_out or not path.is_file():
        return
    saved = check(read_json(path, SPLIT_FORMAT), SavedSplit, str(path))
    if common := {*saved.train, *saved.search} & set(annotations.held_out):
        raise UserError(
            f"{path}: {len(common)} images of the test set took part in the supernet's training or search, such as "
            f"'{min(common)}': data.test_portion or the data has changed since (0 keeps no images for the test)"
        )


class Batch(NamedTuple):
    """B samples; objects are padded with zeros to the largest number M in the batch."""

    images: Tensor  # (B, 3, S, S) uint8
    boxes: Tensor  # (B, M, 4) xyxy in [0, 1]
    labels: Tensor  # (B, M), 0 is padding
    index: Tensor  # (B,) rows of the annotations
    distortion: Tensor | None = None  # (B, 12) settings of `distort`, which `to` applies; None: that is done

    def to(self, device: Device) -> Batch:
        moved = Batch(*(tensor if tensor is None else tensor.to(device, non_blocking=True) for tensor in self))
        if moved.distortion is None:
            return moved
        return moved._replace(images=distort(moved.images, moved.distortion), distortion=None)


def collate(samples: Sequence[tuple]) -> Batch:
    """A batch from what DetectionDataset gives, samples with different numbers of objects, possibly none."""
    images, boxes, labels, *settings, rows = zip(*samples, strict=True)
    batch = Batch(
        images=default_collate(images),  # in a loader process straight into shared memory
        boxes=pad_sequence(boxes, batch_first=True),
        labels=pad_sequence(labels, batch_first=True),
        index=torch.tensor(rows),
        distortion=torch.stack(settings[0]) if settings else None,
    )
    if get_worker_info() is not None:
        # It would be done anyway, but later, where nobody hears of a failure.
        for tensor in filter(torch.is_tensor, batch):
            tensor.share_memory_()
    return batch


class PictureCache:
    """The decoded pictures of some rows, the first that fit into CACHE_BYTES, in memory that loader processes share.

    It has no name in /dev/shm, which may be small, so only forked processes share it; a spawned one has its own.
    """

    def __init__(self, sizes: Tensor, rows: Tensor) -> None:
        self.sizes, self.rows = sizes, rows
        ends = (3 * sizes[rows].prod(1)).cumsum(0)
        kept = int((ends <= CACHE_BYTES).sum())
        self.end_of = dict(zip(rows[:kept].tolist(), ends[:kept].tolist(), strict=True))
        memory = mmap.mmap(-1, max(self.end_of.values(), default=1))  # not occupied until written
        self.pixels = torch.frombuffer(memory, dtype=torch.uint8)
        self.known = torch.zeros(len(sizes), dtype=torch.bool).share_memory_()

    def __reduce__(self) -> tuple:
        return PictureCache, (self.sizes, self.rows)

    def get(self, row: int, read: Callable[[int], Tensor]) -> Tensor:
        """The picture (3, H, W) of a row; `read` decodes it where no process has done so."""
        if row not in self.end_of:
            return read(row)
        end = self.end_of[row]
        width, height = self.sizes[row].tolist()
        picture = self.pixels[end - 3 * width * height : end].view(3, height, width)
        if not self.known[row]:
            picture.copy_(read(row))
            self.known[row] = True  # last, since other processes look
        return picture


class DetectionDataset(Dataset):
    """Pictures of some rows of `annotations`, transformed. Ignored objects are left out.

    A key is (epoch, row), or (epoch, row, size) for another image size than the transform's. The sample depends on the
    seed and the key alone, whichever process computes it.

    Under `data.on_error: skip`, a picture that cannot be read is logged once. In training, the next readable row takes
    its place. In evaluation, it is black, so its objects count as missed.

    With `data.cache`, training keeps decoded pictures in a `PictureCache`. Without it, a large JPEG is decoded at
    1/2, 1/4 or 1/8 of its size if the view that the sample shows has enough pixels left.
    """

    def __init__(
        self, annotations: Annotations, indices: Sequence[int], transform: Transform, data: DataConfig, seed: int = 0
    ) -> None:
        self.annotations = annotations
        self.indices = torch.as_tensor(indices, dtype=torch.int64).share_memory_()
        self.transform = transform
        self.data = data
        self.seed = seed
        self.training = isinstance(transform, TrainTransform)
        self.cache = PictureCache(annotations.sizes, self.indices) if self.training and data.cache else None
        # Whether (N, 2) a note and a fault of each picture have been logged: by any process, in any dataset of these.
        nothing = torch.zeros(len(annotations), 2, dtype=torch.bool)
        self.logged = vars(annotations).setdefault("logged", nothing.share_memory_())

    def __getitem__(self, key: tuple[int, ...]) -> tuple:
        """What the transform gives, and the row that is shown."""
        epoch, row, *image_size = key
        shown = row
        with torch.random.fork_rng(devices=[]):
            while True:
                # torch.manual_seed would also seed the GPU's generator, which is not restored here.
                torch.default_generator.manual_seed(_seed_from(self.seed, epoch, row))
                try:
                    return *self._sample(shown, *image_size), shown
                except UnreadableImage as error:
                    self._skip(shown, error)
                if not self.training:
                    width, height = self.annotations.sizes[row].tolist()
                    black = torch.zeros(3, height, width, dtype=torch.uint8)
                    return *self.transform(black, *self._objects(row)), row
                # The next row of the training set, after the last one the first.
                position = int((self.indices == shown).nonzero()[0])
                shown = int(self.indices[(position + 1) % len(self.indices)])

    def _sample(self, row: int, image_size: int | None = None) -> tuple[Tensor, ...]:
        boxes, labels = self._objects(row)
        if not self.training:
            return self.transform(self.read_image(row), boxes, labels)
        size = image_size or self.transform.image_size
        width, height = self.annotations.sizes[row].tolist()
        view, boxes, labels = self.transform.choose(width, height, boxes, labels)
        # The view is known before the pixels are, so a large JPEG is decoded no larger than its view needs.
        reduces = self.cache is None and width * height >= LARGE_PICTURE
        image = self._read(row, reduction(view, size)) if reduces else self.read_image(row)
        view, boxes = scale_view(view, boxes, image.shape[2] / width, image.shape[1] / height)
        return self.transform.render(image, view, boxes, labels, size)

    def read_image(self, row: int) -> Tensor:
        """The picture (3, H, W) uint8 of a row, from the cache if it is there. Raises UnreadableImage."""
        return self.cache.get(row, self._read) if self.cache else self._read(row)

    def _read(self, row: int, reduction: int = 1) -> Tensor:
        return read_picture(
            self.annotations.paths[row],
            tuple(self.annotations.sizes[row].tolist()),
            reduction=reduction,
            max_pixels=self.data.max_pixels,
            note=partial(self._log_once, row, 0),
        )

    def _log_once(self, row: int, kind: int, message: str) -> None:
        if not self.logged[row, kind]:
            self.logged[row, kind] = True
            logger.warning("%s", message)

    def _objects(self, row: int) -> tuple[Tensor, Tensor]:
        target = self.annotations.objects.of(row)
        return target["boxes"][~target["ignore"]], target["labels"][~target["ignore"]]

    def _skip(self, row: int, error: UnreadableImage) -> None:
        """Note that a picture cannot be read. Raises if none may be left out, or not so many."""
        if self.data.on_error == "raise":
            raise error
        self._log_once(row, 1, f"{error}; skipped")
        lost, count = int(self.logged[self.indices, 1].sum()), len(self.indices)
        if lost == count or lost > self.data.max_skipped * count:
            limit = f"data.max_skipped={self.data.max_skipped:g}"
            raise UnreadableImage(f"{error}; so far {lost} of {count} pictures ({limit})") from None


class EpochSampler:
    """Batches of (epoch, row) in an order that depends on (seed, epoch); call `set_epoch` before each epoch.

    All ranks together have the batches that a single process with `world.size` times the batch size would have. The
    last rows, which fill no batch, are left out. If the set is smaller than one batch, it gives one batch, and the
    first rows repeat so that every rank has the same number.

    `image_size` may be set to a function of the batch's number in its epoch: the size of that batch's pictures.
    """

    image_size: Callable[[int], int] | None = None

    def __init__(self, indices: Sequence[int], batch_size: int, seed: int, world: distributed.World) -> None:
        count = len(indices)
        self.indices = torch.as_tensor(indices, dtype=torch.int64)
        self.batch_size = batch_size
        self.seed = seed
        self.world = world
        self.batches_per_epoch = max(1, count // (batch_size * world.size))
        # BatchNorm needs two images, so that a single picture counts twice.
        self.per_rank = min(self.batches_per_epoch * batch_size, max(2, -(-count // world.size)))
        self.set_epoch(1)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Iterate over `epoch` next, without its first `start_batch` batches."""
        self.epoch = epoch
        self.start_batch = start_batch

    def __len__(self) -> int:
        """Batches left in this epoch."""
        return max(self.batches_per_epoch - self.start_batch, 0)

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        generator = torch.Generator().manual_seed(_seed_from(self.seed, self.epoch))
        order = self.indices[torch.randperm(len(self.indices), generator=generator)]
        # Every n-th row is this rank's, so batch k of all ranks together is batch k of a single process.
        positions = torch.arange(self.world.rank, self.per_rank * self.world.size, self.world.size) % len(order)
        batches = order[positions].split(self.batch_size)
        for number in range(self.start_batch, len(batches)):
            size = (self.image_size(number),) if self.image_size else ()
            yield [(self.epoch, row, *size) for row in batches[number].tolist()]


def _seed_from(*numbers: int) -> int:
    """A seed of 56 bits for a random generator."""
    digest = hashlib.sha256("-".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:7], "big")


def train_loader(
    annotations: Annotations, indices: Sequence[int], image_size: int, batch_size: int, config: Config, device: Device
) -> DataLoader:
    """Batches augmented as `config.data` says; call `loader.batch_sampler.set_epoch` before each epoch.

    `batch_size` counts the images of all processes of the job, which share every batch equally. For a GPU, colours are
    distorted there: that is most of a loader's time.
    """
    data, world = config.data, distributed.world()
    transform = TrainTransform(image_size, data.augment, distort_later=torch.device(device).type != "cpu")
    dataset = DetectionDataset(annotations, indices, transform, data, config.seed)
    sampler = EpochSampler(indices, batch_size // world.size, config.seed, world)
    return make_loader(dataset, sampler, data.workers, device)


def eval_loader(
    annotations: Annotations,
    indices: Sequence[int],
    image_size: int,
    batch_size: int,
    data: DataConfig,
    device: Device = "cpu",
    shared: bool = False,
) -> DataLoader:
    """Resized pictures in the order of `indices`, each once; the last batch may be smaller.

    With `shared`, the processes of the job share the batches: every n-th one is for this process.
    """
    dataset = DetectionDataset(annotations, indices, EvalTransform(image_size), data)
    keys = [(0, int(row)) for row in indices]  # the epoch is always 0: nothing is random here
    batches = [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]
    return make_loader(dataset, distributed.deal(batches) if shared else batches, data.workers, device)


class _Loader(DataLoader):
    """Whatever the death of a loader process breaks first, the error says that the process is dead."""

    def __iter__(self) -> Iterator[Batch]:
        try:
            yield from super().__iter__()
        except Exception as error:
            # Collected later, together with the error's traceback, it would wait 10 s for its processes.
            if self._iterator is not None:
                self._iterator._shutdown_workers()
                self._iterator = None
            # Not of the pictures: a batch was to be fetched from a process that is gone.
            lost = isinstance(error, (ConnectionError, EOFError, FileNotFoundError))
            if lost and not getattr(error, "filename", None) and "in DataLoader worker" not in str(error):
                raise RuntimeError(f"DataLoader worker (pid unknown) exited unexpectedly: {error!r}") from None
            raise


def make_loader(dataset: Dataset, batches: Iterable, workers: int | str, device: Device) -> DataLoader:
    """A loader of Batches; `batches` are lists of keys, as DetectionDataset takes them. `workers` may be "auto"."""
    if workers == "auto":
        # torchrun says how many processes share this machine.
        cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = 1 if torch.device(device).type == "cpu" else min(max(1, cores - 1), MOST_WORKERS)
    return _Loader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.device(device).type == "cuda",
        persistent_workers=workers > 0,
        worker_init_fn=start_loader_process,
        # Without its own generator, each epoch draws from the global one, which a resumed epoch would do twice.
        generator=torch.Generator(),
    )
