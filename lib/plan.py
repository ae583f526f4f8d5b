"""What a command is about to do, in lines for --dry-run and for the head of each run.

What the data holds, said before training: counts, dropped boxes, and objects that no prior box covers.

How long a stage will take, from some seconds of its own work on the user's device with the user's pictures.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.ops import box_convert, box_iou

from lib import distributed
from lib.annotations import Annotations
from lib.config import Config, TrainConfig
from lib.datasets import Batch, collate, eval_loader
from lib.detector import SSD, ElasticSSD, detect
from lib.final_training import detection_losses
from lib.genotype import Genotype, SearchSpace
from lib.log import progress
from lib.priors import priors_per_cell
from lib.scoring import Scorer, prepare_scoring_data
from lib.shrinking import value_at
from lib.training import Losses, Trainer, detection_loss


def describe_split(total: int, train: Sequence[int], search: Sequence[int]) -> str:
    return f"split: {total} images, {len(train)} train the supernet, {len(search)} score candidates"


def describe_space(detector: ElasticSSD, space: SearchSpace) -> list[str]:
    """Size of the space; multiply-adds and parameters of its smallest and largest sub-network."""
    lines = [f"search space: {space.size():.4g} sub-networks of {space.backbone_type}"]
    for name, genotype in (("smallest", space.smallest()), ("largest", space.largest())):
        cost = detector.cost(genotype)
        lines.append(f"  {name}: {cost.flops / 1e6:.1f} M multiply-adds, {cost.params / 1e6:.3f} M parameters")
    return lines


def describe_priors(detector: ElasticSSD, config: Config) -> list[str]:
    """Prior boxes of each feature map, per image size."""
    lines = []
    for size in detector.space.image_size:
        per_cell = priors_per_cell(config.head.aspect_ratios)
        levels = [(h, w, n) for (h, w), n in zip(detector.feature_sizes(size), per_cell, strict=True)]
        parts = ", ".join(f"{h}x{w}x{n}" for h, w, n in levels)
        lines.append(f"priors at {size} px: {sum(h * w * n for h, w, n in levels)} = {parts}")
    return lines


def describe_training(name: str, config: TrainConfig, images: int, batches_per_epoch: int) -> str:
    batches, processes = f"batches of {config.batch_size}", distributed.world().size
    if config.accumulate > 1:
        batches = f"{config.accumulate} {batches}"
    if processes > 1:
        batches = f"{batches} over {processes} processes"
    return (
        f"{name}: {config.epochs} epochs of {-(-batches_per_epoch // config.accumulate)} steps, {batches}, "
        f"{images} images, {config.optimizer}, learning rate {config.learning_rate:g} ({config.lr_schedule.type})"
    )


SHOWN = 5  # dropped boxes and images without objects, by name
COVERAGE_SAMPLE = 20_000  # objects that the coverage is measured on, evenly spread
CHUNK = 1024  # objects whose IoU with every prior is in memory at a time


def preflight(
    annotations: Annotations, indices: Sequence[int], priors_cxcywh: Tensor, matched_threshold: float
) -> list[str]:
    """Lines about some images of `annotations`, given normalised priors (P, 4) and the IoU that matches an object.

    Boxes that were dropped are those of all of `annotations`. Coverage leaves ignored objects out, as training does.
    """
    rows = torch.as_tensor(indices, dtype=torch.int64)
    counts = annotations.offsets.diff()  # (N,)
    chosen = torch.zeros(len(annotations), dtype=torch.bool)
    chosen[rows] = True
    objects = chosen.repeat_interleave(counts)  # (M,)
    ignored = int((objects & annotations.ignore).sum())
    empty = rows[counts[rows] == 0].tolist()
    return [
        f"data: {len(rows)} images, {int(objects.sum())} boxes ({ignored} ignored: difficult or crowd), "
        f"{len(annotations.classes)} classes",
        *_named("boxes dropped", annotations.dropped),
        *_named("images without objects", [Path(annotations.path(row)).name for row in empty]),
        *_coverage(annotations, (objects & ~annotations.ignore).nonzero().flatten(), priors_cxcywh, matched_threshold),
    ]


def _named(what: str, names: Sequence[str]) -> list[str]:
    more = [f"  and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return [f"{what}: {len(names)}", *(f"  {name}" for name in names[:SHOWN]), *more]


def _coverage(annotations: Annotations, objects: Tensor, priors_cxcywh: Tensor, threshold: float) -> list[str]:
    """One line per class: its objects, and how many of them have a prior with an IoU of at least `threshold`."""
    counts = torch.bincount(annotations.labels[objects], minlength=len(annotations.classes) + 1)
    sample = objects[:: max(1, -(-len(objects) // COVERAGE_SAMPLE))].contiguous()
    labels, covered = annotations.labels[sample], _best_iou(annotations, sample, priors_cxcywh) >= threshold
    measured = "" if len(sample) == len(objects) else f", measured on {len(sample)} of them"
    lines = [f"objects, and the share that a prior covers with an IoU of at least {threshold:g}{measured}:"]
    width = max(map(len, annotations.classes), default=0)
    for label, name in enumerate(annotations.classes, start=1):
        of_class = covered[labels == label]
        share = f"{of_class.float().mean():7.1%}" if len(of_class) else "      -"
        lines.append(f"  {name:{width}} {int(counts[label]):8d} {share}")
    return lines


def _best_iou(annotations: Annotations, objects: Tensor, priors_cxcywh: Tensor) -> Tensor:
    """Of each object (K,), its IoU with the nearest prior."""
    owner = torch.searchsorted(annotations.offsets, objects, right=True) - 1
    boxes = annotations.boxes[objects] / annotations.sizes[owner].repeat(1, 2)
    priors_xyxy = box_convert(priors_cxcywh.cpu(), "cxcywh", "xyxy")
    best = [box_iou(chunk, priors_xyxy).amax(1) for chunk in boxes.split(CHUNK)]
    return torch.cat(best) if best else boxes.new_zeros(0)


SECONDS = 20.0  # that all measurements take, about
SCORED_SAMPLE = 64  # pictures on which a score is measured, on each side
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
    annotations: Annotations,
    train: Sequence[int],
    search: Sequence[int],
    config: Config,
    device: torch.device,
) -> float:
    """Seconds of scoring one candidate, the mean over `genotypes`, `SCORED_SAMPLE` pictures a side."""
    settings = config.search
    images = min(settings.images or len(search), len(search))
    part = replace(settings, bn_images=min(settings.bn_images, SCORED_SAMPLE), images=min(images, SCORED_SAMPLE))
    scorer = Scorer(prepare_scoring_data(annotations, train, search, replace(config, search=part)), config, device)
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


def detecting_seconds(model: SSD, test: Annotations, config: Config, device: torch.device) -> float:
    """Seconds of one evaluation on all of `test`, from at most `SCORED_SAMPLE` of its pictures."""
    some = range(min(SCORED_SAMPLE, len(test)))
    loader = eval_loader(test, some, model.image_size, config.final.batch_size, on_error=config.data.on_error)
    budget = SCORING_SHARE * SECONDS
    seconds = typical_seconds(lambda: [detect(model, [batch.images], config, device) for batch in loader], budget)
    return seconds * len(test) / len(some)
