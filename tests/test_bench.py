"""The parts of bench/ that compute something: ratios of times, operations of layers, a score without its BatchNorm."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from bench import score, turns
from bench.chip import convolution_operations, kind_of
from bench.reference import random_batch
from lib import scoring
from lib.errors import UserError


def test_each_run_takes_a_turn_in_each_round_and_the_warm_up_does_not_count():
    calls = []
    runs = {name: lambda name=name: calls.append(name) or float(len(calls)) for name in ("a", "b")}
    seconds = turns.take_turns(runs, rounds=3, warm_up=1)
    rounds = [sorted(calls[i : i + 2]) for i in range(0, 8, 2)]
    assert rounds == [["a", "b"]] * 4
    assert sorted([*seconds["a"], *seconds["b"]]) == [3, 4, 5, 6, 7, 8]


def test_a_ratio_is_of_times_of_the_same_round():
    found = turns.ratio(np.array([1.0, 20.0, 3.0]), np.array([1.0, 10.0, 1.0]))
    assert found["median"] == 2 and 1 < found["p10"] < 2 < found["p90"] < 3


def test_sides_that_differ_are_refused():
    a = torch.tensor([1.0, 100.0])
    assert turns.check_equal("sums", a + 0.001, a, 1e-4) == pytest.approx(1e-5, rel=0.1)
    for other in (a + 1, a * float("nan")):
        with pytest.raises(UserError, match="sums: the two sides differ"):
            turns.check_equal("sums", other, a, 1e-4)


@pytest.mark.parametrize("input_gradient", [True, False])
def test_operations_are_those_of_torchs_counter(input_gradient):
    """Of the forward pass. Backward, it takes a grouped convolution for a full one: each gradient costs as much again."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 5, 1, 2, groups=8), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1)
    )
    x = torch.rand(2, 3, 11, 9, requires_grad=input_gradient)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        model(x).sum().backward()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
        first = FlopCounterMode(display=False)
        with first:
            model[0](x)
    forward = counter.get_total_flops() - first.get_total_flops()
    expected = 3 * forward - (0 if input_gradient else first.get_total_flops())
    assert sum(convolution_operations(event) for event in profiler.events()) == expected
    kinds = {kind_of(event) for event in profiler.events()}
    assert {"1x1 convolution", "3x3 convolution", "depthwise convolution", "BatchNorm", "rest"} <= kinds


def test_random_boxes_lie_in_the_picture():
    batch = random_batch(3, 16, 7, 4)
    assert batch.images.shape == (3, 3, 16, 16) and batch.labels.min() >= 1 and batch.labels.max() <= 4
    assert (batch.boxes >= 0).all() and (batch.boxes <= 1).all() and (batch.boxes[..., 2:] > batch.boxes[..., :2]).all()


def test_the_time_of_re_estimating_batch_norm_is_taken_off(tiny_detector, tiny_config, monkeypatch):
    detector = tiny_detector()
    monkeypatch.setattr(scoring, "recalibrate", lambda *_: time.sleep(1))
    data = score.scoring_data(2, 2, 3, detector.num_classes, size=64)
    timed = score.TimedScore(data, tiny_config(), detector, time.perf_counter)
    start = time.perf_counter()
    assert timed(detector.space.smallest()) < time.perf_counter() - start - 0.9
    assert "AP" in timed.metrics
