"""Pareto fronts against slow and obvious loops."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.controllers import Individual, best_record, crowding_distances, dominates, insert_into_fronts, pareto_front

POINTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 6)), max_size=40)


def slow_front(points: list[tuple]) -> list[tuple]:
    """Non-dominated points, all maximised: the definition, spelled out."""

    def beaten(p):
        return any(all(q[i] >= p[i] for i in range(len(p))) and any(q[i] > p[i] for i in range(len(p))) for q in points)

    return [p for p in points if not beaten(p)]


@settings(max_examples=100)
@given(POINTS)
def test_pareto_front_against_the_definition(points):
    records = [{"metrics": {"AP": ap, "flops": f, "params": p}} for ap, f, p in points]
    for costs in (["flops"], ["flops", "params"], []):
        front = pareto_front(records, "AP", costs)
        as_points = [(r["metrics"]["AP"], *(-r["metrics"][c] for c in costs)) for r in records]
        found = [(r["metrics"]["AP"], *(-r["metrics"][c] for c in costs)) for r in front]
        assert sorted(found) == sorted(slow_front(as_points))
        assert all(any(r is record for record in records) for r in front)
        if costs:
            assert [r["metrics"]["flops"] for r in front] == sorted(r["metrics"]["flops"] for r in front)


@settings(max_examples=100)
@given(POINTS)
def test_fronts_built_one_by_one_equal_fronts_peeled_off(points):
    fronts: list[list[Individual]] = []
    for point in points:
        insert_into_fronts(fronts, Individual(None, point))
    rest, peeled = list(points), []
    while rest:
        peeled.append(sorted(slow_front(rest)))
        rest = [p for p in rest if p not in peeled[-1]]
    assert [sorted(member.values for member in front) for front in fronts] == peeled


def test_crowding_distances_by_hand():
    """The middle points' neighbours span 3/4 and 3/4 of the first objective, 4/6 and 5/6 of the second."""
    front = [(0.0, 6.0), (1.0, 5.0), (3.0, 2.0), (4.0, 0.0)]
    assert crowding_distances(front) == [math.inf, pytest.approx(3 / 4 + 4 / 6), pytest.approx(3 / 4 + 5 / 6), math.inf]
    assert crowding_distances([(1.0, 1.0)] * 3).count(0.0) == 1  # no span at all: no division by zero


def test_dominance_needs_one_strict_advantage():
    assert dominates((2, 1), (1, 1))
    assert not dominates((1, 1), (1, 1))
    assert not dominates((2, 0), (1, 1))


def test_the_best_of_equals_is_the_cheapest():
    records = [{"metrics": {"AP": ap, "flops": flops}} for ap, flops in ((0.5, 3), (0.5, 2), (0.4, 1))]
    assert best_record(records, "AP") is records[1]
