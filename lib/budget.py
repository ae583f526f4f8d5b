"""The budget of a search: least and most of each cost, and whether any sub-network can meet it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from lib.config import SearchConfig
from lib.detector import ElasticSSD
from lib.errors import UserError
from lib.genotype import Block, BlockChoices, Genotype, SearchSpace
from lib.latency import LatencyTable, features, load_table

COSTS = ("flops", "params", "latency_ms")
Limits = dict[str, tuple[float, float]]


def limits_of(config: SearchConfig) -> Limits:
    """Least and most of each cost that has a limit; a limit of 0 is none."""
    limits = {cost: (getattr(config, f"min_{cost}"), getattr(config, f"max_{cost}")) for cost in COSTS}
    return {cost: (low, high or math.inf) for cost, (low, high) in limits.items() if low or high}


def counts_latency(settings: SearchConfig) -> bool:
    """Whether the search minimises or bounds latency."""
    return "latency_ms" in (*settings.costs, *limits_of(settings))


class Budget:
    """`budget(genotype)`: whether it is within all limits; `str(budget)`: the limits, and what sub-networks have.

    `costs` gives the costs of a genotype by name. Raises UserError at once where no sub-network is within one of the
    limits; whether one is within all of them together is for the search to find out.
    """

    def __init__(self, costs: Callable[[Genotype], Mapping[str, float]], space: SearchSpace, limits: Limits):
        self._costs, self._limits, self._words = costs, limits, []
        for cost, (low, high) in limits.items():
            least, most = (costs(extreme(space, lambda g, c=cost: costs(g)[c], pick))[cost] for pick in (min, max))
            for name, limit, reachable in ((f"min_{cost}", low, low <= most), (f"max_{cost}", high, high >= least)):
                if not reachable:
                    raise UserError(
                        f"search.{name}: {limit:.4g} is out of reach, sub-networks have {least:.4g} to {most:.4g}"
                    )
            self._words.append(f"{cost} from {low:.4g} to {high:.4g} (sub-networks have {least:.4g} to {most:.4g})")

    def __call__(self, genotype: Genotype) -> bool:
        if not self._limits:
            return True
        costs = self._costs(genotype)
        return all(low <= costs[cost] <= high for cost, (low, high) in self._limits.items())

    def __str__(self) -> str:
        return ", ".join(self._words) or "none"


def extreme(space: SearchSpace, cost: Callable[[Genotype], float], pick: Callable) -> Genotype:
    """The genotype of least (`pick` is min) or greatest (max) cost, if each block adds a cost of its own.

    At full depth every block is chosen by itself, then every depth; image sizes are compared last.
    """
    found = []
    for size in space.image_size:
        genotype = replace(space.largest(), image_size=size)
        for i, stage in enumerate(space.stages):
            for j in range(max(stage.depth)):
                genotype = pick(_other_blocks(genotype, i, j, stage.block), key=cost)
        for i, choices in enumerate(space.head):
            genotype = pick(_other_heads(genotype, i, choices), key=cost)
        for i, stage in enumerate(space.stages):
            genotype = pick([_with_stage(genotype, i, genotype.stages[i][:d]) for d in stage.depth], key=cost)
        found.append(genotype)
    return pick(found, key=cost)


def _other_blocks(genotype: Genotype, i: int, j: int, choices: BlockChoices) -> Iterator[Genotype]:
    stage = genotype.stages[i]
    for block in _blocks(choices):
        yield _with_stage(genotype, i, (*stage[:j], block, *stage[j + 1 :]))


def _other_heads(genotype: Genotype, i: int, choices: BlockChoices) -> Iterator[Genotype]:
    for block in _blocks(choices):
        yield replace(genotype, head=(*genotype.head[:i], block, *genotype.head[i + 1 :]))


def _with_stage(genotype: Genotype, i: int, stage: tuple[Block, ...]) -> Genotype:
    return replace(genotype, stages=(*genotype.stages[:i], stage, *genotype.stages[i + 1 :]))


def _blocks(choices: BlockChoices) -> Iterator[Block]:
    return itertools.starmap(Block, itertools.product(choices.expand, choices.kernel))


def table_for(detector: ElasticSSD, settings: SearchConfig) -> LatencyTable | None:
    """The configured table. Raises UserError if there is none and the search needs it."""
    if settings.latency_table:
        return load_table(Path(settings.latency_table), detector)
    if counts_latency(settings):
        raise UserError(
            "search: latency as a cost or in the budget needs --latency-table FILE, which --measure-latency writes"
        )
    return None


class Coster:
    """`coster(genotype)` is what a whole detector costs: flops, params and, where there is a table, latency_ms."""

    def __init__(self, detector: ElasticSSD, table: LatencyTable | None = None):
        self._detector, self._table = detector, table

    def __call__(self, genotype: Genotype) -> dict[str, float]:
        return {**self._detector.cost(genotype)._asdict(), **self.latency(genotype)}

    def latency(self, genotype: Genotype) -> dict[str, float]:
        """latency_ms alone, nothing without a table."""
        if self._table is None:
            return {}
        return {"latency_ms": round(self._table(features(self._detector, genotype)), 4)}
