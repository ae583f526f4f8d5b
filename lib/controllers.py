"""Search controllers behind one ask / tell interface: random search, three kinds of evolution.

Then the budget of a search: limits on what a sub-network costs.

Pure: no processes, no files, no torch. Many asks may come before their tells, and tells come in any order.
"""

import itertools
import math
import operator
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from lib import UserError
from lib.config import SearchConfig
from lib.genotype import Genotype, SearchSpace, StageChoices

CHILD_TRIES = 1_000  # children in a row that may be rejected before a proposal is sampled from the whole space
SAMPLE_TRIES = 10_000  # samples in a row that may be rejected before the space counts as exhausted
POOL = 64  # candidates among which a predicted objective chooses
RIDGE = 1.0  # penalty of a squared weight, in units of one evaluation

Record = TypeVar("Record", bound=Mapping)
Fits = Callable[[Genotype], bool]  # whether a genotype may be proposed
Costs = Callable[[Genotype], Mapping[str, float]]  # what a genotype costs, by name


def objective_values(metrics: Mapping[str, float], objective: str, costs: Sequence[str]) -> tuple[float, ...]:
    """`metrics` as numbers to maximise: the objective, then each cost negated."""
    return (metrics[objective], *(-metrics[cost] for cost in costs))


def dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether `a` is no worse than `b` everywhere and better somewhere; larger is better."""
    return a != b and all(map(operator.ge, a, b))


def pareto_front(records: Iterable[Record], objective: str, costs: Sequence[str]) -> list[Record]:
    """The records whose "metrics" no other record's dominate, cheapest first. Equally good ones all stay.

    The objective is maximised, every cost is minimised.
    """
    scored = [(objective_values(record["metrics"], objective, costs), record) for record in records]
    scored.sort(key=lambda pair: pair[0], reverse=True)  # a record comes after all that dominate it
    front: list[tuple[tuple[float, ...], Record]] = []
    for values, record in scored:
        if not any(dominates(other, values) for other, _ in front):
            front.append((values, record))
    return [record for _, record in sorted(front, key=lambda pair: pair[0][1:], reverse=True)]


class Individual(NamedTuple):
    """An evaluated genotype. Every number in `values` is to be maximised: the objective, then each cost negated."""

    genotype: Genotype
    values: tuple[float, ...]


def insert_into_fronts(fronts: list[list[Individual]], newcomer: Individual) -> None:
    """Insert into non-dominated fronts, best first, in place (ENLU: Li et al., IEEE Trans. Cybernetics 2017)."""
    arrivals = [newcomer]
    for front in fronts:
        # Its front is the first with no member that dominates it. Nobody dominates those who leave the front before.
        if any(dominates(member.values, arrivals[0].values) for member in front):
            continue
        # Whoever it dominates there moves on, which may displace members of the next front, and so on.
        leaving = [m for m in front if any(dominates(arrival.values, m.values) for arrival in arrivals)]
        front[:] = [m for m in front if m not in leaving] + arrivals
        arrivals = leaving
        if not arrivals:
            return
    fronts.append(arrivals)


def crowding_distances(front: Sequence[tuple[float, ...]]) -> list[float]:
    """How much room each point has along its front, infinite at the ends (Deb et al., 2002, section III-B)."""
    distances = [0.0] * len(front)
    for column in zip(*front, strict=True):
        order = sorted(range(len(front)), key=column.__getitem__)
        span = column[order[-1]] - column[order[0]]
        distances[order[0]] = distances[order[-1]] = math.inf
        for before, i, after in zip(order, order[1:], order[2:], strict=False):
            distances[i] += (column[after] - column[before]) / span if span else 0.0
    return distances


class SpaceExhausted(Exception):
    """No new genotype that fits was found: a regular end of the search of a small space, not an error."""


class Controller:
    """A genotype that was asked or told before is never asked again; children of selected parents are, or samples.

    `settings` name the objective to maximise, the costs to minimise, and the sizes and probabilities of evolution.
    `budget(genotype)` decides which genotypes may be proposed; told ones are not checked. `seeds` that fit come first.
    Only a surrogate needs `costs(genotype)`.

    A proposal depends on `seed`, on the number of genotypes known so far and on what was told, in order. Telling a
    fresh controller the records of an earlier search therefore continues that search; no random state is kept.
    `origin` says where the last proposal came from: "given" (a seed), "random", or "bred" from what was told.
    """

    def __init__(
        self,
        settings: SearchConfig,
        space: SearchSpace,
        seed: int,
        budget: Fits,
        seeds: Sequence[Genotype] = (),
        costs: Costs | None = None,
    ):
        self.settings = settings
        self.space = space
        self.origin = "random"
        self._seed = seed
        self._budget = budget
        self._seeds = deque(seeds)
        self._costs = costs
        self._known: set[Genotype] = set()  # asked or told

    def ask(self) -> Genotype:
        """The next genotype to evaluate. Raises SpaceExhausted when none is left, UserError when none ever fits."""
        # The state of the generator follows from what is known, so a resumed search draws as if never interrupted.
        rng = random.Random(f"{self._seed}-{len(self._known)}")
        if len(self._known) < self.space.size():
            for genotype in self._candidates(rng):
                if genotype not in self._known and self._budget(genotype):
                    self._known.add(genotype)
                    return genotype
        if not self._known:
            raise UserError(f"search: none of {SAMPLE_TRIES} random sub-networks is within the budget: {self._budget}")
        raise SpaceExhausted(f"no further sub-network that fits was found; {len(self._known)} have been proposed")

    def tell(self, genotype: Genotype, metrics: Mapping[str, float] | None) -> None:
        """Learn the evaluation of a genotype, asked for or not; each is told once.

        Without metrics, or with an objective or cost that is not finite, the evaluation failed: `genotype` is never
        proposed again, nor bred from.
        """
        self.space.check(genotype)
        self._known.add(genotype)
        if metrics is not None:
            values = objective_values(metrics, self.settings.objective, self.settings.costs)
            if all(map(math.isfinite, values)):
                self._learn(Individual(genotype, values))

    def _candidates(self, rng: random.Random) -> Iterator[Genotype]:
        """The seeds, then children, then samples of the space, which reach its ends as well."""
        while self._seeds:
            self.origin = "given"
            yield self._seeds.popleft()
        for _ in range(CHILD_TRIES):
            yield self._propose(rng)
        for _ in range(SAMPLE_TRIES):
            yield self.space.sample_spread(rng)

    def _propose(self, rng: random.Random) -> Genotype:
        """A child once `population_size` genotypes are known, else a random genotype; it may be known or over budget.

        A child is a crossover of two parents with `crossover_probability`, else a mutation of one, as in SPOS (Guo et
        al., ECCV 2020).
        """
        settings = self.settings
        parent = self._select(rng) if len(self._known) >= settings.population_size else None
        self.origin = "random" if parent is None else "bred"
        if parent is None:
            return self.space.sample_spread(rng)
        if rng.random() < settings.crossover_probability:
            return self.space.crossover(parent, self._select(rng), rng)
        return self.space.mutate(parent, rng, settings.mutation_probability)

    def _select(self, rng: random.Random) -> Genotype | None:
        """One parent; None while nothing has been evaluated."""

    def _learn(self, individual: Individual) -> None:
        """Take in a genotype that was evaluated."""


class RandomSearch(Controller):
    """Samples of all costs, without repeats and without parents: the control that any other controller must beat."""


class RegularizedEvolution(Controller):
    """Aging evolution (Real et al., AAAI 2019, algorithm 1) with crossover: the best of a tournament is a parent, and
    each newcomer takes the place of the oldest, however good that one was."""

    _population: tuple[Individual, ...] = ()

    def _learn(self, individual: Individual) -> None:
        self._population = (*self._population, individual)[-self.settings.population_size :]

    def _select(self, rng: random.Random) -> Genotype | None:
        rivals = rng.sample(self._population, min(self.settings.tournament_size, len(self._population)))
        return max(rivals, key=lambda rival: rival.values[0]).genotype if rivals else None


class ParetoEvolution(Controller):
    """NSGA-II (Deb et al., 2002) one newcomer at a time: non-dominated sorting, then crowding distance, decide who
    wins a binary tournament and who leaves the population."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._fronts: list[list[Individual]] = []

    def _learn(self, individual: Individual) -> None:
        insert_into_fronts(self._fronts, individual)
        # A full population loses the member of the last front that has the least room.
        if sum(map(len, self._fronts)) > self.settings.population_size:
            last = self._fronts[-1]
            distances = crowding_distances([member.values for member in last])
            del last[distances.index(min(distances))]
            if not last:
                del self._fronts[-1]

    def _select(self, rng: random.Random) -> Genotype | None:
        members = [(rank, i) for rank, front in enumerate(self._fronts) for i in range(len(front))]
        rivals = rng.sample(members, min(2, len(members)))
        if not rivals:
            return None
        # The better front wins; within one front, the one with more room.
        rank = min(rivals)[0]
        front = self._fronts[rank]
        distances = crowding_distances([member.values for member in front])
        return front[max((i for r, i in rivals if r == rank), key=distances.__getitem__)].genotype


