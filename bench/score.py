"""A candidate's score, timed without the re-estimation of its BatchNorm statistics."""

from __future__ import annotations

from collections.abc import Iterable
from unittest import mock

import torch
from torch import Tensor, nn

from bench.reference import CPU, random_batch
from bench.turns import Clock
from lib import scoring
from lib.config import Config
from lib.detector import ElasticSSD
from lib.genotype import Genotype


def scoring_data(images: int, bn_images: int, objects: int, num_classes: int, size: int = 300) -> dict:
    """What `prepare_scoring_data` gives, of random pictures with random objects."""
    batch = random_batch(bn_images + images, size, objects, num_classes)
    ignore = torch.zeros(objects, dtype=torch.bool)
    return {
        "bn_images": batch.images[:bn_images],
        "images": batch.images[bn_images:],
        "truth": [
            {"boxes": size * boxes, "labels": labels, "ignore": ignore}
            for boxes, labels in zip(batch.boxes[bn_images:], batch.labels[bn_images:], strict=True)
        ],
        "sizes": [[size, size]] * images,
        "classes": [f"class {i + 1}" for i in range(num_classes)],
    }


class TimedScore:
    """`score(genotype)` gives the seconds of a race that nobody stops, those of `recalibrate` taken off."""

    def __init__(self, data: dict, settings: Config, detector: ElasticSSD, clock: Clock):
        self.scorer, self.detector, self.clock = scoring.Scorer(data, settings, CPU), detector, clock

    def __call__(self, genotype: Genotype) -> float:
        apart = 0.0

        def recalibrate(model: nn.Module, images: Iterable[Tensor], device: torch.device) -> None:
            nonlocal apart
            start = self.clock()
            original(model, images, device)
            apart += self.clock() - start

        original = scoring.recalibrate
        with mock.patch.object(scoring, "recalibrate", recalibrate):
            start = self.clock()
            self.metrics = self.scorer.race(self.detector, genotype)["metrics"]
            return self.clock() - start - apart
