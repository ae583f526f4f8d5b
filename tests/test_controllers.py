"""Controllers: no repeats, asynchrony, exhaustion, replay, aging; fronts against slow loops; budgets."""

from __future__ import annotations

import math
import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from search_records import every_genotype

from lib import UserError
from lib.config import SearchConfig
from lib.controllers import (
    RIDGE,
    SAMPLE_TRIES,
    Budget,
    Individual,
    RandomSearch,
    SpaceExhausted,
    crowding_distances,
    dominates,
    insert_into_fronts,
    limits_of,
    make_controller,
    pareto_front,
)
from lib.genotype import BlockChoices, Genotype, SearchSpace, StageChoices

NAMES = ["random", "evo", "pareto-evo", "surrogate"]


def make_space(stages: int = 1, kind: type[SearchSpace] = SearchSpace) -> SearchSpace:
    """2 * (6 + 6**2)**stages genotypes: 84 with one stage."""
    stage = StageChoices((1, 2), BlockChoices((3, 4, 6), (3, 5)))
    return kind("mbv3_backbone", (64, 96), (stage,) * stages, (BlockChoices((0.5,), (3,)),))


def flops(genotype: Genotype) -> int:
    return genotype.image_size * sum(b.expand * b.kernel**2 for stage in genotype.stages for b in stage)


def metrics(genotype: Genotype) -> dict[str, float]:
    """A toy with a conflict: larger is better, with returns that diminish and a taste for 5x5 kernels."""
    kernels = sum(b.kernel == 5 for stage in genotype.stages for b in stage)
    return {"AP": math.log(flops(genotype)) + 0.1 * kernels, "flops": flops(genotype)}


def everything_fits(genotype: Genotype) -> bool:
    return True


def make(name: str, space: SearchSpace | None = None, feasible=everything_fits, seed: int = 0, seeds=(), **options):
    options = {"population_size": 10, "tournament_size": 3, **options}
    space = space or make_space()
    return make_controller(SearchConfig(controller=name, **options), space, seed, feasible, seeds, costs=metrics)


def search(controller, steps: int) -> list[Genotype]:
    asked = []
    for _ in range(steps):
        asked.append(controller.ask())
        controller.tell(asked[-1], metrics(asked[-1]))
    return asked


class ParentSpy(SearchSpace):
    """A space that notes who became a parent."""

    parents: list[Genotype] = []  # noqa: RUF012 - emptied by each test that reads it

    def mutate(self, parent, rng, probability=0.1):
        self.parents.append(parent)
        return super().mutate(parent, rng, probability)

    def crossover(self, a, b, rng):
        self.parents.extend((a, b))
        return super().crossover(a, b, rng)


# What all controllers share


@pytest.mark.parametrize("name", NAMES)
def test_a_small_space_is_proposed_once_in_full_then_ends(name):
    controller = make(name)
    asked = search(controller, make_space().size())
    assert len(set(asked)) == len(asked)
    assert set(asked) == set(every_genotype(make_space()))
    for _ in range(2):
        with pytest.raises(SpaceExhausted):
            controller.ask()


@pytest.mark.parametrize("name", NAMES)
def test_only_and_all_genotypes_within_the_budget_are_proposed(name):
    limit = sorted(map(flops, every_genotype(make_space())))[30]
    fits = {g for g in every_genotype(make_space()) if flops(g) <= limit}
    controller = make(name, feasible=lambda g: flops(g) <= limit)
    assert set(search(controller, len(fits))) == fits
    with pytest.raises(SpaceExhausted):
        controller.ask()


@pytest.mark.parametrize("name", NAMES)
def test_a_space_with_one_genotype(name):
    single = SearchSpace("mbv3_backbone", (64,), (StageChoices((1,), BlockChoices((3,), (3,))),), ())
    controller = make(name, single, population_size=1)
    assert search(controller, 1) == [single.smallest()]
    with pytest.raises(SpaceExhausted):
        controller.ask()


@pytest.mark.parametrize("name", NAMES)
def test_a_budget_that_nothing_meets_is_an_error_not_a_loop(name):
    with pytest.raises(UserError, match="none of 10000 random sub-networks is within"):
        make(name, make_space(5), feasible=lambda g: False).ask()


