"""The budget of a search: limits on what a sub-network costs, and whether any sub-network can meet them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from lib.config import SearchConfig
from lib.detector import ElasticSSD
from lib.errors import UserError
from lib.genotype import Block, Genotype, SearchSpace, all_blocks
from lib.latency import LatencyTable, features, load_table, predict

LIMIT_KEYS = {  # the keys of the configuration that hold the least and the most of each cost
    "flops": ("min_flops", "max_flops"),
    "params": ("min_params", "max_params"),
    "latency_ms": ("min_latency_ms", "max_latency_ms"),
}
Limits = dict[str, tuple[float, float]]


def limits_of(settings: SearchConfig) -> Limits:
    """Least and most of each cost that has a limit. A limit of 0 means no limit."""
    limits = {cost: [getattr(settings, key) for key in keys] for cost, keys in LIMIT_KEYS.items()}
    return {cost: (low, high or math.inf) for cost, (low, high) in limits.items() if low or high}


def counts_latency(settings: SearchConfig) -> bool:
    """Whether the search minimises or bounds latency."""
    return "latency_ms" in settings.costs or "latency_ms" in limits_of(settings)


class Coster:
    """`coster(genotype)` is what a whole detector costs: flops, params and, if there is a table, latency_ms."""

    def __init__(self, detector: ElasticSSD, table: LatencyTable | None = None):
        self.table = table
        self._detector = detector

    def __call__(self, genotype: Genotype) -> dict[str, float]:
        return {**self._detector.cost(genotype)._asdict(), **self.latency(genotype)}

    def latency(self, genotype: Genotype) -> dict[str, float]:
        """latency_ms alone; empty without a table."""
        table = self.table
        return {"latency_ms": round(predict(table.ms, features(self._detector, genotype)), 4)} if table else {}


def table_for(detector: ElasticSSD, settings: SearchConfig) -> LatencyTable | None:
    """The latency table that `settings` name. Raises UserError if there is none and the search needs it."""
    if settings.latency_table:
        return load_table(Path(settings.latency_table), detector)
    if counts_latency(settings):
        raise UserError("search: a cost or limit of latency needs --latency-table FILE, which --measure-latency writes")
    return None


class Budget:
    """`budget(genotype)` is whether a genotype is within all limits; `str(budget)` describes the limits.

    A limit that no sub-network can meet is a UserError with the achievable range; whether all can be met together is
    left to the search. `costs` gives the costs of a genotype by name.
    """

    def __init__(self, costs: Callable[[Genotype], Mapping[str, float]], space: SearchSpace, limits: Limits):
        self._costs = costs
        self._limits = limits
        self._descriptions = []
        for cost, (low, high) in limits.items():
            ends = [extreme(space, lambda g, cost=cost: costs(g)[cost], pick) for pick in (min, max)]
            least, most = (costs(genotype)[cost] for genotype in ends)
            within = f"sub-networks have {least:.4g} to {most:.4g}"
            low_key, high_key = LIMIT_KEYS[cost]
            if low > most:
                raise UserError(f"search.{low_key}: {low:.4g} is out of reach, {within}")
            if high < least:
                raise UserError(f"search.{high_key}: {high:.4g} is out of reach, {within}")
            self._descriptions.append(f"{cost} from {low:.4g} to {high:.4g} ({within})")

    def __call__(self, genotype: Genotype) -> bool:
        if not self._limits:
            return True
        costs = self._costs(genotype)
        return all(low <= costs[cost] <= high for cost, (low, high) in self._limits.items())

    def __str__(self) -> str:
        return ", ".join(self._descriptions) or "none"


def extreme(space: SearchSpace, cost: Callable[[Genotype], float], pick: Callable) -> Genotype:
    """The genotype of least (`pick` is min) or greatest (max) cost, if each block adds a cost of its own."""
    found = []
    for size in space.image_size:
        genotype = replace(space.largest(), image_size=size)
        # At full depth each block can be chosen by itself, since costs add up; the depths follow.
        for i, stage in enumerate(space.stages):
            for j in range(max(stage.depth)):
                blocks = genotype.stages[i]
                options = ((*blocks[:j], block, *blocks[j + 1 :]) for block in all_blocks(stage.block))
                genotype = pick((_with_stage(genotype, i, blocks) for blocks in options), key=cost)
        for i, choices in enumerate(space.head):
            heads = [(*genotype.head[:i], block, *genotype.head[i + 1 :]) for block in all_blocks(choices)]
            genotype = pick((replace(genotype, head=head) for head in heads), key=cost)
        for i, stage in enumerate(space.stages):
            genotype = pick([_with_stage(genotype, i, genotype.stages[i][:d]) for d in stage.depth], key=cost)
        found.append(genotype)
    return pick(found, key=cost)


def _with_stage(genotype: Genotype, i: int, stage: tuple[Block, ...]) -> Genotype:
    return replace(genotype, stages=(*genotype.stages[:i], stage, *genotype.stages[i + 1 :]))
