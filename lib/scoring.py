"""Paired bootstrap over images: what a difference of two scores is worth on so few pictures (Efron, 1979).

Every candidate is scored on the same resamples of the same images, so the differences of two candidates' scores are
free of what makes a picture hard for both of them.

Racing: a candidate is scored on ever more of the images, and stopped once it clearly loses to its rivals.

After each rung its scores on the resamples of the images so far are compared with those that each rival got there, the
same resamples of the same images (Maron & Moore, NeurIPS 1993, with a paired bootstrap interval for their bound).

Scores of sub-networks with inherited weights: on the search split, after BatchNorm is re-estimated.

The pictures are decoded and resized once, into one file that every process of a machine maps into its memory.
"""

from __future__ import annotations

import base64
import functools
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lib import checkpoint
from lib.annotations import Annotations
from lib.config import Config
from lib.config_io import from_dict as config_from_dict
from lib.datasets import eval_loader
from lib.detector import SSD, ElasticSSD, detect, fuse_, load_supernet, recalibrate
from lib.errors import UserError
from lib.genotype import Genotype
from lib.log import finite, progress
from lib.metrics import Evaluation, summarise, to_pixels
from lib.postprocess import Detections
from lib.runtime import keep_freed_memory

CONFIDENCE = 0.95
_SCALE = 65534  # scores are in [0, 1], kept to 1.5e-5; the number above stands for nan


class Interval(NamedTuple):
    """Where `CONFIDENCE` of the resamples lie, equal shares left out on both sides."""

    low: float
    high: float


@functools.lru_cache(maxsize=3)  # the rungs of a race
def image_weights(num_images: int, resamples: int) -> np.ndarray:
    """(R, N) how often each image stands in each resample. Always the same for the same two numbers; read only."""
    rng = np.random.default_rng([num_images, resamples])
    weights = rng.multinomial(num_images, np.full(num_images, 1 / num_images), size=resamples)
    weights.flags.writeable = False
    return weights


def interval(scores: np.ndarray) -> Interval:
    """Of the scores, or of the differences of two candidates' scores, on all resamples (R,); nan is left out."""
    outside = (1 - CONFIDENCE) / 2
    if np.isnan(scores).all():
        return Interval(float("nan"), float("nan"))
    return Interval(*(float(q) for q in np.nanquantile(scores, [outside, 1 - outside])))


def clearly_below(scores: np.ndarray, others: np.ndarray) -> bool:
    """Whether the whole interval of the paired difference lies below zero."""
    return interval(scores - others).high < 0


def pack(scores: np.ndarray) -> str:
    """Scores in [0, 1] or nan as text for a ledger, 2.7 characters each, to 1.5e-5."""
    whole = np.where(np.isnan(scores), _SCALE + 1, np.rint(np.nan_to_num(scores) * _SCALE))
    return base64.b64encode(whole.astype("<u2").tobytes()).decode()


def unpack(text: str) -> np.ndarray:
    """What `pack` was given."""
    whole = np.frombuffer(base64.b64decode(text), "<u2")
    return np.where(whole > _SCALE, np.nan, whole / _SCALE)


SHARES = (0.25, 0.5)  # of the images, at which a candidate may be stopped
LEAST_IMAGES = 12  # resamples of fewer say little, and a batch of few takes longer than the few stopped there save
Scores = Mapping[str, str]  # packed scores on the resamples, by the number of images


def rungs(num_images: int) -> list[int]:
    """Numbers of images, ascending, after which a candidate is compared; the last one is all of them."""
    early = {round(share * num_images) for share in SHARES}
    return [*sorted(n for n in early if LEAST_IMAGES <= n < num_images), num_images]


def has_lost(scores: np.ndarray, num_images: int, rivals: Sequence[Scores]) -> bool:
    """Whether `scores` (R,) on resamples of the first `num_images` are clearly below those of every rival."""
    theirs = [rival.get(str(num_images)) for rival in rivals]
    return bool(theirs) and all(packed is not None and clearly_below(scores, unpack(packed)) for packed in theirs)


SCORING_VERSION = 2  # of how scores come about: those of another version are not compared with these


def prepare_scoring_data(annotations: Annotations, train: Sequence[int], search: Sequence[int], config: Config) -> dict:
    """Pictures as uint8 (N, 3, S, S), S the largest image size of the space, and the search split's ground truth.

    The search split is put into a random order, always the same; `search.images` of them are taken.
    BatchNorm is re-estimated on the first `search.bn_images` of the training split, so no score sees its own pictures.
    """
    search = list(search)
    random.Random(0).shuffle(search)  # so that the first few are like the rest
    search = search[: config.search.images] if config.search.images else search
    if all(bool(target["ignore"].all()) for target in annotations.ground_truth(search)):
        raise UserError(f"data.data_portion: none of the {len(search)} images that score candidates has an object")
    size = max(config.search_space.image_size_choice)
    return {
        "bn_images": _pictures(annotations, train[: config.search.bn_images], size, config),
        "images": _pictures(annotations, search, size, config),
        "truth": annotations.ground_truth(search),
        "sizes": annotations.sizes[torch.as_tensor(search)].tolist(),
        "classes": list(annotations.classes),
    }


def _pictures(annotations: Annotations, indices: Sequence[int], size: int, config: Config) -> Tensor:
    pictures = torch.empty(len(indices), 3, size, size, dtype=torch.uint8)
    loader = eval_loader(annotations, indices, size, 32, workers=config.data.workers, on_error=config.data.on_error)
    done = 0
    for batch in progress(loader, "decode"):
        pictures[done : done + len(batch.images)] = batch.images
        done += len(batch.images)
    return pictures