@pytest.mark.parametrize("corner", ["smallest", "largest"])
def test_a_tight_budget_is_met_in_a_large_space(corner):
    """By chance, about one sample in 42**8 would do: the smallest itself, or one choice away from it."""
    space = make_space(8)
    limit = flops(getattr(space, corner)())
    controller = make("evo", space, feasible=lambda g: abs(flops(g) - limit) <= 0.05 * limit)
    assert len(set(search(controller, 5))) == 5


@pytest.mark.parametrize("name", NAMES)
def test_many_asks_before_their_tells_which_come_in_any_order(name):
    controller, rng = make(name, make_space(4)), random.Random(0)
    running, asked = [], []
    for _ in range(150):
        while len(running) < 8:
            running.append(controller.ask())
            asked.append(running[-1])
        genotype = running.pop(rng.randrange(len(running)))
        controller.tell(genotype, metrics(genotype))
    assert len(set(asked)) == len(asked)


@pytest.mark.parametrize("name", NAMES)
def test_asks_without_any_tell_never_stop_or_repeat(name):
    controller = make(name, make_space(3))
    assert len({controller.ask() for _ in range(50)}) == 50


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_and_calls_give_the_same_search(name):
    runs = [search(make(name, make_space(4), seed=seed), 60) for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


@pytest.mark.parametrize("name", NAMES)
def test_replay_continues_as_if_never_interrupted(name):
    whole = search(make(name, make_space(4)), 60)
    resumed = make(name, make_space(4))
    for genotype in whole[:37]:
        resumed.tell(genotype, metrics(genotype))
    assert search(resumed, 23) == whole[37:]


@pytest.mark.parametrize("name", NAMES)
def test_what_was_told_without_asking_is_not_asked(name):
    controller, known = make(name), list(every_genotype(make_space()))[:60]
    for genotype in known:
        controller.tell(genotype, metrics(genotype))
    assert not set(search(controller, 24)) & set(known)


@pytest.mark.parametrize("name", NAMES)
def test_seeds_come_first_each_once_unless_known_or_too_dear(name):
    space = make_space(3)
    seeds = [space.largest(), space.smallest(), space.smallest(), space.sample(random.Random(5))]
    controller = make(name, space, seeds=seeds, feasible=lambda g: g != space.largest())
    controller.tell(seeds[3], metrics(seeds[3]))
    asked = search(controller, 20)
    assert asked[0] == space.smallest()
    assert not {space.largest(), seeds[3]} & set(asked)


def test_a_tell_outside_the_space_is_refused():
    stranger = make_space(2).smallest()
    with pytest.raises(UserError, match="number of stages is 2"):
        make("random").tell(stranger, {"AP": 1.0, "flops": 1.0})


@pytest.mark.parametrize("name", NAMES[1:])
@pytest.mark.parametrize("how", ["failure", "nan"])
def test_a_failed_genotype_is_neither_proposed_again_nor_a_parent(name, how):
    ParentSpy.parents.clear()
    space = make_space(3, ParentSpy)
    controller, failed, asked = make(name, space), set(), []
    for step in range(80):
        asked.append(controller.ask())
        if step % 3 == 0:
            failed.add(asked[-1])
            if how == "failure":
                controller.tell(asked[-1], None)
            else:
                controller.tell(asked[-1], {"AP": math.nan, "flops": 1})
        else:
            controller.tell(asked[-1], metrics(asked[-1]))
    assert len(set(asked)) == len(asked)
    assert ParentSpy.parents
    assert not failed & set(ParentSpy.parents)


@pytest.mark.parametrize("name", NAMES[1:])
def test_when_all_evaluations_fail_the_search_goes_on_at_random(name):
    controller = make(name, make_space(3))
    asked = set()
    for _ in range(40):
        asked.add(controller.ask())
        controller.tell(max(asked, key=str), None)
    assert len(asked) == 40


# Regularized evolution


def test_the_oldest_dies_even_if_it_is_the_best():
    ParentSpy.parents.clear()
    space = make_space(3, ParentSpy)
    controller = make("evo", space, population_size=3, tournament_size=3, costs=[])
    best, *others = (space.sample(random.Random(i)) for i in range(4))
    for score, genotype in zip([1.0, 0.1, 0.2, 0.3], [best, *others], strict=True):
        controller.tell(genotype, {"AP": score})
    for _ in range(10):
        controller.ask()
    assert set(ParentSpy.parents) == {others[2]}  # the best of the three youngest wins every full tournament


@pytest.mark.parametrize(("probability", "used"), [(0.0, {"mutate"}), (1.0, {"crossover"})])
def test_mutation_and_crossover_are_both_there(monkeypatch, probability, used):
    calls = set()
    for method in ("mutate", "crossover"):
        original = getattr(SearchSpace, method)
        monkeypatch.setattr(
            SearchSpace, method, lambda *a, _o=original, _m=method, **k: (calls.add(_m), _o(*a, **k))[1]
        )
    search(make("evo", make_space(4), crossover_probability=probability), 25)
    assert calls == used


def test_evolution_beats_random_search():
    """Under a budget, so that the best is not the largest, which random samples find."""
    space, steps, seeds = make_space(6), 200, range(4)
    most = 0.3 * flops(space.largest())

    def best(name: str, seed: int) -> float:
        controller = make(name, space, lambda g: flops(g) <= most, seed=seed, population_size=30)
        return max(metrics(g)["AP"] for g in search(controller, steps))

    for seed in seeds:
        assert best("evo", seed) > best("random", seed)


# Pareto evolution


def test_pareto_evolution_keeps_the_front_of_all_it_was_told():
    controller = make("pareto-evo", make_space(4), population_size=150)
    asked = search(controller, 300)
    front = pareto_front([{"genotype": g, "metrics": metrics(g)} for g in asked], "AP", ["flops"])
    assert 1 < len(front) <= 150
    survivors = {member.genotype for rank in controller._fronts for member in rank}
    assert len(survivors) == 150
    assert {record["genotype"] for record in front} <= survivors


def test_pareto_evolution_finds_a_better_front_than_random_search():
    def volume(controller) -> float:
        """Area dominated within flops <= the largest net's and AP >= the smallest net's, by sweeping the front."""
        space = make_space(6)
        records = [{"metrics": metrics(g)} for g in search(controller, 300)]
        points = [(r["metrics"]["flops"], r["metrics"]["AP"]) for r in pareto_front(records, "AP", ["flops"])]
        ends = [f for f, _ in points[1:]] + [flops(space.largest())]
        floor = metrics(space.smallest())["AP"]
        return sum((end - f) * (ap - floor) for (f, ap), end in zip(points, ends, strict=True))

    for seed in range(3):
        evolved, at_random = (
            make(name, make_space(6), seed=seed, population_size=40) for name in ("pareto-evo", "random")
        )
        assert volume(evolved) > volume(at_random)


@pytest.mark.parametrize("name", NAMES)
def test_a_proposal_says_where_it_came_from(name):
    space = make_space()
    given = space.largest()
    controller = make(name, space, seeds=[given])
    origins = []
    for genotype in iter(lambda: controller.ask() if len(origins) < 40 else None, None):
        origins.append(controller.origin)
        controller.tell(genotype, metrics(genotype))
    assert origins == ["given"] + ["random"] * 9 + ["random" if name == "random" else "bred"] * 30


# Fronts


POINTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 6)), max_size=40)


