"""How long a stage will take, from some seconds of its own work on the user's device with the user's pictures."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch.utils.data import DataLoader

from lib import distributed
from lib.config import Config, TrainConfig
from lib.datasets import Batch, collate, eval_loader
from lib.detector import SSD, ElasticSSD
from lib.engine import Losses, Trainer, detect, detection_loss
from lib.final_training import detection_losses
from lib.genotype import Genotype
from lib.records import Records
from lib.runlog import progress
from lib.schedule import value_at
from lib.scoring import Scorer, prepare_scoring_data

SECONDS = 20.0  # that all measurements take, about
SAMPLE = 64  # pictures on which a score is measured, on each side
TRAINING_SHARE, LOADING_SHARE, SCORING_SHARE = 0.5, 0.15, 0.35

Forward = Callable[[Batch], Iterator[Losses]]


def typical_seconds(work: Callable[[], object], budget: float) -> float:
    """Median time of `work` after a first call, repeated for `budget` seconds, 3 to 9 times.

    In a job of several processes all repeat it equally often.
    """
    work()
    taken: list[float] = []
    while distributed.any_of(len(taken) < 3 or (sum(taken) < budget and len(taken) < 9)):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def training_seconds(
    model: torch.nn.Module,
    settings: TrainConfig,
    device: torch.device,
    loader: DataLoader,
    phases: Sequence[tuple[int, Forward]],
) -> float:
    """Seconds of a whole training without its evaluations: `phases` are (epochs, the losses of a batch).

    A step and its pictures are measured apart; with workers the slower of the two decides, else both add up. The
    weights of `model` change.
    """
    steps = loader.batch_sampler.batches_per_epoch
    trainer = Trainer(model, settings, device, steps)
    trainer.model.train()
    dataset, keys = loader.dataset, next(iter(loader.batch_sampler))
    loading = typical_seconds(lambda: collate([dataset[key] for key in keys]), LOADING_SHARE * SECONDS)
    batch = collate([dataset[key] for key in keys]).to(device)
    seconds = 0.0
    for epochs, forward in progress(phases, "measure training"):
        share = TRAINING_SHARE * SECONDS / len(phases)
        step = typical_seconds(lambda forward=forward: trainer.update(forward(batch)), share)
        workers = loader.num_workers
        seconds += epochs * steps * (max(step, loading / workers) if workers else step + loading)
    return seconds


def scoring_seconds(
    detector: ElasticSSD,
    genotypes: Sequence[Genotype],
    records: Records,
    train: Sequence[int],
    search: Sequence[int],
    config: Config,
    device: torch.device,
) -> float:
    """Seconds of scoring one candidate, the mean over `genotypes`, from at most `SAMPLE` pictures on each side."""
    settings = config.search
    images = min(settings.images or len(search), len(search))
    part = replace(settings, bn_images=min(settings.bn_images, SAMPLE), images=min(images, SAMPLE))
    scorer = Scorer(prepare_scoring_data(records, train, search, replace(config, search=part)), config, device)
    budget = SCORING_SHARE * SECONDS / len(genotypes)
    measured = [
        typical_seconds(lambda g=g: scorer.race(detector, g), budget) for g in progress(genotypes, "measure scoring")
    ]
    whole = min(settings.bn_images, len(train)) + images
    return statistics.mean(measured) * whole / (part.bn_images + part.images)


def final_seconds(
    model: SSD, config: Config, device: torch.device, loader: DataLoader, teacher: SSD | None = None
) -> float:
    """Seconds of the training of one detector, without its evaluations."""
    settings, loss = config.final, detection_loss(config)
    weight = value_at(settings.distill.weight, settings.epochs) if teacher is not None else 0.0

    def forward(batch: Batch) -> Iterator[Losses]:
        return detection_losses(model, loss, batch, settings.distill, weight, teacher)

    return training_seconds(model, settings, device, loader, [(settings.epochs, forward)])


def detecting_seconds(model: SSD, test: Records, config: Config, device: torch.device) -> float:
    """Seconds of one evaluation on all of `test`, from at most `SAMPLE` of its pictures."""
    some = range(min(SAMPLE, len(test)))
    loader = eval_loader(test, some, model.image_size, config.final.batch_size, on_error=config.data.on_error)
    budget = SCORING_SHARE * SECONDS
    seconds = typical_seconds(lambda: [detect(model, [batch.images], config, device) for batch in loader], budget)
    return seconds * len(test) / len(some)
