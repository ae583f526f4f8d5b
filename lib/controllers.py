"""Pareto fronts: what dominates what, the front of evaluations, and fronts that newcomers are sorted into.

Search controllers with one ask / tell interface: random, regularized evolution, Pareto evolution.

Pure: no processes, no files, no torch. Many asks may come before their tells, and tells come in any order.
"""

from __future__ import annotations

import itertools
import math
import operator
import random
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from lib.errors import UserError, did_you_mean
from lib.genotype import Block, BlockChoices, Genotype, SearchSpace


class Valued(Protocol):
    """What can stand in a front."""

    @property
    def values(self) -> tuple[float, ...]:
        """All to be maximised."""


Record = TypeVar("Record", bound=Mapping)
Member = TypeVar("Member", bound=Valued)


def pareto_front(records: Iterable[Record], objective: str, costs: Sequence[str]) -> list[Record]:
    """The records whose "metrics" no other record's dominate, cheapest first. Equally good ones all stay.

    One record dominates another if it is no worse in the objective (maximised) and in every cost (minimised), and
    better in one of them.
    """
    scored = [(objective_values(record["metrics"], objective, costs), record) for record in records]
    scored.sort(key=lambda pair: pair[0], reverse=True)  # so that whatever dominates a record comes before it
    front: list[tuple[tuple[float, ...], Record]] = []
    for values, record in scored:
        if not any(dominates(other, values) for other, _ in front):
            front.append((values, record))
    return [record for _, record in sorted(front, key=lambda pair: pair[0][1:], reverse=True)]


def best_record(records: Iterable[Record], objective: str, cost: str = "flops") -> Record:
    """Highest objective, the cheapest among equals."""
    return max(records, key=lambda r: (r["metrics"][objective], -r["metrics"][cost]))


def objective_values(metrics: Mapping[str, float], objective: str, costs: Sequence[str]) -> tuple[float, ...]:
    """`metrics` as numbers to maximise: the objective, then each cost negated."""
    for name in (objective, *costs):
        if name not in metrics:
            raise UserError(f"search: the evaluations hold no metric '{name}'{did_you_mean(name, metrics)}")
    return (metrics[objective], *(-metrics[cost] for cost in costs))


def dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether `a` is no worse than `b` everywhere and better somewhere; larger is better."""
    return a != b and all(map(operator.ge, a, b))


def insert_into_fronts(fronts: list[list[Member]], newcomer: Member) -> None:
    """Insert into non-dominated fronts, best first, in place (ENLU: Li et al., IEEE Trans. Cybernetics 2017).

    Whoever is dominated by an arrival of its front moves to the next one, and may push others on. Leaving the last
    front disturbs no other, so sorting from scratch is never needed.
    """
    rank = 0
    while rank < len(fronts) and any(dominates(member.values, newcomer.values) for member in fronts[rank]):
        rank += 1
    arrivals = [newcomer]
    while arrivals and rank < len(fronts):
        stay, leave = [], []
        for member in fronts[rank]:
            pushed = any(dominates(arrival.values, member.values) for arrival in arrivals)
            (leave if pushed else stay).append(member)
        fronts[rank] = stay + arrivals
        arrivals, rank = leave, rank + 1
    if arrivals:
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


CHILD_TRIES = 1_000  # children in a row that may be rejected before a proposal is sampled from the whole space
SAMPLE_TRIES = 10_000  # samples in a row that may be rejected before the space counts as exhausted
MAX_PULLS = 8  # after 8 crossovers with a corner of the space, about 1 choice in 256 still differs from it
TYPICAL = 0.5  # of all tournaments are won by a better one than the rival that a newcomer must not clearly lose to
ENUMERABLE = 20_000  # spaces up to this size are listed in full, so that their last genotypes are found too


class SpaceExhausted(Exception):
    """Every genotype that fits has been proposed: a clean end of the search, not a mistake."""


@dataclass(frozen=True)
class Individual:
    """An evaluated genotype. Every number in `values` is to be maximised: the objective, then each cost negated."""

    genotype: Genotype
    values: tuple[float, ...]


class Controller(ABC):
    """What all controllers share: what was asked or told already is never asked again.

    `feasible` judges proposals before they cost anything; what is told is not judged, so tell only what fits.
    `seeds` that fit are asked first. `objective` and `costs` name the metrics to maximise and to minimise. `budget`
    says in words what is feasible, for the error when nothing is.

    A proposal depends on `seed`, on the number of genotypes known so far and on what was told, in order. Telling a
    fresh controller the records of an earlier search therefore continues that search; no random state is kept.

    `origin` says where the last proposal came from: "given" (a seed), "random", or "bred" from what was told.
    """

    def __init__(
        self,
        space: SearchSpace,
        seed: int,
        feasible: Callable[[Genotype], bool],
        *,
        seeds: Sequence[Genotype] = (),
        objective: str = "AP",
        costs: Sequence[str] = (),
        budget: str = "",
    ):
        for genotype in seeds:
            space.check(genotype)
        self.space = space
        self._seed = seed
        self._feasible, self._budget = feasible, budget
        self._seeds = deque(seeds)
        self._objective, self._costs = objective, tuple(costs)
        self._front: list[Individual] = []  # of all that was told
        self._known: set[Genotype] = set()  # asked or told
        self._told: set[Genotype] = set()
        self._leftovers: list[Genotype] | None = None  # all that is new, once blind tries no longer find it
        self.origin = "random"

    def ask(self) -> Genotype:
        """The next genotype to evaluate. Raises SpaceExhausted when none is left, UserError when none ever fits."""
        genotype = self._draw(random.Random(f"{self._seed}-{len(self._known)}"))
        self._known.add(genotype)
        return genotype

    def tell(self, genotype: Genotype, metrics: Mapping[str, float]) -> None:
        """Learn an evaluation, asked for or not. A second tell of a genotype changes nothing.

        An objective or cost that is not finite counts as a failure.
        """
        values = objective_values(metrics, self._objective, self._costs)
        if self._first_tell(genotype) and all(map(math.isfinite, values)):
            individual = Individual(genotype, values)
            if not any(dominates(member.values, values) for member in self._front):
                self._front = [m for m in self._front if not dominates(values, m.values)] + [individual]
            self._learn(individual)

    def tell_failure(self, genotype: Genotype) -> None:
        """No full evaluation will come, it failed or was stopped: never propose `genotype` again, nor breed from it."""
        self._first_tell(genotype)

    def rivals(self, costs: Mapping[str, float]) -> list[Genotype]:
        """Genotypes told before. A newcomer with these `costs` that is worse than all of them makes no difference.

        It would neither join the front nor become a parent. Empty where any newcomer may make a difference.
        """
        rival = self._best_at(self._front, costs)
        return [rival.genotype] if rival else []

    def _best_at(self, members: Iterable[Individual], costs: Mapping[str, float]) -> Individual | None:
        """The best of those that cost no more."""
        limits = [-costs[name] for name in self._costs]
        cheaper = (m for m in members if all(map(operator.ge, m.values[1:], limits)))
        return max(cheaper, key=lambda m: m.values[0], default=None)

    def _first_tell(self, genotype: Genotype) -> bool:
        if genotype in self._told:
            return False
        self.space.check(genotype)
        self._known.add(genotype)
        self._told.add(genotype)
        return True

    def _draw(self, rng: random.Random) -> Genotype:
        while self._seeds:
            if self._is_new(genotype := self._seeds.popleft()):
                self.origin = "given"
                return genotype
        if self._leftovers is None and len(self._known) < self.space.size():
            for genotype in self._candidates(rng):
                if self._is_new(genotype):
                    return genotype
            small = self.space.size() <= ENUMERABLE
            self._leftovers = list(filter(self._is_new, every_genotype(self.space))) if small else []
        self._leftovers = [g for g in self._leftovers or () if g not in self._known]
        if self._leftovers:
            return rng.choice(self._leftovers)
        if not self._known:
            budget = f": {self._budget}" if self._budget else ""
            raise UserError(f"search: no sub-network within the budget was found in {SAMPLE_TRIES} tries{budget}")
        raise SpaceExhausted(f"every sub-network that fits has been proposed ({len(self._known)} in all)")

    def _candidates(self, rng: random.Random) -> Iterator[Genotype]:
        """Children, then samples of the space, pulled ever closer to its corners: there a tight budget is met."""
        for _ in range(CHILD_TRIES):
            yield self._propose(rng)
        corners = self.space.smallest(), self.space.largest()
        for attempt in range(SAMPLE_TRIES):
            genotype, corner = self.space.sample(rng), rng.choice(corners)
            for _ in range(attempt * (MAX_PULLS + 1) // SAMPLE_TRIES):
                genotype = self.space.crossover(genotype, corner, rng)
            yield genotype

    def _is_new(self, genotype: Genotype) -> bool:
        return genotype not in self._known and self._feasible(genotype)

    @abstractmethod
    def _propose(self, rng: random.Random) -> Genotype:
        """A genotype, known or feasible or not."""

    @abstractmethod
    def _learn(self, individual: Individual) -> None:
        """Take in one that was evaluated."""


class RandomSearch(Controller):
    """Uniform sampling without repeats, the control that any other controller must beat."""

    def _propose(self, rng: random.Random) -> Genotype:
        self.origin = "random"
        return self.space.sample(rng)

    def _learn(self, individual: Individual) -> None:
        """What was found does not guide this search."""


class _Evolution(Controller):
    """Children of selected parents, once `population_size` genotypes are known; random genotypes before.

    A child is a crossover of two parents with `crossover_probability`, else a mutation of one, as in SPOS (Guo et al.,
    ECCV 2020).
    """

    def __init__(
        self,
        *args,
        population_size: int = 100,
        mutation_probability: float = 0.1,
        crossover_probability: float = 0.5,
        **common,
    ):
        super().__init__(*args, **common)
        self._population_size = population_size
        self._mutation_probability = mutation_probability
        self._crossover_probability = crossover_probability

    def _propose(self, rng: random.Random) -> Genotype:
        parent = self._select(rng) if len(self._known) >= self._population_size else None
        self.origin = "random" if parent is None else "bred"
        if parent is None:
            return self.space.sample(rng)
        if rng.random() < self._crossover_probability:
            return self.space.crossover(parent, self._select(rng), rng)
        return self.space.mutate(parent, rng, self._mutation_probability)

    @abstractmethod
    def _select(self, rng: random.Random) -> Genotype | None:
        """One parent; None while nothing has been evaluated."""


class RegularizedEvolution(_Evolution):
    """Aging evolution (Real et al., AAAI 2019, algorithm 1) with crossover: the best of a tournament is a parent, and
    each newcomer takes the place of the oldest, however good that one was."""

    def __init__(self, *args, tournament_size: int = 10, **common):
        super().__init__(*args, **common)
        self._tournament_size = tournament_size
        self._population: deque[Individual] = deque(maxlen=self._population_size)

    def _learn(self, individual: Individual) -> None:
        self._population.append(individual)

    def rivals(self, costs: Mapping[str, float]) -> list[Genotype]:
        """Beside the front's, the typical winner of a tournament."""
        found = super().rivals(costs)
        if len(self._population) < self._population_size:
            return []
        ordered = sorted(self._population, key=lambda member: member.values[0])
        last = int(len(ordered) * (1 - TYPICAL) ** (1 / self._tournament_size))
        return [*found, ordered[min(last, len(ordered) - 1)].genotype] if found else []

    def _select(self, rng: random.Random) -> Genotype | None:
        rivals = rng.sample(self._population, min(self._tournament_size, len(self._population)))
        return max(rivals, key=lambda rival: rival.values[0]).genotype if rivals else None


