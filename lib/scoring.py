"""Scores of sub-networks with inherited weights: on the search split, after BatchNorm is re-estimated.

The pictures are decoded and resized once, into one file that every process of a machine maps into its memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lib import checkpoint
from lib.config import Config
from lib.config import from_dict as config_from_dict
from lib.datasets import eval_loader
from lib.detector import ElasticSSD
from lib.engine import detect, measure, recalibrate
from lib.errors import UserError
from lib.genotype import Genotype
from lib.models import load_supernet
from lib.records import Records
from lib.runlog import finite, progress
from lib.runtime import keep_freed_memory


def prepare_scoring_data(records: Records, train: Sequence[int], search: Sequence[int], config: Config) -> dict:
    """Pictures as uint8 (N, 3, S, S), S the largest image size of the space, and the search split's ground truth.

    BatchNorm is re-estimated on the first `search.bn_images` of the training split, so no score sees its own pictures.
    """
    search = search[: config.search.images] if config.search.images else search
    if all(bool(target["ignore"].all()) for target in records.ground_truth(search)):
        raise UserError(f"data.data_portion: none of the {len(search)} images that score candidates has an object")
    size = max(config.search_space.image_size_choice)
    return {
        "bn_images": _pictures(records, train[: config.search.bn_images], size, config),
        "images": _pictures(records, search, size, config),
        "truth": records.ground_truth(search),
        "sizes": records.sizes[torch.as_tensor(search)].tolist(),
        "classes": list(records.classes),
    }


def _pictures(records: Records, indices: Sequence[int], size: int, config: Config) -> Tensor:
    pictures = torch.empty(len(indices), 3, size, size, dtype=torch.uint8)
    loader = eval_loader(records, indices, size, 32, workers=config.data.workers, on_error=config.data.on_error)
    done = 0
    for batch in progress(loader, "decode"):
        pictures[done : done + len(batch.images)] = batch.images
        done += len(batch.images)
    return pictures


def save_scoring_data(data: dict, path: Path) -> None:
    checkpoint.save(path, data)


def load_scoring_data(path: Path) -> dict:
    return checkpoint.load(path, mmap=True)


class Scorer:
    """`scorer(detector, genotype)` gives the metrics of one sub-network of `detector` on the search split."""

    def __init__(self, data: dict, config: Config, device: torch.device):
        self.data, self.config, self.device = data, config, device

    def __call__(self, detector: ElasticSSD, genotype: Genotype) -> dict:
        """COCO's twelve numbers, mAP, per class AP, flops, params."""
        batch_size = self.config.search.batch_size
        model = detector.extract(genotype).to(self.device, memory_format=torch.channels_last)
        bn_images = self.data["bn_images"]
        whole = (
            max(len(bn_images) // batch_size, 1) * batch_size
        )  # a small last batch would count as much as the others
        recalibrate(model, bn_images[:whole].split(batch_size), self.device)
        found = detect(model, self.data["images"].split(batch_size), self.config, self.device)
        metrics = measure(found, self.data["truth"], self.data["sizes"], self.data["classes"])
        return {**metrics, **detector.cost(genotype)._asdict()}


def scoring_worker(device: str, supernet: str, data: str, settings: dict):
    """What a worker process of the search does: set up on `device`, then genotypes (dicts) in, metrics out."""
    keep_freed_memory()
    detector = load_supernet(Path(supernet), mmap=True).detector
    scorer = Scorer(load_scoring_data(Path(data)), config_from_dict(settings), torch.device(device))

    def score(genotype: dict) -> dict:
        metrics = scorer(detector, Genotype.from_dict(genotype))
        return finite({name: value for name, value in metrics.items() if name != "per_class"})

    return score
