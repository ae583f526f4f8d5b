"""Budgets: least and most of each cost, the reachable range, and the end of a search that nothing fits."""

from __future__ import annotations

import random
import re

import pytest
from search_records import every_genotype

from lib.budget import Budget, extreme, limits_of
from lib.config import SearchConfig
from lib.controllers import SAMPLE_TRIES, RandomSearch, make_controller
from lib.errors import UserError
from lib.genotype import BlockChoices, SearchSpace, StageChoices

SPACE = SearchSpace(
    "mbv3_backbone",
    (64, 96),
    (
        StageChoices((1,), BlockChoices((1,), (3,))),
        StageChoices((1, 2), BlockChoices((3, 6), (3, 5))),
        StageChoices((2,), BlockChoices((4,), (3, 5))),
    ),
    (BlockChoices((0.25, 0.5), (3,)),),
)


def additive_costs(seed):
    """A cost that is a random number for each block of each position, and grows with the image size as it likes."""
    rng = random.Random(seed)
    numbers: dict = {}

    def number(*key):
        return numbers.setdefault(key, rng.uniform(0.1, 9))

    def costs(g):
        blocks = [number(g.image_size, i, j, b) for i, stage in enumerate(g.stages) for j, b in enumerate(stage)]
        heads = [number(g.image_size, "head", i, b) for i, b in enumerate(g.head)]
        return {"flops": sum(blocks + heads), "params": 10 * len(blocks)}

    return costs


@pytest.mark.parametrize("seed", range(3))
def test_the_extremes_are_those_of_a_full_list(seed):
    costs = additive_costs(seed)
    cost = lambda g: costs(g)["flops"]  # noqa: E731
    values = [cost(g) for g in every_genotype(SPACE)]
    assert cost(extreme(SPACE, cost, min)) == pytest.approx(min(values))
    assert cost(extreme(SPACE, cost, max)) == pytest.approx(max(values))


def test_a_budget_admits_what_is_within_all_limits():
    costs = additive_costs(0)
    budget = Budget(costs, SPACE, {"flops": (20.0, 30.0), "params": (0, 50)})
    admitted = [g for g in every_genotype(SPACE) if budget(g)]
    expected = [g for g in every_genotype(SPACE) if 20 <= costs(g)["flops"] <= 30 and costs(g)["params"] <= 50]
    assert admitted == expected and 0 < len(admitted) < SPACE.size()


def test_no_limit_admits_all_and_costs_nothing():
    budget = Budget(lambda g: 1 / 0, SPACE, {})
    assert budget(SPACE.largest()) and str(budget) == "none"


@pytest.mark.parametrize("side", ["min", "max"])
def test_out_of_reach_is_an_error_that_names_the_range(side):
    costs = additive_costs(1)
    values = [costs(g)["flops"] for g in every_genotype(SPACE)]
    beyond, just = {"min": (max(values) * 1.01, max(values)), "max": (min(values) * 0.99, min(values))}[side]
    limits = lambda x: {"flops": (x, float("inf")) if side == "min" else (0, x)}  # noqa: E731
    words = f"search.{side}_flops: {beyond:.4g} is out of reach, sub-networks have {min(values):.4g} to "
    with pytest.raises(UserError, match=re.escape(words + f"{max(values):.4g}")):
        Budget(costs, SPACE, limits(beyond))
    Budget(costs, SPACE, limits(just * (1 - 1e-9 if side == "min" else 1 + 1e-9)))  # what one sub-network meets


@pytest.mark.parametrize("name", ["random", "evo", "pareto-evo"])
def test_a_controller_proposes_what_fits_and_then_ends(name):
    costs = additive_costs(2)
    ranked = sorted(every_genotype(SPACE), key=lambda g: costs(g)["flops"])
    low, high = costs(ranked[20])["flops"], costs(ranked[29])["flops"]
    budget = Budget(costs, SPACE, {"flops": (low, high)})
    controller = make_controller(SearchConfig(controller=name, population_size=5), SPACE, 0, budget)
    found = []
    for _ in range(10):
        found.append(controller.ask())
        controller.tell(found[-1], {"AP": 0.5, **costs(found[-1])})
    assert sorted(found, key=lambda g: costs(g)["flops"]) == ranked[20:30]


def test_limits_that_exclude_each_other_end_after_a_bounded_number_of_tries():
    """Each can be met, both together cannot: what is cheap is small."""
    judged = []

    def costs(g):
        judged.append(g)
        size = sum(b.expand * b.kernel for stage in g.stages for b in stage)
        return {"flops": size, "params": 100 * size}

    budget = Budget(costs, SPACE, {"flops": (0, 50), "params": (5001, float("inf"))})
    judged.clear()
    words = rf"no sub-network within the budget was found in {SAMPLE_TRIES} tries: flops .*to 50 \(sub-networks have "
    with pytest.raises(UserError, match=words):
        RandomSearch(SearchConfig(), SPACE, 0, budget).ask()
    assert len(judged) <= 1_000 + SAMPLE_TRIES + SPACE.size()


def test_the_limits_of_a_configuration(tiny_config):
    assert limits_of(tiny_config().search) == {}
    settings = tiny_config(search__max_flops=3e6, search__min_params=100, search__max_latency_ms=2.5).search
    assert limits_of(settings) == {"flops": (0, 3e6), "params": (100, float("inf")), "latency_ms": (0, 2.5)}
