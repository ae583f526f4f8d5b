"""What a command is about to do: what the data holds, how large the work is, and how long it will take.

For --dry-run and the head of each run. Times are extrapolated from a few seconds of the stage's own work on the user's
device with the user's pictures.
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
from lib.datasets import Batch, collate, eval_loader, reading
from lib.detector import SSD, ElasticSSD, detect
from lib.final_training import detection_losses
from lib.genotype import Genotype, SearchSpace
from lib.log import progress
from lib.priors import priors_per_cell
from lib.scoring import Scorer, prepare_scoring_data
from lib.training import Losses, Trainer, detection_loss

SHOWN = 5  # dropped boxes and images without objects that are named
COVERAGE_SAMPLE = 20_000  # objects that coverage is measured on, evenly spread
CHUNK = 1024  # objects whose IoU with every prior is in memory at a time
SECONDS = 20.0  # that all measurements take together, about
TRAINING_SHARE, LOADING_SHARE, SCORING_SHARE = 0.5, 0.15, 0.35
SCORED_SAMPLE = 64  # pictures that a score or an evaluation is measured on
Forward = Callable[[Batch], Iterator[Losses]]


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
    per_cell = priors_per_cell(config.head.aspect_ratios)
    for size in detector.space.image_size:
        maps = zip(detector.feature_sizes(size), per_cell, strict=True)
        parts = ", ".join(f"{height}x{width}x{count}" for (height, width), count in maps)
        lines.append(f"priors at {size} px: {len(detector.priors(size))} = {parts}")
    return lines


def describe_training(name: str, config: TrainConfig, images: int, batches_per_epoch: int) -> str:
    batches = f"batches of {config.batch_size}"
    processes = distributed.world().size
    if config.accumulate > 1:
        batches = f"{config.accumulate} {batches}"
    if processes > 1:
        batches = f"{batches} over {processes} processes"
    return (
        f"{name}: {config.epochs} epochs of {-(-batches_per_epoch // config.accumulate)} steps, {batches}, "
        f"{images} images, {config.optimizer}, learning rate {config.learning_rate:g} ({config.lr_schedule.type})"
    )


def preflight(
    annotations: Annotations, indices: Sequence[int], priors_cxcywh: Tensor, matched_threshold: float
) -> list[str]:
    """What the images of `indices` hold: counts, images without objects, and objects that no prior box covers.

    `priors_cxcywh` (P, 4) are normalised. Dropped boxes are those of all of `annotations`. Coverage leaves ignored
    objects out, as training does.
    """
    rows = torch.as_tensor(indices, dtype=torch.int64)
    counts = annotations.offsets.diff()  # (N,) objects of each image
    chosen = torch.zeros(len(annotations), dtype=torch.bool)
    chosen[rows] = True
    objects = chosen.repeat_interleave(counts)  # (M,) whether each object is in a chosen image
    ignored = int((objects & annotations.ignore).sum())
    empty = [Path(annotations.paths[row]).name for row in rows[counts[rows] == 0].tolist()]
    counted = (objects & ~annotations.ignore).nonzero().flatten()
    return [
        f"data: {len(rows)} images, {int(objects.sum())} boxes ({ignored} ignored: difficult or crowd), "
        f"{len(annotations.classes)} classes",
        *_named("boxes dropped", annotations.dropped),
        *_named("images without objects", empty),
        *_coverage(annotations, counted, priors_cxcywh, matched_threshold),
    ]


def _named(what: str, names: Sequence[str]) -> list[str]:
    more = [f"  and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return [f"{what}: {len(names)}", *(f"  {name}" for name in names[:SHOWN]), *more]


def _coverage(annotations: Annotations, objects: Tensor, priors_cxcywh: Tensor, threshold: float) -> list[str]:
    """One line per class: its objects, and the share of them that have a prior with an IoU of at least `threshold`."""
    counts = torch.bincount(annotations.labels[objects], minlength=len(annotations.classes) + 1)
    sample = objects[:: max(1, -(-len(objects) // COVERAGE_SAMPLE))].contiguous()
    labels = annotations.labels[sample]
    covered = _best_iou(annotations, sample, priors_cxcywh) >= threshold
    measured = "" if len(sample) == len(objects) else f", measured on {len(sample)} of them"
    lines = [f"objects, and the share that a prior covers with an IoU of at least {threshold:g}{measured}:"]
    width = max(map(len, annotations.classes), default=0)
    for label, name in enumerate(annotations.classes, start=1):
        of_class = covered[labels == label]
        share = f"{of_class.float().mean():7.1%}" if len(of_class) else "      -"
        lines.append(f"  {name:{width}} {int(counts[label]):8d} {share}")
    return lines


def _best_iou(annotations: Annotations, objects: Tensor, priors_cxcywh: Tensor) -> Tensor:
    """The IoU of each object (K,) with its best prior (K,)."""
    owner = torch.searchsorted(annotations.offsets, objects, right=True) - 1
    boxes = annotations.boxes[objects] / annotations.sizes[owner].repeat(1, 2)
    priors_xyxy = box_convert(priors_cxcywh.cpu(), "cxcywh", "xyxy")
    best = [box_iou(chunk, priors_xyxy).amax(1) for chunk in boxes.split(CHUNK)]
    return torch.cat(best) if best else boxes.new_zeros(0)


def typical_seconds(work: Callable[[], object], budget: float) -> float:
    """Median time of `work` over 3 to 9 calls within about `budget` seconds, after a first call that does not count.

    The processes of a job all make the same number of calls.
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
    config: TrainConfig,
    device: torch.device,
    loader: DataLoader,
    phases: Sequence[tuple[int, Forward]],
) -> float:
    """Seconds of a training without its evaluations; `phases` are (epochs, a function from batch to losses).

    The weights of `model` change.
    """
    steps = loader.batch_sampler.batches_per_epoch
    trainer = Trainer(model, config, device, steps)
    trainer.model.train()
    dataset = loader.dataset
    keys = next(iter(loader.batch_sampler))
    loading = typical_seconds(lambda: collate([dataset[key] for key in keys]), LOADING_SHARE * SECONDS)
    batch = collate([dataset[key] for key in keys]).to(device)
    seconds = 0.0
    for epochs, forward in progress(phases, "measure training"):
        budget = TRAINING_SHARE * SECONDS / len(phases)
        step = typical_seconds(lambda forward=forward: trainer.update(forward(batch)), budget)
        # Loader workers read while the device computes, so the slower side decides; without them both add up.
        together = max(step, loading / loader.num_workers) if loader.num_workers else step + loading
        seconds += epochs * steps * together
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
    """Mean seconds of scoring one of `genotypes`, measured on a sample of the BatchNorm and the scored images."""
    settings = config.search
    images = min(settings.images or len(search), len(search))
    part = replace(settings, bn_images=min(settings.bn_images, SCORED_SAMPLE), images=min(images, SCORED_SAMPLE))
    scorer = Scorer(prepare_scoring_data(annotations, train, search, replace(config, search=part)), config, device)
    budget = SCORING_SHARE * SECONDS / len(genotypes)
    measured = []
    for genotype in progress(genotypes, "measure scoring"):
        measured.append(typical_seconds(lambda genotype=genotype: scorer(detector, genotype), budget))
    all_images = min(settings.bn_images, len(train)) + images
    return statistics.mean(measured) * all_images / (part.bn_images + part.images)


def final_seconds(model: SSD, config: Config, device: torch.device, loader: DataLoader) -> float:
    """Seconds of training one detector, without its evaluations."""
    settings = config.final
    loss = detection_loss(config)
    phases = [(settings.epochs, lambda batch: detection_losses(model, loss, batch))]
    return training_seconds(model, settings, device, loader, phases)


def detecting_seconds(model: SSD, test: Annotations, config: Config, device: torch.device) -> float:
    """Seconds of one evaluation on all of `test`, from at most `SCORED_SAMPLE` of its pictures."""
    sample = range(min(SCORED_SAMPLE, len(test)))
    loader = eval_loader(test, sample, model.image_size, config.final.batch_size, **reading(config.data))
    budget = SCORING_SHARE * SECONDS
    seconds = typical_seconds(lambda: detect(model, (batch.images for batch in loader), config, device), budget)
    return seconds * len(test) / len(sample)