def save_scoring_data(data: dict, path: Path) -> None:
    """The ground truth becomes a few tensors: one for each image would cost every worker memory of its own."""
    counts = [len(target["labels"]) for target in data["truth"]]
    truth = {name: torch.cat([target[name] for target in data["truth"]]) for name in data["truth"][0]}
    checkpoint.save(
        path, {**data, "truth": truth, "counts": torch.tensor(counts), "sizes": torch.tensor(data["sizes"])}
    )


def load_scoring_data(path: Path) -> dict:
    """As it was saved, without what would cost memory: the ground truth of an image is made when it is asked for."""
    data = checkpoint.read(path, mmap=True)
    data["truth"] = Truth(data["truth"], data.pop("counts"))
    return data


class Truth(Sequence):
    """The ground truth of N images, as the metrics take it: views of tensors over all objects."""

    def __init__(self, columns: dict[str, Tensor], counts: Tensor):
        self._columns = columns
        self._offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0)))

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, i: int | slice) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        if isinstance(i, slice):
            return [self[k] for k in range(len(self))[i]]
        start, end = self._offsets[range(len(self))[i]], self._offsets[range(len(self))[i] + 1]
        return {name: column[start:end] for name, column in self._columns.items()}


class Scorer:
    """`scorer(detector, genotype)` gives the metrics of one sub-network of `detector` on the search split.

    A sub-network is extracted, its BatchNorm re-estimated and folded into its convolutions. The batch size is halved
    where the device has no room for it.
    """

    def __init__(self, data: dict, config: Config, device: torch.device):
        self.data, self.config, self.device = data, config, device
        self.num_images = len(data["images"])
        self._batch_size = config.search.batch_size

    def __call__(self, detector: ElasticSSD, genotype: Genotype) -> dict:
        """COCO's twelve numbers, mAP, per class AP, flops, params."""
        evaluation = Evaluation(len(self.data["classes"]))
        self._evaluate(self._prepare(detector, genotype), evaluation, self.num_images)
        return self._summarise(evaluation, detector, genotype)

    def race(self, detector: ElasticSSD, genotype: Genotype, rivals: Sequence[Scores] = ()) -> dict:
        """The same "metrics", of the first "images" only if the candidate lost to its rivals there ("lost").

        "resampled" has its "objective" on `search.resamples` resamples of the images, packed, at each rung.
        """
        model, evaluation = self._prepare(detector, genotype), Evaluation(len(self.data["classes"]))
        objective, resamples = self.config.search.objective, self.config.search.resamples
        scores: dict[str, str] = {}
        lost = False
        for rung in rungs(self.num_images) if resamples else [self.num_images]:
            self._evaluate(model, evaluation, rung)
            if resamples:
                drawn = evaluation.resampled(objective, image_weights(rung, resamples))
                scores[str(rung)] = pack(drawn)
                lost = rung < self.num_images and has_lost(drawn, rung, rivals)
            if lost:
                break
        metrics = self._summarise(evaluation, detector, genotype)
        judged = {"objective": objective, "resampled": scores} if scores else {}
        return {"metrics": metrics, "images": evaluation.num_images, "lost": lost, **judged}

    def _prepare(self, detector: ElasticSSD, genotype: Genotype) -> SSD:
        model = detector.extract(genotype).to(self.device, memory_format=torch.channels_last)
        bn_images, size = self.data["bn_images"], self.config.search.batch_size
        whole = max(len(bn_images) // size, 1) * size  # a small last batch would count as much as the others
        recalibrate(model, bn_images[:whole].split(size), self.device)
        return fuse_(model)

    def _evaluate(self, model: SSD, evaluation: Evaluation, end: int) -> None:
        """Detect in the images from where `evaluation` is up to `end`."""
        new = slice(evaluation.num_images, end)
        found = self._detect(model, self.data["images"][new])
        pixels = [to_pixels(d, *size) for d, size in zip(found, self.data["sizes"][new], strict=True)]
        evaluation.add(self.data["truth"][new], pixels)

    def _detect(self, model: SSD, images: Tensor) -> list[Detections]:
        while True:
            try:
                return detect(model, images.split(self._batch_size), self.config, self.device)
            except torch.cuda.OutOfMemoryError:
                if self._batch_size == 1:
                    raise
                self._batch_size //= 2
                torch.cuda.empty_cache()

    def _summarise(self, evaluation: Evaluation, detector: ElasticSSD, genotype: Genotype) -> dict:
        return {**summarise(evaluation, self.data["classes"]), **detector.cost(genotype)._asdict()}


def scoring_worker(device: str, supernet: str, data: str, settings: dict):
    """What a worker process of the search does: set up on `device`, then jobs in, what `Scorer.race` gives out.

    A job: {"genotype": Genotype.to_dict(), "rivals": a list of the "resampled" scores of other candidates}.
    """
    keep_freed_memory()
    detector = load_supernet(Path(supernet), mmap=True).detector
    scorer = Scorer(load_scoring_data(Path(data)), config_from_dict(settings), torch.device(device))

    def score(job: dict) -> dict:
        result = scorer.race(detector, Genotype.from_dict(job["genotype"]), job["rivals"])
        del result["metrics"]["per_class"]
        return {**result, "metrics": finite(result["metrics"])}

    return score
