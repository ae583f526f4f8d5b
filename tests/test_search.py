"""The search between controller and ledger, with an evaluation that is a formula."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from search_records import SPACE

from async_search import score_finalists
from lib.config import Config, SearchConfig
from lib.controllers import make_controller
from lib.dispatcher import Result
from lib.genotype import Genotype
from lib.ledger import Ledger
from lib.scoring import has_lost, pack
from lib.search import Search, SearchRun

IMAGES, RESAMPLES = 40, 50
NOISE = np.random.default_rng(0).normal(0, 0.02, RESAMPLES)  # what makes a resample easy is common to all candidates


class Costs:
    def __call__(self, genotype: Genotype) -> dict:
        flops = 1e6 * sum(b.expand * b.kernel for stage in genotype.stages for b in stage)
        return {"flops": flops, **self.latency(genotype)}

    def latency(self, genotype: Genotype) -> dict:
        return {"latency_ms": 1.0 * sum(genotype.depths)}


def quality(genotype: Genotype) -> float:
    blocks = [b for stage in genotype.stages for b in stage]
    return 0.3 + 0.02 * sum(b.kernel == 5 for b in blocks) - 0.01 * sum(b.kernel == 7 for b in blocks)


def evaluate(job: dict, images: int = IMAGES) -> dict:
    """As `Scorer.race` does, on 40 images."""
    genotype = Genotype.from_dict(job["genotype"])
    ap = quality(genotype)
    resampled, lost = {}, False
    for n in (n for n in (10, 20, 40) if n <= images):
        drawn = np.clip(ap + NOISE, 0, 1)
        resampled[str(n)] = pack(drawn)
        lost = n < images and has_lost(drawn, n, job["rivals"])
        if lost:
            break
    metrics = {"AP": ap, "flops": Costs()(genotype)["flops"]}
    return {"metrics": metrics, "images": n, "lost": lost, "objective": "AP", "resampled": resampled}


def make(ledger: Ledger, name: str = "one", controller: str = "evo", **settings) -> Search:
    settings = {"num_epochs": 8, "steps": 10, "population_size": 10, "tournament_size": 4, **settings}
    config = Config(name="a", search=SearchConfig(controller=controller, **settings))
    options = {key: settings[key] for key in ("population_size", "tournament_size")}
    asked = make_controller(controller, SPACE, 0, lambda g: True, costs=["flops"], **options)
    return Search(asked, ledger, config, Costs(), {"search": name, "basis": "b", "basis_all": "all", "budget": {}}, 1)


def finish(search: Search, most: int = 10**6) -> list[dict]:
    """Evaluate one by one; the jobs."""
    jobs = []
    while len(jobs) < most and (proposal := search.propose()) is not None:
        jobs.append(proposal[1])
        search.learn(Result(proposal[0], evaluate(proposal[1]), None, "cpu#0", 1.0))
    return jobs


def run_of(search: Search, folder) -> SearchRun:
    return search.as_run(folder, folder / "last.pt")


def test_who_clearly_loses_is_stopped_and_nothing_is_lost_by_it(tmp_path):
    """Of a full search, each stopped one would have been below the front and no new best."""
    with Ledger(tmp_path / "evals.jsonl") as ledger:
        search = make(ledger)
        finish(search)
        run = run_of(search, tmp_path)
    stopped = [r for r in run.told if r["status"] == "stopped"]
    assert 5 < len(stopped) < 70 and {r["images"] for r in stopped} == {10}
    front = run.front()
    for record in stopped:
        cheaper = [m["metrics"]["AP"] for m in front if m["metrics"]["flops"] <= record["metrics"]["flops"]]
        assert record["metrics"]["AP"] < max(cheaper)
    assert all(r["status"] == "ok" for r in run.told[:10])  # nobody to lose to while the population grows
    assert len(run.compared) == len(run.history()) == 80 and run.history() == sorted(run.history())
    assert run.best()["metrics"]["AP"] == run.history()[-1]


@pytest.mark.parametrize("settings", [{"racing": False}, {"controller": "pareto-evo"}, {"controller": "random"}])
def test_racing_can_be_off_and_serves_every_controller(tmp_path, settings):
    with Ledger(tmp_path / "evals.jsonl") as ledger:
        jobs = finish(make(ledger, **settings))
        stopped = len(ledger.records(status="stopped"))
    assert (stopped == 0) == (not settings.get("racing", True))
    assert any(job["rivals"] for job in jobs) == settings.get("racing", True)


def test_resumed_it_goes_on_as_if_never_interrupted(tmp_path):
    with Ledger(tmp_path / "whole.jsonl") as ledger:
        whole = finish(make(ledger))
    with Ledger(tmp_path / "evals.jsonl") as ledger:
        finish(make(ledger), most=47)
    with Ledger(tmp_path / "evals.jsonl") as ledger:
        search = make(ledger)
        search.replay()
        assert len(search.told) == 47 and finish(search) == whole[47:]


def test_a_search_without_racing_scores_in_full_what_another_one_stopped(tmp_path):
    with Ledger(tmp_path / "evals.jsonl") as ledger:
        finish(make(ledger, name="racing"))
        stopped = {r["key"] for r in ledger.records(status="stopped")}
        again = make(ledger, name="racing")
        assert finish(again) == [] and len(again.told) == 80  # the same search evaluates nothing anew
        full = make(ledger, name="full", racing=False)
        finish(full)
    asked = {r["key"] for r in full.told}
    assert stopped & asked and all(r["status"] == "ok" for r in full.told)
    assert len(full.told) == 80 and len(run_of(full, tmp_path).own) < 80  # the rest it found in the ledger


def test_ties_with_the_best_are_those_whose_paired_interval_holds_zero(tmp_path):
    with Ledger(tmp_path / "evals.jsonl") as ledger:
        search = make(ledger)
        finish(search)
        run = run_of(search, tmp_path)
    front = run.front()
    noise = [run.noise(record) for record in front]
    best = run.best()["metrics"]["AP"]
    assert [n.tie for n in noise] == [record["metrics"]["AP"] == best for record in front]  # the noise is common to all
    for record, (interval, behind, _) in zip(front, noise, strict=True):
        assert interval.low < record["metrics"]["AP"] < interval.high
        assert behind.low == pytest.approx(best - record["metrics"]["AP"], abs=1e-4)
    assert run.noise({**front[0], "objective": "mAP"}) is None


def test_the_front_of_a_search_on_a_part_is_scored_on_all_images_once(tmp_path):
    for _ in range(2):
        with Ledger(tmp_path / "evals.jsonl") as ledger:
            search = make(ledger, images=20)
            search.replay()
            finish(search)
            jobs = search.missing_finalists(run_of(search, tmp_path))
            before = run_of(search, tmp_path).front()
            for key, job in jobs:
                assert not job["rivals"]
                search.learn_finalist(Result(key, evaluate(job), None, "cpu#0", 1.0))
            run = run_of(search, tmp_path)
            assert len(jobs) in (len(before), 0) and len(run.finalists) == len(before) > 1
            assert {r["basis"] for r in run.front()} == {"all"} and run.best() in run.finalists
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


def test_ctrl_c_while_the_front_is_scored_on_all_images_leaves_it_as_it_was(tmp_path):
    stop = SimpleNamespace(requested=False)
    with Ledger(tmp_path / "evals.jsonl") as ledger:
        search = make(ledger, images=20)
        finish(search)
        before = run_of(search, tmp_path).front()
        jobs = search.missing_finalists(run_of(search, tmp_path))
        assert not score_finalists(search, OneAtATime(stop, last=1), stop, jobs)
        assert run_of(search, tmp_path).front() == before
        jobs = search.missing_finalists(run_of(search, tmp_path))
        assert len(jobs) == len(before) - 1 > 0
        search.learn_finalist(Result(jobs[0][0], None, "it failed", "cpu#0", 1.0))
        search.finalists.clear()
        assert search.missing_finalists(run_of(search, tmp_path)) == jobs  # one that failed is tried again
        stop.requested, pool = False, OneAtATime(stop)
        assert score_finalists(search, pool, stop, jobs) and pool.time_limit == 60
        assert {r["basis"] for r in run_of(search, tmp_path).front()} == {"all"}


def test_the_best_ones_whether_on_the_front_or_not(tmp_path):
    with Ledger(tmp_path / "evals.jsonl") as ledger:
        search = make(ledger)
        finish(search)
        top = run_of(search, tmp_path).top(15)
    found = [(-r["metrics"]["AP"], r["metrics"]["flops"]) for r in top]
    assert all("latency_ms" in r["metrics"] for r in top)  # which no evaluation gave: the table's
    assert len(top) == 15 and found == sorted(found) and top[0] == run_of(search, tmp_path).best()


def test_a_failed_evaluation_is_recorded_and_never_a_rival(tmp_path):
    with Ledger(tmp_path / "evals.jsonl") as ledger:
        search = make(ledger)
        key, _ = search.propose()
        search.learn(Result(key, None, "RuntimeError: boom", "cpu#0", 1.0))
        (record,) = ledger.records()
        assert record["status"] == "failed" and record["error"] == "RuntimeError: boom" and record["metrics"] == {}
        assert run_of(search, tmp_path).compared == []