def slow_front(points: list[tuple]) -> list[tuple]:
    """Non-dominated points, all maximised: the definition, spelled out."""

    def beaten(p):
        return any(all(q[i] >= p[i] for i in range(len(p))) and any(q[i] > p[i] for i in range(len(p))) for q in points)

    return [p for p in points if not beaten(p)]


@settings(max_examples=50)
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


@settings(max_examples=50)
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
    costs = lambda g: {"flops": flops(g)}  # noqa: E731
    values = sorted(map(flops, every_genotype(SPACE)))

    def ask(limit: float) -> Genotype:
        budget = Budget(costs, SPACE, {"flops": (limit, math.inf) if side == "min" else (0, limit)})
        return RandomSearch(SearchConfig(), SPACE, 0, budget).ask()

    beyond, just = {"min": (values[-1] + 1, values[-1]), "max": (values[0] - 1, values[0])}[side]
    words = f"{beyond:.4g}.* (sub-networks have {values[0]:.4g} to {values[-1]:.4g}; search.min_flops and .*max_flops)"
    with pytest.raises(UserError, match=".*".join(map(re.escape, words.split(".*")))):
        ask(beyond)
    assert flops(ask(just)) == just  # what one sub-network meets


@pytest.mark.parametrize("name", NAMES)
def test_a_controller_proposes_what_fits_and_then_ends(name):
    costs = additive_costs(2)
    ranked = sorted(every_genotype(SPACE), key=lambda g: costs(g)["flops"])
    low, high = costs(ranked[20])["flops"], costs(ranked[29])["flops"]
    budget = Budget(costs, SPACE, {"flops": (low, high)})
    controller = make_controller(SearchConfig(controller=name, population_size=5), SPACE, 0, budget, costs=costs)
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
    words = rf"none of {SAMPLE_TRIES} random sub-networks is within the budget: flops .*to 50 \(sub-networks have "
    with pytest.raises(UserError, match=words):
        RandomSearch(SearchConfig(), SPACE, 0, budget).ask()
    assert len(judged) <= 1_000 + SAMPLE_TRIES + SPACE.size()


