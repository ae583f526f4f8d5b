"""What a command is about to do, in lines for --dry-run and for the head of each run."""

from __future__ import annotations

from collections.abc import Sequence

from lib import distributed
from lib.config import Config, TrainConfig
from lib.detector import ElasticSSD
from lib.genotype import SearchSpace
from lib.priors import priors_per_cell


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
