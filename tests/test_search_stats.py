"""Best of n against every subset; history; workers' time against hand-made schedules."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.report import worker_use
from lib.search import best_of_random, best_so_far

values = st.lists(st.floats(-1, 1, allow_subnormal=False) | st.sampled_from([0.1, 0.2]), min_size=1, max_size=7)


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
    many = best_of_random([math.sin(i) for i in range(3000)], most=2500)
    assert len(many) <= 200 and (many[0].draws, many[-1].draws) == (1, 2500)
    assert all(a.mean <= b.mean for a, b in itertools.pairwise(many))


def test_the_best_so_far():
    assert best_so_far([0.2, 0.1, 0.3, 0.3, 0.0]) == [0.2, 0.2, 0.3, 0.3, 0.3]
    assert best_so_far([]) == []


def job(worker: str, start: float, end: float, status: str = "ok") -> dict:
    return {"worker": worker, "time": end, "seconds": end - start, "status": status}


def test_the_time_of_the_workers():
    records = [job("cpu#0", 100, 104), job("cpu#1", 100, 110, "failed"), job("cpu#0", 106, 110)]
    use = worker_use(records)
    assert [worker.name for worker in use.workers] == ["cpu#0", "cpu#1"]
    assert (use.seconds, use.pauses) == (10, 0)
    assert [worker.busy for worker in use.workers] == [8, 10]
    assert [worker.failed for worker in use.workers] == [0, 1]
    assert use.workers[0].jobs == [(0, 4), (6, 10)]


def test_the_time_between_two_runs_is_nobodys():
    use = worker_use([job("cpu#0", 5000, 5010), job("cpu#1", 100, 110), job("cpu#1", 5005, 5015)])
    assert (use.seconds, use.pauses) == (25, 1)
    assert {worker.name: worker.jobs for worker in use.workers} == {
        "cpu#0": [(10, 20)],
        "cpu#1": [(0, 10), (15, 25)],
    }
    long = worker_use([job("cpu#0", 0, 500), job("cpu#1", 400, 500)])  # one worker waits while another is busy
    assert (long.seconds, long.pauses) == (500, 0)


def test_no_workers_at_all():
    assert worker_use([]) == ([], 0.0, 0)