def test_the_limits_of_a_configuration(tiny_config):
    assert limits_of(tiny_config().search) == {}
    settings = tiny_config(search__max_flops=3e6, search__min_params=100, search__max_latency_ms=2.5).search
    assert limits_of(settings) == {"flops": (0, 3e6), "params": (100, float("inf")), "latency_ms": (0, 2.5)}


# The surrogate.


def test_the_surrogates_weights_are_those_of_a_ridge_regression_on_every_choice():
    controller = make("surrogate", make_space(3))
    asked = search(controller, 40)
    rows = np.array([controller._row(genotype) for genotype in asked])
    assert (rows.sum(0) > 0).sum() > 20  # most choices were made
    for genotype, row in zip(asked, rows, strict=True):
        named = {choice for choice, column in controller._column.items() if row[column]}
        assert ("size", genotype.image_size) in named and (0, "depth", genotype.depths[0]) in named
        assert (1, 0, "kernel", genotype.stages[1][0].kernel) in named and row.sum() == 1 + len(named)
    targets = np.array([metrics(genotype)["AP"] for genotype in asked])
    weights = np.linalg.solve(controller._gram + controller._penalty, controller._moments)
    # The penalty as further observations of zero, one for each weight but the intercept, by another solver.
    penalty = np.sqrt(RIDGE) * np.eye(rows.shape[1])[1:]
    expected, *_ = np.linalg.lstsq(np.vstack([rows, penalty]), np.append(targets, np.zeros(len(penalty))), rcond=None)
    np.testing.assert_allclose(rows @ weights, rows @ expected, atol=1e-8)


def test_the_surrogate_proposes_what_gains_most_over_the_front():
    controller = make("surrogate", make_space(3))
    search(controller, 30)
    weights = np.linalg.solve(controller._gram + controller._penalty, controller._moments)
    genotype = controller.ask()
    front = pareto_front([{"metrics": metrics(g)} for g in controller._known - {genotype}], "AP", ["flops"])
    cheaper = [m["metrics"]["AP"] for m in front if m["metrics"]["flops"] <= flops(genotype)]
    gain = controller._row(genotype) @ weights - max(cheaper, default=0.0)
    assert controller._expected_gain(genotype, weights) == pytest.approx(gain)
    others = [controller._expected_gain(controller.space.sample_spread(random.Random(i)), weights) for i in range(50)]
    assert gain > np.quantile(others, 0.9) and controller.origin == "bred"


def test_the_surrogate_finds_the_front_sooner():
    """Where effects add up, as they nearly do in a supernet: the area under the front after 40 evaluations."""

    def area(name: str, seed: int) -> float:
        asked = search(make(name, make_space(4), seed=seed), 40)
        front = pareto_front([{"metrics": metrics(g)} for g in asked], "AP", ["flops"])
        steps = [(m["metrics"]["flops"], m["metrics"]["AP"]) for m in front]
        ends = [cost for cost, _ in steps[1:]] + [flops(make_space(4).largest())]
        return sum((end - cost) * ap for (cost, ap), end in zip(steps, ends, strict=True))

    gains = [area("surrogate", seed) - area("pareto-evo", seed) for seed in range(6)]
    assert np.mean(gains) > 0 and sum(gain > 0 for gain in gains) >= 5
