"""Scores of sub-networks with a supernet's weights, on its search split and on the test set."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

import torch

from lib.config import Config
from lib.datasets import load_annotations, load_split
from lib.detector import ElasticSSD, Supernet
from lib.genotype import Genotype, SearchSpace
from lib.scoring import Scorer, prepare_scoring_data

CPU = torch.device("cpu")


def scorers(supernet: Supernet, path: Path, config: Config) -> tuple[Scorer, Scorer]:
    """Scorers on the search split and on the test set; both re-estimate BatchNorm on the same training pictures.

    `path` is the supernet's checkpoint, beside which its split lies.
    """
    config.data.classes = list(supernet.classes)
    annotations = load_annotations(config.data, "train")
    search = prepare_scoring_data(annotations, *load_split(path.parent / "split.json", annotations), config)
    test_records = load_annotations(config.data, "test")
    test = prepare_scoring_data(test_records, [], range(len(test_records)), config)
    return Scorer(search, config, CPU), Scorer({**test, "bn_images": search["bn_images"]}, config, CPU)


def spread(detector: ElasticSSD, space: SearchSpace, count: int, seed: int = 0) -> list[Genotype]:
    """The smallest, the largest and `count` - 2 random sub-networks whose multiply-adds are evenly spread between."""
    rng = random.Random(seed)
    ends = space.smallest(), space.largest()
    drawn = [space.sample(rng) for _ in range(300)]
    drawn += [space.crossover(g, end, rng) for g in drawn[:200] for end in ends]  # few random ones are near the ends
    low, high = (detector.cost(g).flops for g in ends)
    chosen = [ends[0]]
    for i in range(1, count - 1):
        target = low + (high - low) * i / (count - 1)
        chosen.append(min(_without(drawn, chosen), key=lambda g, t=target: abs(detector.cost(g).flops - t)))
    return [*chosen, ends[1]]


def _without(genotypes: Iterable[Genotype], chosen: list[Genotype]) -> list[Genotype]:
    return [genotype for genotype in genotypes if genotype not in chosen]
