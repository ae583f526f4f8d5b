"""The search between controller and ledger, with an evaluation that is a formula; random search as its control."""

from __future__ import annotations

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from search_records import SPACE, everything_fits, make_identity, make_records, make_search
from tiny_data import read_voc, write_voc

from async_search import rescore_front, search_loop
from lib.config import Config, SearchConfig
from lib.controllers import make_controller
from lib.dispatcher import Result
from lib.genotype import Genotype
from lib.ledger import Ledger
from lib.scoring import pack
from lib.search import Identity, Search, best_of_random

IMAGES = 40
NOISE = np.random.default_rng(0).normal(0, 0.02, 50)  # what makes a resample easy is common to all candidates


class Costs:
    def __call__(self, genotype: Genotype) -> dict:
        flops = 1e6 * sum(b.expand * b.kernel for stage in genotype.stages for b in stage)
        return {"flops": flops, **self.latency(genotype)}

    def latency(self, genotype: Genotype) -> dict:
        return {"latency_ms": 1.0 * sum(genotype.depths)}


def quality(genotype: Genotype) -> float:
    blocks = [b for stage in genotype.stages for b in stage]
    return 0.3 + 0.02 * sum(b.kernel == 5 for b in blocks) - 0.01 * sum(b.kernel == 7 for b in blocks)


def evaluate(job: dict) -> dict:
    """As `Scorer` does, on 40 images."""
    genotype = Genotype.from_dict(job["genotype"])
    ap = quality(genotype)
    metrics = {"AP": ap, "flops": Costs()(genotype)["flops"]}
    resampled = {str(IMAGES): pack(np.clip(ap + NOISE, 0, 1))}
    return {"metrics": metrics, "images": IMAGES, "objective": "AP", "resampled": resampled}


def make(ledger: Ledger, name: str = "one", controller: str = "evo", **settings) -> Search:
    settings = {"num_epochs": 8, "steps": 10, "population_size": 10, "tournament_size": 4, **settings}
    config = Config(name="a", search=SearchConfig(controller=controller, **settings))
    asked = make_controller(config.search, SPACE, 0, everything_fits, costs=Costs())
    return Search(asked, ledger, config, Costs(), make_identity(search=name), 1)


def test_finalists_are_the_best_of_each_image_size_and_their_training_decides():
    records = make_records(40)
    search = make_search(records)
    by_size = {
        size: sorted(
            (r for r in records if r["genotype"]["image_size"] == size), key=lambda r: r["metrics"]["AP"], reverse=True
        )
        for size in (64, 96)
    }
    first, second = sorted(by_size, key=lambda size: by_size[size][0]["metrics"]["AP"], reverse=True)
    finalists = search.promising(3)
    assert finalists[:2] == [by_size[first][0], by_size[second][0]] and search.best() == finalists[0]
    assert finalists[2] in (by_size[first][1], by_size[second][1])
    assert search.winner() is search.best() and search.describe_finalists() == []
    genotypes = [Genotype.from_dict(r["genotype"]) for r in finalists]
    search.trained = dict(zip(genotypes, (0.5, 0.7, 0.6), strict=True))
    assert search.winner() is finalists[1] and search.best() is finalists[0]
    # What was trained for another search, or before this one went on, says nothing about its best.
    trained, search.trained = search.trained, {genotypes[1]: 0.9}
    assert search.winner() is search.best() and "are of an earlier search" in search.describe_finalists()[0]
    search.trained = trained
    lines = search.describe_finalists()
    assert len(lines) == 3 and sum(line.endswith("best.json") for line in lines) == 1
    (line,) = (line for line in lines if line.endswith("best.json"))
    assert f"{second} px" in line and "0.7000 after a short training" in line


def finish(search: Search, most: int = 10**6) -> list[dict]:
    """Evaluate one by one; the jobs."""
    jobs = []
    while len(jobs) < most and (proposal := search.propose()) is not None:
        jobs.append(proposal[1])
        search.learn(Result(proposal[0], evaluate(proposal[1]), None, "cpu#0", 1.0))
    return jobs


