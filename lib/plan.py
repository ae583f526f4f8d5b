"""What a command is about to do: what the data holds, how large the work is, and how long it will take.

For --dry-run and the head of each run. Times are extrapolated from a few seconds of the stage's own work on the user's
device with the user's pictures.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from posixpath import exists

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lib import checkpoint, distributed
from lib.annotations import Annotations
from lib.config import Config, DataConfig, HeadConfig, TrainConfig
from lib.datasets import Batch, collate, eval_loader
from lib.detector import SSD, ElasticSSD, detect
from lib.elastic import to_device
from lib.final_training import detection_losses, launched
from lib.genotype import Genotype, SearchSpace
from lib.images import UnreadableImage, read_size
from lib.labels import Faults
from lib.log import progress
from lib.losses import DetectionLoss
from lib.priors import coverage, fit_priors, prior_boxes, priors_per_cell
from lib.scoring import Scorer, prepare_scoring_data
from lib.training import Losses, Trainer

COVERAGE_SAMPLE = 10_000  # objects that coverage is measured on, evenly spread
WELL_COVERED = 0.8  # share of a class's objects below which other priors are proposed
THREADS = 16  # that open pictures
SECONDS = 4.0  # that one measurement takes
CALLS = 10  # of each kind of work, at most
SCORED_SAMPLE = 64  # pictures that a score or an evaluation is measured on
Forward = Callable[[Batch], Iterator[Losses]]
Split = tuple[Annotations, Sequence[int]]  # some of the images


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
    per_cell = priors_per_cell(config.head.aspect_ratios, config.head.squares)
    for size in detector.space.image_size:
        maps = zip(detector.feature_sizes(size), per_cell, strict=True)
        parts = ", ".join(f"{height}x{width}x{count}" for (height, width), count in maps)
        lines.append(f"priors at {size} px: {len(detector.priors(size))} = {parts}")
    return lines


def describe_training(name: str, config: TrainConfig, images: int, batches_per_epoch: int) -> str:
    steps = -(-batches_per_epoch // config.accumulate)
    warmup = config.lr_schedule.warmup_steps
    line = (
        f"{name}: {config.epochs} epochs of {steps} steps, {config.accumulate * config.batch_size} images a step of "
        f"{images}, {config.optimizer}, learning rate {config.learning_rate:g} ({config.lr_schedule.type})"
    )
    if warmup < config.epochs * steps:
        return line
    return f"{line}\nnote: {name}.lr_schedule.warmup_steps is {warmup}: the training ends before its rate is reached"


def describe_data(splits: Mapping[str, Split], priors_cxcywh: Tensor, matched_threshold: float) -> list[str]:
    """One table of all splits: their images and objects, and the share of each class's objects that a prior covers.

    `priors_cxcywh` (P, 4) are normalised. Ignored objects (difficult, crowd) are left out, as training does.
    """
    classes = next(iter(splits.values()))[0].classes
    covers = f"objects, and the share that a prior box covers with an IoU of at least {matched_threshold:g}:"
    heads = ["data", "  images", "  without objects", "  boxes dropped", "  ignored objects"]
    heads += [f"  {name}" for name in classes]
    columns = []
    for name, split in splits.items():
        data, rows = split
        counts = data.objects.offsets.diff()[rows]
        dropped = int((data.truth.offsets.diff()[rows] - counts).sum())
        _, labels = objects_of(split)
        empty, ignored = int((counts == 0).sum()), int(counts.sum()) - len(labels)
        cells = [f"{cell:>18}" for cell in (name, len(rows), empty, dropped, ignored)]
        numbers = torch.bincount(labels, minlength=len(classes) + 1)[1:].tolist()
        shares = coverage_of(split, priors_cxcywh, matched_threshold)
        for number, share in zip(numbers, shares, strict=True):
            cells.append(f"{number:>10} {f'{share:.1%}' if number else '-':>7}")
        columns.append(cells)
    width = max(map(len, heads))
    lines = [f"{head:{width}}{''.join(cells)}" for head, *cells in zip(heads, *columns, strict=True)]
    lines.insert(5, f"{covers:{width}}")
    return [*lines, *dict.fromkeys(note for data, _ in splits.values() for note in data.notes)]


def objects_of(split: Split) -> tuple[Tensor, Tensor]:
    """Boxes (K, 4), xyxy as shares of the image, and labels (K,) of the objects that training sees."""
    data, rows = split
    objects, sizes = data.objects, data.sizes
    image = torch.arange(len(sizes)).repeat_interleave(objects.offsets.diff())
    seen = torch.isin(image, torch.as_tensor(rows)) & ~objects.ignore
    return objects.boxes[seen] / sizes[image[seen]].repeat(1, 2), objects.labels[seen]


def coverage_of(split: Split, priors_cxcywh: Tensor, threshold: float) -> list[float]:
    """The share of each class's objects that a prior covers; NaN without objects. Measured on COVERAGE_SAMPLE."""
    boxes, labels = objects_of(split)
    step = len(labels) // COVERAGE_SAMPLE + 1
    return coverage(boxes[::step], labels[::step], priors_cxcywh, len(split[0].classes), threshold).tolist()


