"""Pareto fronts: what dominates what, the front of evaluations, and fronts that newcomers are sorted into."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

from lib.errors import UserError, did_you_mean


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