@pytest.mark.parametrize("controller", ["evo", "pareto-evo", "surrogate", "random"])
def test_resumed_it_goes_on_as_if_never_interrupted(tmp_path, controller):
    with Ledger(tmp_path / "whole.jsonl") as ledger:
        whole = finish(make(ledger, controller=controller))
    with Ledger(tmp_path / "evals.jsonl") as ledger:
        finish(make(ledger, controller=controller), most=47)
    with Ledger(tmp_path / "evals.jsonl") as ledger:
        search = make(ledger, controller=controller)
        search.replay()
        assert finish(search) == whole[47:] and len(search.told) == 80
        assert search.history() == sorted(search.history()) and search.history()[-1] == search.best()["metrics"]["AP"]


def test_another_search_reuses_what_the_ledger_has(tmp_path):
    with Ledger(tmp_path / "evals.jsonl") as ledger:
        finish(make(ledger))
        again = make(ledger, name="another")
        assert finish(again) == [] and len(again.told) == 80
        assert {record["search"] for record in again.told} == {"one"}


def test_ties_with_the_best_are_those_whose_paired_interval_holds_zero(tmp_path):
    with Ledger(tmp_path / "evals.jsonl") as ledger:
        search = make(ledger)
        finish(search)
    front = search.front()
    noise = [search.noise(record) for record in front]
    best = search.best()["metrics"]["AP"]
    assert [n.tie for n in noise] == [record["metrics"]["AP"] == best for record in front]  # the noise is common to all
    for record, (interval, behind, _) in zip(front, noise, strict=True):
        assert interval[0] < record["metrics"]["AP"] < interval[1]
        assert behind[0] == pytest.approx(best - record["metrics"]["AP"], abs=1e-4)
    assert search.noise({**front[0], "objective": "mAP"}) is None
    for strange in ({}, {"40": 7}, {"40": "x"}, {"40": ""}):  # of a ledger from elsewhere
        assert search.noise({**front[0], "resampled": strange}) is None


def test_the_front_of_a_search_on_a_part_is_scored_on_all_images_once(tmp_path):
    for _ in range(2):
        with Ledger(tmp_path / "evals.jsonl") as ledger:
            search = make(ledger, images=20)
            search.replay()
            finish(search)
            before = search.front()
            jobs = search.rescoring_jobs()
            for key, job in jobs:
                search.learn(Result(key, evaluate(job), None, "cpu#0", 1.0))
            assert len(jobs) in (len(before), 0) and len(search.rescored) == len(before) > 1
            assert {r["basis"] for r in search.front()} == {"all"} and search.best() in search.rescored
            assert len(search.told) == 80
    assert not jobs


class OneAtATime:
    """A pool that evaluates at once, and after `last` results has Ctrl-C pressed."""

    def __init__(self, stop: SimpleNamespace, last: int = 0):
        self.stop, self.last, self.pending, self.time_limit = stop, last, [], None

    def free_slots(self) -> int:
        return 1 - len(self.pending)

    def submit(self, key: str, job: dict) -> None:
        self.pending.append((key, job))

    def results(self, timeout: float) -> list[Result]:
        self.last -= 1
        self.stop.requested = self.last == 0
        key, job = self.pending.pop()
        return [Result(key, evaluate(job), None, "cpu#0", 1.0)]


def test_the_loop_evaluates_all_says_each_epoch_and_writes_every_few(tmp_path, capsys):
    stop, written = SimpleNamespace(requested=False), []
    with Ledger(tmp_path / "evals.jsonl") as ledger:
        search = make(ledger)
        pool = OneAtATime(stop, last=25)
        search_loop(search, pool, stop, lambda: written.append(len(search.told)), save_every=3)
        assert len(search.told) == 25 and written == [] and pool.time_limit == 60
        stop.requested = False
        search_loop(search, OneAtATime(stop), stop, lambda: written.append(len(search.told)), save_every=3)
    assert len(search.told) == 80 and written == [30, 60]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("search epoch ")]
    assert [line.split(",")[0] for line in lines] == [f"search epoch {i}: {10 * i} evaluations" for i in range(1, 9)]


