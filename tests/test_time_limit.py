from __future__ import annotations

import random
import statistics

import pytest

from lib.dispatcher import TimeLimit


def test_the_limit_follows_the_running_median():
    limit, rng, seen = TimeLimit(factor=10, floor=0, least=3), random.Random(0), []
    for i in range(200):
        seen.append(rng.expovariate(1))
        limit.add(seen[-1])
        assert limit.seconds is None if i < 2 else limit.seconds == 10 * statistics.median_high(seen)


def test_there_is_a_floor_and_no_limit_before_some_jobs_ended():
    limit = TimeLimit(factor=10, floor=60, least=4)
    for _ in range(3):
        limit.add(1.0)
    assert limit.seconds is None
    limit.add(1.0)
    assert limit.seconds == 60
    for _ in range(6):
        limit.add(20.0)
    assert limit.seconds == 200


def test_a_few_slow_jobs_do_not_move_it():
    limit = TimeLimit(floor=1.0)
    for seconds in [*[1.0] * 20, *[1000.0] * 9]:
        limit.add(seconds)
    assert limit.seconds == pytest.approx(10)


def test_a_factor_of_0_is_no_limit():
    limit = TimeLimit(factor=0)
    for _ in range(20):
        limit.add(1.0)
    assert limit.seconds is None
