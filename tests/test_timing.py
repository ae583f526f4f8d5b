"""Times of whole detectors: what is timed is what is used, and a drifting machine does not spoil the comparison."""

from __future__ import annotations

import random

import pytest
import torch

from lib import latency
from lib.detector import Normalize, ScoresAndBoxes
from lib.head import Predictors
from lib.latency import FusedDetectors, time_detectors, time_interleaved, time_nms, visit
from lib.postprocess import postprocess

CPU = torch.device("cpu")


def test_a_detector_of_shared_parts_finds_what_the_extracted_one_does(tiny_detector, tiny_config):
    detector, config = tiny_detector(), tiny_config()
    make, rng = FusedDetectors(detector, config, CPU), random.Random(0)
    images = torch.randint(0, 256, (1, 3, *latency.PICTURE), dtype=torch.uint8)
    for genotype in [detector.space.largest(), *(detector.space.sample(rng) for _ in range(3))]:
        plain = detector.extract(genotype)
        with torch.inference_mode():
            scores, boxes = make(genotype)(images)
            logits, offsets = plain(images)
        everything = config.postprocess
        everything.confidence_threshold, everything.nms_threshold = -1.0, 1.0  # nothing is dropped
        everything.pre_nms_top_k = everything.top_k = 10**6
        (found,) = postprocess(logits, offsets, plain.priors, everything, config.loss.type, config.head.variances)
        assert len(found.scores) == scores.numel()
        torch.testing.assert_close(found.scores, scores.flatten().sort(descending=True).values, atol=1e-5, rtol=1e-4)
        best = found.boxes[0]
        assert (boxes[0] - best).abs().amax(1).min() < 1e-4


def test_the_parts_of_a_detector_are_timed_by_themselves(tiny_trained, clock, monkeypatch):
    """Each is found in its own time and in the whole."""
    detector = tiny_trained(search__latency_threads=2)
    threads = []

    def slow(milliseconds, run):
        def wait(*arguments):
            threads.append(torch.get_num_threads())
            clock.work(milliseconds / 1000)
            return run(*arguments)

        return wait

    for kind, name, milliseconds in ((Normalize, "forward", 20), (Predictors, "forward", 40)):
        monkeypatch.setattr(kind, name, slow(milliseconds, getattr(kind, name)))
    monkeypatch.setattr(ScoresAndBoxes, "decode", slow(10, ScoresAndBoxes.decode))
    monkeypatch.setattr(latency, "ROUNDS", 1)
    before = torch.get_num_threads()
    times = latency.time_parts(detector.model, detector.config, CPU)
    assert torch.get_num_threads() == before and threads[-1] == 2 == times["threads"]
    found = [times[f"{name}_ms"] for name in ("resize", "network", "decoding")]
    assert found == [20, 40, 10] and times["total_ms"] == 70 and times["nms_ms"] == 0  # NMS moves no clock
    assert "CPU threads: 2" in latency.describe_parts(
        times
    ) and f"{times['total_ms']:.2f} ms" in latency.describe_parts(times)


def test_blocks_are_shared(tiny_detector, tiny_config):
    detector = tiny_detector()
    make, rng = FusedDetectors(detector, tiny_config(), CPU), random.Random(0)
    models = [make(detector.space.sample(rng)) for _ in range(40)]
    weights = {p.data_ptr() for model in models for p in model.parameters()}
    most = 5 * 2 * 4 + 3  # every choice of every elastic block; the fixed one, the stem, the last convolution
    blocks = {id(block) for model in models for segment in model.model.backbone for block in segment}
    assert len(blocks) <= most + 2 and len(weights) < 0.5 * sum(len(list(m.parameters())) for m in models)


def test_each_run_has_its_own_milliseconds(clock):
    runs = [lambda ms=ms: clock.work(ms / 1000) for ms in (1, 4, 2)]
    assert time_interleaved(runs, CPU, rounds=3) == pytest.approx([1, 4, 2])


def test_drift_cancels(monkeypatch):
    """A machine that is slower in every round by a half: without the reference the medians would still compare, but a
    run that is measured alone would not; with it all are those of the middle round."""
    true, speed, visits = [2.0, 3.0, 5.0, 7.0], [1.0], [0]

    def slow(run, _device):
        visits[0] += 1
        return true[run()] * speed[0]

    class Bar:
        def __init__(self):
            self.done = 0

        def update(self):
            self.done += 1
            speed[0] = 1.5 ** (self.done // len(true))

        def close(self):
            pass

    monkeypatch.setattr(latency, "visit", slow)
    monkeypatch.setattr(latency, "progress", lambda *_, **__: Bar())
    found = time_interleaved([lambda i=i: i for i in range(4)], CPU, rounds=5)
    assert found == pytest.approx([t * 1.5**2 for t in true])
    assert visits[0] == 5 * (4 + 1)  # and the reference once in four


def test_a_visit_is_a_median_after_a_warm_up(clock):
    waits = iter([9000, 1, 50, 2])  # the first call of all is slow, and one of the others
    assert visit(lambda: clock.work(next(waits) / 1000), CPU) == pytest.approx(2)


def test_detectors_and_nms_take_time(tiny_detector, tiny_config):
    detector, config = tiny_detector(), tiny_config()
    make = FusedDetectors(detector, config, CPU)
    model = make(detector.space.largest())
    assert isinstance(model, ScoresAndBoxes) and not model.training
    (milliseconds,) = time_detectors([model], CPU, rounds=2)
    assert 0 < milliseconds < 1000
    assert 0 < time_nms(50, 3, 0.5, CPU, rounds=2) < 1000