def test_ctrl_c_while_the_front_is_scored_on_all_images_leaves_it_as_it_was(tmp_path):
    stop = SimpleNamespace(requested=False)
    with Ledger(tmp_path / "evals.jsonl") as ledger:
        search = make(ledger, images=20)
        finish(search)
        before = search.front()
        assert not rescore_front(search, OneAtATime(stop, last=1), stop, search.rescoring_jobs())
        assert search.front() == before
        jobs = search.rescoring_jobs()
        assert len(jobs) == len(before) - 1 > 0
        search.learn(Result(jobs[0][0], None, "it failed", "cpu#0", 1.0))
        search.rescored.clear()
        assert search.rescoring_jobs() == jobs  # one that failed is tried again
        stop.requested, pool = False, OneAtATime(stop)
        assert rescore_front(search, pool, stop, jobs) and pool.time_limit == 600
        assert {r["basis"] for r in search.front()} == {"all"}


def test_the_best_ones_whether_on_the_front_or_not(tmp_path):
    with Ledger(tmp_path / "evals.jsonl") as ledger:
        search = make(ledger)
        finish(search)
        top = search.top(15)
    found = [(-r["metrics"]["AP"], r["metrics"]["flops"]) for r in top]
    assert all("latency_ms" in r["metrics"] for r in top)  # no evaluation gives it: it comes from the table
    assert len(top) == 15 and found == sorted(found) and top[0] == search.best()


def test_a_failed_evaluation_is_recorded_and_never_tried_again(tmp_path):
    with Ledger(tmp_path / "evals.jsonl") as ledger:
        search = make(ledger)
        key, job = search.propose()
        search.learn(Result(key, None, "RuntimeError: boom", "cpu#0", 1.0))
        (record,) = ledger.records()
        assert record["status"] == "failed" and record["error"] == "RuntimeError: boom" and record["metrics"] == {}
        assert search.scored == [] and search.history() == [] and search.control() == []
        assert job not in finish(search)


def test_the_name_of_a_search_and_the_basis_of_its_scores(tmp_path):
    """Two searches share evaluations if what a score depends on is the same, whatever they look for."""
    (tmp_path / "last.pt").write_bytes(b"weights")
    write_voc(tmp_path, {name: [("cat", 4, 4, 20, 20)] for name in "abcdef"})
    annotations = read_voc(tmp_path, ["trainval"])

    def identity(seed: int = 0, **settings) -> Identity:
        config = Config(seed=seed, search=SearchConfig(**settings))
        return Identity.of(tmp_path / "last.pt", config, annotations, [0, 1, 2], [3, 4, 5])

    plain, limited = identity(), identity(max_flops=3e8, min_params=5)
    assert limited.budget == {"max_flops": 3e8, "min_params": 5} and plain.budget == {}
    others = [identity(controller="random"), identity(objective="mAP"), identity(costs=["params"])]
    assert len({one.search for one in (plain, limited, *others, identity(seed=1))}) == 6
    assert {one.basis for one in (plain, limited, *others)} == {plain.basis}
    for changed in (identity(bn_images=2), identity(batch_size=1), identity(images=2)):
        assert changed.basis != plain.basis and changed.parts.keys() == plain.parts.keys()
    assert identity(images=2).basis_all == plain.basis
    (tmp_path / "last.pt").write_bytes(b"other weights")
    assert {name for name, digest in identity().parts.items() if digest != plain.parts[name]} == {"weights"}
    # Searches of ledgers that were written before have these names and go on under them.
    assert plain.search == "(0, 'evo', 'AP', ['flops'], {})-no latency-200"
    assert limited.search == (
        "(0, 'evo', 'AP', ['flops'], {'flops': (0.0, 300000000.0), 'params': (5, inf)})-no latency-200"
    )