class SurrogateEvolution(ParetoEvolution):
    """Proposes, of many children and samples, the one that a ridge regression expects to gain most over the front.

    The regression predicts the objective as a sum over the choices at each position: image size, depths, widths and
    kernels of all blocks. `costs` are computed, not predicted.
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._column = {choice: i for i, choice in enumerate(self._choices_of_space(), start=1)}  # 0: the intercept
        size = 1 + len(self._column)
        self._gram, self._moments = np.zeros((size, size)), np.zeros(size)
        self._penalty = RIDGE * np.eye(size)
        self._penalty[0, 0] = 0.0

    def _choices_of_space(self) -> Iterator[tuple]:
        yield from (("size", size) for size in self.space.image_size)
        parts = [*self.space.stages, *(StageChoices((1,), block) for block in self.space.head)]
        for i, stage in enumerate(parts):
            yield from ((i, "depth", depth) for depth in stage.depth)
            for j, name in itertools.product(range(max(stage.depth)), ("expand", "kernel")):
                yield from ((i, j, name, value) for value in getattr(stage.block, name))

    def _row(self, genotype: Genotype) -> np.ndarray:
        """1 for the intercept and for each choice that `genotype` makes."""
        choices = [("size", genotype.image_size)]
        for i, blocks in enumerate((*genotype.stages, *((block,) for block in genotype.head))):
            choices.append((i, "depth", len(blocks)))
            for j, block in enumerate(blocks):
                choices += [(i, j, "expand", block.expand), (i, j, "kernel", block.kernel)]
        row = np.zeros(1 + len(self._column))
        row[[0, *map(self._column.__getitem__, choices)]] = 1.0
        return row

    def _learn(self, individual: Individual) -> None:
        super()._learn(individual)
        row = self._row(individual.genotype)
        self._gram += np.outer(row, row)
        self._moments += individual.values[0] * row

    def _candidates(self, rng: random.Random) -> Iterator[Genotype]:
        """First the most promising of a pool, once the population is known; then the candidates of the base class."""
        if not self._seeds and self._fronts and len(self._known) >= self.settings.population_size:
            pool: dict[Genotype, None] = {}  # each once, in order
            for _ in range(POOL // 2):
                pool |= {self._propose(rng): None, self.space.sample_spread(rng): None}
            new = [genotype for genotype in pool if genotype not in self._known and self._budget(genotype)]
            # Refitted for every proposal: with a few dozen choices this takes less than a millisecond.
            weights = np.linalg.solve(self._gram + self._penalty, self._moments)
            self.origin = "bred"
            yield from sorted(new, key=lambda genotype: self._expected_gain(genotype, weights), reverse=True)[:1]
        yield from super()._candidates(rng)

    def _expected_gain(self, genotype: Genotype, weights: np.ndarray) -> float:
        """The predicted objective minus the best one of the front at no higher cost."""
        costs = self._costs(genotype)
        values = [-costs[cost] for cost in self.settings.costs]
        rivals = [m.values[0] for m in self._fronts[0] if all(map(operator.ge, m.values[1:], values))]
        return float(self._row(genotype) @ weights) - max(rivals, default=0.0)


CONTROLLERS = {"random": RandomSearch, "evo": RegularizedEvolution, "pareto-evo": ParetoEvolution}
CONTROLLERS["surrogate"] = SurrogateEvolution


def make_controller(settings: SearchConfig, *args, **options) -> Controller:
    """The controller that `settings.controller` names; the arguments are those of `Controller`."""
    return CONTROLLERS[settings.controller](settings, *args, **options)


# The keys of the configuration that hold the least and the most of each cost.
LIMIT_KEYS = {cost: (f"min_{cost}", f"max_{cost}") for cost in ("flops", "params", "latency_ms")}
Limits = dict[str, tuple[float, float]]


def limits_of(settings: SearchConfig) -> Limits:
    """Least and most of each cost that has a limit. A limit of 0 means no limit."""
    limits = {cost: [getattr(settings, key) for key in keys] for cost, keys in LIMIT_KEYS.items()}
    return {cost: (low, high or math.inf) for cost, (low, high) in limits.items() if low or high}


class Budget:
    """`budget(genotype)` is whether a genotype is within all limits; `str(budget)` describes the limits.

    `costs` gives the costs of a genotype by name. Whether the limits can be met is left to the search.
    """

    def __init__(self, costs: Callable[[Genotype], Mapping[str, float]], space: SearchSpace, limits: Limits):
        self._costs = costs
        self._space = space
        self._limits = limits

    def __call__(self, genotype: Genotype) -> bool:
        costs = self._costs(genotype) if self._limits else {}
        return all(low <= costs[cost] <= high for cost, (low, high) in self._limits.items())

    def __str__(self) -> str:
        smallest, largest = self._space.smallest(), self._space.largest()
        parts = []
        for cost, (low, high) in self._limits.items():
            least, most = (self._costs(genotype)[cost] for genotype in (smallest, largest))
            keys = " and ".join(f"search.{key}" for key in LIMIT_KEYS[cost])
            parts.append(f"{cost} from {low:.4g} to {high:.4g} (sub-networks have {least:.4g} to {most:.4g}; {keys})")
        return ", ".join(parts) or "none"
