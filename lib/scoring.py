"""Scores of sub-networks with inherited weights on the search split, and what a difference of two scores is worth.

The pictures are decoded and resized once, into one file that every process of a machine maps into its memory. Each
candidate is scored on the same resamples of the same images (paired bootstrap: Efron, 1979), so the difference of two
candidates' scores does not contain what makes a picture hard for both.
"""

import base64
import functools
import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from lib import UserError, checkpoint
from lib.annotations import Annotations
from lib.config import Config
from lib.config_io import from_dict as config_from_dict
from lib.config_io import to_dict
from lib.datasets import eval_loader
from lib.detector import ElasticSSD, detect, fuse, load_supernet, recalibrate
from lib.elastic import to_device
from lib.genotype import Genotype
from lib.log import finite, progress
from lib.metrics import Evaluation, to_pixels
from lib.runtime import pick_device, prepare_process

T = TypeVar("T")
SCORING_VERSION = 3  # raised when scores change: scores of different versions are never compared
CONFIDENCE = 0.95
# What no score depends on: every other key of the configuration is part of what a score rests on, so a new key is too.
# Seed and data count by the pictures and annotations that they lead to, what trained the supernet by its weights.
UNSCORED = """
    name seed supernet final search_space.schedule_cfg backbone.pretrained_path backbone.pretrained_head
    data.dataset_type data.root data.train_sets data.test_sets data.train_annotations data.train_images
    data.test_annotations data.test_images data.test_portion data.classes data.num_classes data.data_portion
    data.max_skipped data.augment data.workers data.cache data.shapes_train data.shapes_test
    loss.alpha loss.gamma loss.neg_pos_ratio loss.matched_threshold loss.unmatched_threshold loss.loc_coef
    search.controller search.num_epochs search.steps search.population_size search.tournament_size
    search.mutation_probability search.crossover_probability search.objective search.costs search.resamples
    search.min_flops search.max_flops search.min_params search.max_params search.min_latency_ms search.max_latency_ms
    search.latency_table search.latency_threads search.parallelism search.gpu_ids search.time_limit
    search.first_time_limit
"""
_SCALE = 65534  # scores in [0, 1] are stored in steps of 1.5e-5; the number above stands for nan


@functools.lru_cache(maxsize=1)
def image_weights(num_images: int, resamples: int) -> np.ndarray:
    """(R, N) how often each image occurs in each resample, always the same for the same two numbers."""
    rng = np.random.default_rng([num_images, resamples])
    return rng.multinomial(num_images, np.full(num_images, 1 / num_images), size=resamples)


def interval(scores: np.ndarray) -> tuple[float, float]:
    """The range that holds `CONFIDENCE` of the scores on all resamples (R,), or of differences of two candidates'.

    Equal shares are outside on both sides; nan is left out.
    """
    outside = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(scores, [outside, 1 - outside]).tolist()
    return low, high


def pack(scores: np.ndarray) -> str:
    """Scores in [0, 1] or nan as text for a ledger, 2.7 characters each, to 1.5e-5."""
    steps = np.where(np.isnan(scores), _SCALE + 1, np.rint(np.nan_to_num(scores) * _SCALE))
    return base64.b64encode(steps.astype("<u2").tobytes()).decode()


def unpack(text: str) -> np.ndarray:
    """The scores that `pack` wrote."""
    steps = np.frombuffer(base64.b64decode(text), "<u2")
    return np.where(steps > _SCALE, np.nan, steps / _SCALE)


def scored_rows(search: Sequence[int], config: Config) -> list[int]:
    """The first `search.images` of the search split, in an order that is always the same and that of no name."""
    shuffled = list(search)
    random.Random(0).shuffle(shuffled)
    return shuffled[: config.search.images or None]


def calibration_rows(train: Sequence[int], config: Config) -> list[int]:
    """A random sample of `search.bn_images` training images, to re-estimate BatchNorm or to calibrate quantisation."""
    # A sample, since the first ones by name may be alike.
    count = min(config.search.bn_images, len(train))
    if count < 2:
        raise UserError(f"search.bn_images: BatchNorm needs at least 2 training images, found {count}")
    return random.Random(config.seed).sample(train, count)