def propose_priors(
    annotations: Annotations, detector: ElasticSSD, config: Config, *, fit: bool = False, if_poor: bool = False
) -> tuple[HeadConfig, list[str]]:
    """The head with as many prior boxes as before, fitted to the objects, and a report.

    It is the configured head without `fit`, unless a class is covered badly and `if_poor`; and where the fitted one
    would cover less, of the classes on average or of the worst one.
    """
    split = annotations, range(len(annotations))
    head, size, threshold = config.head, detector.space.image_size[-1], config.loss.matched_threshold
    before = coverage_of(split, detector.priors(size), threshold)
    poor = [name for name, share in zip(annotations.classes, before, strict=True) if share < WELL_COVERED]
    advice = "" if fit else "; see --fit-priors"
    report = [f"note: prior boxes cover less than {WELL_COVERED:.0%} of {', '.join(poor)}{advice}"] if poor else []
    if not (fit or (poor and if_poor)) or not len(annotations.objects.boxes):
        return head, report
    sizes = detector.feature_sizes(size)
    pairs = [count // 2 for count in priors_per_cell(head.aspect_ratios, head.squares)]
    scales, ratios = fit_priors(*objects_of(split), sizes, pairs, threshold, head.clip is True)
    priors = prior_boxes(sizes, scales, ratios, head.clip, squares=False)
    after = coverage_of(split, priors, threshold)
    gains = [new - old for old, new in zip(before, after, strict=True) if new >= 0]  # NaN: a class without objects
    # Other priors must pay: on average over the classes, and not at the cost of the worst one.
    if sum(gains) <= 0 or np.nanmin(after) < np.nanmin(before):
        return head, [*report, "prior boxes fitted to the data cover no more"]
    rows = zip(annotations.classes, before, after, strict=True)
    changes = ", ".join(f"{name} {old:.1%} -> {new:.1%}" for name, old, new in rows if new >= 0)
    report += [
        f"prior boxes fitted to the data at {size} px, {len(priors)} as before: {changes}",
        f"  head.squares: false, head.scales: {scales}, head.aspect_ratios: {ratios}",
    ]
    return replace(head, scales=scales, aspect_ratios=ratios, squares=False), report


def check_pictures(splits: Mapping[str, Split], data: DataConfig) -> list[str]:
    """Open the header of every picture; notes on what was left out, and on pictures that are in two splits.

    Raises UserError with all faults, unless `data.on_error` is "skip".
    """
    pictures = {a.paths[row]: tuple(a.sizes[row].tolist()) for a, rows in splits.values() for row in rows}
    faults = Faults(data.on_error, data.max_skipped)

    def check(path: str) -> UnreadableImage | None:
        try:
            read_size(path, pictures[path], data.max_pixels)
        except UnreadableImage as error:
            return error
        return None

    with ThreadPoolExecutor(THREADS) as pool:
        for error in filter(None, progress(pool.map(check, pictures), "check pictures", total=len(pictures))):
            faults.add("picture", "unreadable", str(error))
    notes = faults.close(Path(data.root), len(pictures) - faults.counts.total(), 0)
    paths = {name: [a.paths[row] for row in rows] for name, (a, rows) in splits.items()}
    for name, others in (("search", ["train"]), ("test", ["train", "search"])):
        if same := same_pictures(paths[name], [path for other in others for path in paths[other]]):
            share, where = f"{len(same)} of {len(paths[name])}", " or ".join(others)
            first = " = ".join(same[0])
            notes.append(f"warning: {share} pictures of {name} are in {where} as well, byte for byte: {first}")
    return notes


def same_pictures(paths: Sequence[str], others: Sequence[str]) -> list[tuple[str, str]]:
    """Each of `paths` that has the same bytes as one of `others`, with the first of these."""
    size = {path: Path(path).stat().st_size for path in (*paths, *others) if exists(path)}
    # Only files of a size that both sides have are read, and none for being on both sides.
    common = {size.get(path) for path in {*paths}.difference(others)} & {size.get(path) for path in others} - {None}

    def identity(path: str) -> str:
        return checkpoint.sha256(Path(path)) if size.get(path) in common else path

    first = {identity(path): path for path in reversed(others)}
    found = [(path, first.get(identity(path))) for path in paths]
    return [(path, other) for path, other in found if other]


def typical_seconds(works: Sequence[Callable[[], object]]) -> list[float]:
    """Median seconds of a call of each of `works`, which are called in turn for SECONDS; a call that began is awaited.

    One that the time does not suffice for takes as long as the others on average.
    """
    stop = time.perf_counter() + SECONDS
    taken: list[list[float]] = [[] for _ in works]
    for number in progress(range(CALLS * len(works)), "measure the time"):
        # The processes of a job all make the same number of calls.
        if number and distributed.any_of(time.perf_counter() >= stop):
            break
        start = time.perf_counter()
        works[number % len(works)]()
        taken[number % len(works)].append(time.perf_counter() - start)
    # The first call of each sets things up.
    known = [statistics.median(seconds[1:] or seconds) for seconds in taken if seconds]
    return known + [statistics.mean(known)] * (len(works) - len(known))


def training_seconds(
    model: torch.nn.Module,
    config: TrainConfig,
    device: torch.device,
    loader: DataLoader,
    phases: Sequence[tuple[int, Forward]],
) -> float:
    """Seconds of a training without its evaluations; `phases` are (epochs, a function from batch to losses).

    The weights of `model` change. A step ends when its losses can be read, which waits for a GPU.
    """
    steps = loader.batch_sampler.batches_per_epoch
    trainer = Trainer(model, config, device, steps)
    trainer.model.train()
    dataset, keys = loader.dataset, next(iter(loader.batch_sampler))
    (loading,) = typical_seconds([lambda: collate([dataset[key] for key in keys])])
    batch = collate([dataset[key] for key in keys]).to(device)
    works = [lambda forward=forward: trainer.update(forward(batch)) or trainer.read_losses() for _, forward in phases]
    seconds = 0.0
    for (epochs, _), step in zip(phases, typical_seconds(works), strict=True):
        # Loader workers read while the device computes, so the slower side decides; without them both add up.
        together = max(step, loading / loader.num_workers) if loader.num_workers else step + loading
        seconds += epochs * steps * together
    return seconds


def final_seconds(model: SSD, config: Config, device: torch.device, loader: DataLoader) -> float:
    """Seconds of training one detector, without its evaluations."""
    loss = DetectionLoss(config.loss, config.head.variances)
    to_device(model, device, trains_in_half=config.final.precision != "fp32").train()
    network = launched(model, config.final, len(next(iter(loader.batch_sampler))), device)

    def forward(batch: Batch) -> Iterator[Losses]:
        return detection_losses(network, loss, batch, loss.match(batch.boxes, batch.labels, model.priors))

    return training_seconds(model, config.final, device, loader, [(config.final.epochs, forward)])


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
    measured = typical_seconds([partial(scorer, detector, genotype) for genotype in genotypes])
    all_images = min(settings.bn_images, len(train)) + images
    return statistics.mean(measured) * all_images / (part.bn_images + part.images)


def detecting_seconds(model: SSD, test: Annotations, config: Config, device: torch.device) -> float:
    """Seconds of one evaluation on all of `test`, from at most `SCORED_SAMPLE` of its pictures."""
    sample = range(min(SCORED_SAMPLE, len(test)))
    loader = eval_loader(test, sample, model.image_size, config.final.batch_size, replace(config.data, workers=0))
    (seconds,) = typical_seconds([lambda: detect(model, (batch.images for batch in loader), config, device)])
    return seconds * len(test) / len(sample)