class ParetoEvolution(_Evolution):
    """NSGA-II (Deb et al., 2002) one newcomer at a time: non-dominated sorting, then crowding distance, decide who
    wins a binary tournament and who leaves the population."""

    def __init__(self, *args, **common):
        super().__init__(*args, **common)
        self._fronts: list[list[Individual]] = []

    def _learn(self, individual: Individual) -> None:
        insert_into_fronts(self._fronts, individual)
        if sum(map(len, self._fronts)) > self._population_size:
            last = self._fronts[-1]
            distances = crowding_distances([member.values for member in last])
            del last[distances.index(min(distances))]
            if not last:
                del self._fronts[-1]

    def rivals(self, costs: Mapping[str, float]) -> list[Genotype]:
        """Whom the last front dominates, that one leaves a full population at once."""
        if sum(map(len, self._fronts)) < self._population_size:
            return []
        rival = self._best_at(self._fronts[-1], costs)
        return [rival.genotype] if rival else []

    def _select(self, rng: random.Random) -> Genotype | None:
        members = [(rank, i) for rank, front in enumerate(self._fronts) for i in range(len(front))]
        rivals = rng.sample(members, min(2, len(members)))
        if not rivals:
            return None
        rank = min(rivals)[0]
        front = self._fronts[rank]
        distances = crowding_distances([member.values for member in front])
        return front[max((i for r, i in rivals if r == rank), key=distances.__getitem__)].genotype


def make_controller(
    name: str,
    space: SearchSpace,
    seed: int,
    feasible: Callable[[Genotype], bool],
    *,
    objective: str = "AP",
    costs: Sequence[str] = ("flops",),
    seeds: Sequence[Genotype] = (),
    population_size: int = 100,
    tournament_size: int = 10,
    mutation_probability: float = 0.1,
    crossover_probability: float = 0.5,
) -> Controller:
    """The controller called `name`: "random", "evo" or "pareto-evo", the only one that `costs` guide."""
    evolution = {
        "population_size": population_size,
        "mutation_probability": mutation_probability,
        "crossover_probability": crossover_probability,
    }
    if name == "random":
        return RandomSearch(space, seed, feasible, seeds=seeds, objective=objective, costs=costs)
    if name == "evo":
        evolution["tournament_size"] = tournament_size
        return RegularizedEvolution(space, seed, feasible, seeds=seeds, objective=objective, costs=costs, **evolution)
    if name == "pareto-evo":
        return ParetoEvolution(space, seed, feasible, seeds=seeds, objective=objective, costs=costs, **evolution)
    raise UserError(f"search: unknown controller '{name}'{did_you_mean(name, ['random', 'evo', 'pareto-evo'])}")


def every_genotype(space: SearchSpace) -> Iterator[Genotype]:
    """All `space.size()` genotypes of the space."""

    def blocks(choices: BlockChoices) -> list[Block]:
        return [Block(expand, kernel) for expand in choices.expand for kernel in choices.kernel]

    stages = [[s for depth in c.depth for s in itertools.product(blocks(c.block), repeat=depth)] for c in space.stages]
    heads = map(blocks, space.head)
    choices = space.image_size, itertools.product(*stages), itertools.product(*heads)
    for image_size, chosen, head in itertools.product(*choices):
        yield Genotype(image_size, space.backbone_type, chosen, head)