def whole_batches(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Without a smaller last one, which would count as much as the others in a cumulative average."""
    size = 0
    for batch in batches:
        size = size or len(batch)
        if len(batch) == size:
            yield batch


def rests_on(
    weights: str, annotations: Annotations, train: Sequence[int], search: Sequence[int], config: Config
) -> dict[str, str]:
    """Hashes (hex), by name, of all that scores of a supernet whose file has the SHA-256 `weights` depend on."""
    scored = scored_rows(search, config)
    truth = hashlib.sha256(json.dumps(annotations.classes).encode())
    pictures = hashlib.sha256()
    for row in scored:
        for tensor in (annotations.sizes[row], *annotations.truth.of(row).values()):
            truth.update(tensor.numpy().tobytes())
    for row in (*scored, *calibration_rows(train, config)):
        path = Path(annotations.paths[row])
        # Whether a missing picture is an error is decided when the pictures are read.
        pictures.update(hashlib.sha256(path.read_bytes()).digest() if path.is_file() else b"missing")
    settings = to_dict(config)
    for key in UNSCORED.split():
        *sections, name = key.split(".")
        del functools.reduce(dict.__getitem__, sections, settings)[name]
    return {
        "weights": weights,
        "annotations": truth.hexdigest(),
        "pictures": pictures.hexdigest(),
        "settings": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        "scoring": str(SCORING_VERSION),
    }


def prepare_scoring_data(annotations: Annotations, train: Sequence[int], search: Sequence[int], config: Config) -> dict:
    """Pictures as uint8 (N, 3, S, S) for each image size S of the space, and the search split's ground truth.

    Each size is resized from the picture itself, as a detector of that size sees it.
    BatchNorm is re-estimated on images of the training split, so no score sees its own pictures.
    """
    search = scored_rows(search, config)
    if all(bool(target["ignore"].all()) for target in annotations.ground_truth(search)):
        raise UserError(f"data.data_portion: none of the {len(search)} images that score candidates has an object")
    calibration, sizes = calibration_rows(train, config), config.search_space.image_size_choice
    return {
        "bn_images": {size: _pictures(annotations, calibration, size, config) for size in sizes},
        "images": {size: _pictures(annotations, search, size, config) for size in sizes},
        "truth": annotations.ground_truth(search),
        "sizes": annotations.sizes[torch.as_tensor(search)].tolist(),
        "classes": list(annotations.classes),
    }


def _pictures(annotations: Annotations, indices: Sequence[int], size: int, config: Config) -> Tensor:
    pictures = torch.empty(len(indices), 3, size, size, dtype=torch.uint8)
    loader = eval_loader(annotations, indices, size, 32, config.data)
    done = 0
    for batch in progress(loader, f"decode at {size} px"):
        pictures[done : done + len(batch.images)] = batch.images
        done += len(batch.images)
    return pictures


def save_scoring_data(data: dict, path: Path) -> None:
    """The ground truth becomes a few tensors: one for each image would cost every worker memory of its own."""
    counts = torch.tensor([len(target["labels"]) for target in data["truth"]])
    columns = {name: torch.cat([target[name] for target in data["truth"]]) for name in data["truth"][0]}
    checkpoint.save(path, {**data, "truth": columns, "counts": counts, "sizes": torch.tensor(data["sizes"])})


def load_scoring_data(path: Path) -> dict:
    """The data as it was saved, mapped into memory; the ground truth of an image is views of the whole's tensors."""
    data = checkpoint.read(path, mmap=True)
    counts = data.pop("counts").tolist()
    columns = {name: column.split(counts) for name, column in data["truth"].items()}
    data["truth"] = [dict(zip(columns, image, strict=True)) for image in zip(*columns.values(), strict=True)]
    return data


class Scorer:
    """`scorer(detector, genotype)` scores one sub-network of `detector` on the search split.

    The sub-network is extracted, its BatchNorm statistics are re-estimated and folded into its convolutions, on
    `device`: a detector that is there already is not copied. The batch size is halved if its memory does not suffice.
    """

    def __init__(self, data: dict, config: Config, device: torch.device):
        self.data = data
        self.config = config
        self.device = device
        self.num_images = len(data["truth"])

    def __call__(self, detector: ElasticSSD, genotype: Genotype) -> dict:
        """The "metrics" (COCO's twelve numbers, mAP, AP per class, flops, params) and the number of "images".

        With `search.resamples` also {"objective": name, "resampled": {"<images>": its packed scores on resamples}}.
        """
        settings = self.config.search
        model = to_device(detector.extract(genotype), self.device)
        bn_images, images = (self.data[name][genotype.image_size] for name in ("bn_images", "images"))
        # One image has no variance.
        self._fitting(lambda size: recalibrate(model, whole_batches(bn_images.split(max(size, 2))), self.device))
        if not torch.stack([buffer.double().sum() for buffer in model.buffers()]).isfinite().all():
            raise ArithmeticError("its BatchNorm statistics are not finite")
        fused = fuse(model, inplace=True)
        detections = self._fitting(lambda size: detect(fused, images.split(size), self.config, self.device))
        pixels = [to_pixels(found, *size) for found, size in zip(detections, self.data["sizes"], strict=True)]
        evaluation = Evaluation(len(self.data["classes"]), self.data["truth"], pixels)
        metrics = {**evaluation.summary(self.data["classes"]), **detector.cost(genotype)._asdict()}
        result = {"metrics": metrics, "images": self.num_images}
        # Resampling reuses the matches of the evaluation, so it costs little beside the detection.
        if settings.resamples:
            scores = evaluation.resampled(settings.objective, image_weights(self.num_images, settings.resamples))
            result |= {"objective": settings.objective, "resampled": {str(self.num_images): pack(scores)}}
        return result

    def _fitting(self, work: Callable[[int], T]) -> T:
        """`work(batch_size)` with the configured batch size, halved as long as the device runs out of memory."""
        # Each candidate starts from the whole size, so that no score depends on what was scored before.
        size = self.config.search.batch_size
        while True:
            try:
                return work(size)
            except torch.cuda.OutOfMemoryError:
                if size == 1:
                    raise
            size //= 2
            torch.cuda.empty_cache()


def scoring_worker(device: str, supernet: str, sha256: str, data: str, settings: dict):
    """Set up a worker process of the search on `device`; returns what it does with a job.

    Raises UserError if the file `supernet` has not the hash with which the search began: its ledger holds scores of one
    network only.

    A job is {"genotype": Genotype.to_dict()}, its result what `Scorer` gives, without the AP of each class.
    """
    prepare_process()
    place = pick_device(device)
    detector = load_supernet(Path(supernet), mmap=True).detector.to(place)
    if checkpoint.sha256(Path(supernet)) != sha256:
        raise UserError(
            f"{supernet}: has changed since the search began; what was scored is in the ledger: put that file back and "
            "--resume, or search the new one in another folder (--train-dir)"
        )
    scorer = Scorer(load_scoring_data(Path(data)), config_from_dict(settings), place)

    def score(job: dict) -> dict:
        result = scorer(detector, Genotype.from_dict(job["genotype"]))
        del result["metrics"]["per_class"]
        return {**result, "metrics": finite(result["metrics"])}

    return score