def test_it_says_which_evaluations_are_of_no_use_and_why(tmp_path):
    path = tmp_path / "evals.jsonl"
    with Ledger(path) as ledger:
        finish(make(ledger), most=5)
        again = make(ledger)
        assert again.describe_unused() == ""
        again.identity = make_identity(basis="other", parts={"weights": "2", "settings": "1"})
        assert again.describe_unused().endswith("of this search: an earlier version made them")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    rescored = {**records[0], "key": "f", "origin": "front", "basis": "all"}
    records = [*({**r, "rests_on": {"weights": "1", "settings": "1"}} for r in records), rescored]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    with Ledger(path) as ledger:
        again = make(ledger)
        again.identity = make_identity(basis="other", parts={"weights": "2", "settings": "1"})
        assert "5 evaluations cannot be compared" in again.describe_unused()
        assert again.describe_unused().endswith("since then there are other weights")
        assert len(finish(again)) == 80  # none of them is reused


@pytest.mark.parametrize(
    ("metrics", "why"),
    [
        ({"AP": None, "flops": 1}, "AP is not a number"),
        ({"flops": 1}, "AP is not a number"),
        ({"AP": 0.5}, "flops is not a number"),
        ({"AP": math.nan, "flops": 1}, "cannot be believed: AP is nan"),
        ({"AP": 1.5, "flops": 1}, "cannot be believed: AP is 1.5"),
        ({"AP": 0.5, "flops": math.inf}, "cannot be believed: flops is inf"),
    ],
)
def test_a_result_that_cannot_be_believed_is_recorded_as_failed(tmp_path, metrics, why):
    path = tmp_path / "evals.jsonl"
    with Ledger(path) as ledger:
        search = make(ledger)
        key, job = search.propose()
        search.learn(Result(key, {"metrics": metrics, "images": 1}, None, "cpu#0", 1.0))
        (record,) = ledger.records()
        assert record["status"] == "failed" and why in record["error"] and record["metrics"] == {}
        assert search.told == [record] and search.scored == [] and job not in finish(search)
    # An earlier version believed it.
    path.write_text(json.dumps({**record, "status": "ok", "metrics": {"AP": None, "flops": 1}}) + "\n")
    with Ledger(path) as ledger:
        search = make(ledger)
        search.replay()
        assert len(search.told) == 1 and search.scored == []


values = st.lists(st.floats(-1, 1, allow_subnormal=False) | st.sampled_from([0.1, 0.2]), min_size=1, max_size=7)


@settings(max_examples=40)
@given(values)
def test_the_expected_best_is_that_of_every_subset(values):
    found = best_of_random(values, most=len(values))
    assert [best.draws for best in found] == list(range(1, len(values) + 1))
    for best in found:
        bests = sorted(max(subset) for subset in itertools.combinations(values, best.draws))
        assert best.mean == pytest.approx(math.fsum(bests) / len(bests), abs=1e-12)
        assert best.low == bests[math.ceil(len(bests) / 10 - 1e-9) - 1]  # a tenth of the subsets are no better
        assert best.high == bests[math.ceil(len(bests) * 9 / 10 - 1e-9) - 1]


def test_no_more_is_claimed_than_asked_for():
    assert [best.draws for best in best_of_random([0.1, 0.3, 0.2], most=2)] == [1, 2]
    assert best_of_random([], most=2) == best_of_random([0.1], most=0) == []
    many = best_of_random([math.sin(i) for i in range(3000)], most=2500)
    assert len(many) <= 200 and (many[0].draws, many[-1].draws) == (1, 2500)
    assert all(a.mean <= b.mean for a, b in itertools.pairwise(many))
