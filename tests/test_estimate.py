"""Estimates are held against work whose time is known."""

from __future__ import annotations

import pytest
import torch

from lib import plan
from lib.config import TrainConfig
from lib.datasets import collate, configured_train_loader, load_annotations, split_indices
from lib.detector import ElasticSSD
from lib.plan import detecting_seconds, final_seconds, scoring_seconds, training_seconds, typical_seconds
from lib.scoring import Scorer

CPU = torch.device("cpu")


def test_the_first_call_does_not_count_and_the_median_does(clock):
    durations = iter([0.3, 0.01, 0.01, 0.05, 0.01, 0.01, 0.01])
    assert typical_seconds(lambda: clock.work(next(durations)), budget=0.075) == pytest.approx(0.01)
    assert list(durations) == [0.01, 0.01]  # three for certain, a fourth within the budget
    calls = []
    assert typical_seconds(lambda: calls.append(0), budget=60.0) == 0 and len(calls) == 1 + 9


@pytest.fixture(scope="module")
def data(tiny_config, tmp_path_factory):
    config = tiny_config(data__root=tmp_path_factory.mktemp("shapes"))
    annotations = load_annotations(config.data, "train")
    return config, annotations, *split_indices(annotations, config.data.data_portion, 0)


class SlowLoss(torch.nn.Module):
    """A model whose losses take as long as it is told."""

    def __init__(self, clock):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.clock = clock

    def losses(self, seconds: float):
        self.clock.work(seconds)
        yield {"loss": self.weight * 1.0}


@pytest.mark.parametrize(("workers", "steps"), [(0, (0.18, 0.13)), (1, (0.1, 0.08)), (2, (0.1, 0.05))])
def test_a_training_is_its_phases_and_the_slower_of_step_and_pictures(data, clock, workers, steps, monkeypatch):
    config, annotations, train, _ = data
    monkeypatch.setattr(plan, "collate", lambda samples: clock.work(0.08) or collate(samples))
    loader = configured_train_loader(annotations, train, 64, 8, config, CPU)
    loader = type(loader)(loader.dataset, batch_sampler=loader.batch_sampler, num_workers=workers)
    model = SlowLoss(clock)
    phases = [(10, lambda b: model.losses(0.1)), (30, lambda b: model.losses(0.05))]
    found = training_seconds(model, TrainConfig(), CPU, loader, phases)
    assert found == pytest.approx(loader.batch_sampler.batches_per_epoch * (10 * steps[0] + 30 * steps[1]))


def test_a_score_is_that_of_all_pictures(data, clock, monkeypatch):
    """Measured on a part of them."""
    config, annotations, train, search = data
    detector = ElasticSSD(config, len(annotations.classes))
    monkeypatch.setattr(Scorer, "race", lambda self, detector, g: clock.work(0.005 * (8 + self.num_images)))
    monkeypatch.setattr(plan, "SCORED_SAMPLE", 8)
    found = scoring_seconds(detector, [detector.space.smallest()], annotations, train, search, config, CPU)
    assert len(search) == 12 and config.search.bn_images == 8
    assert found == pytest.approx(0.005 * (8 + 12))


def test_a_final_training_is_its_steps_with_the_teachers_share(data, clock, monkeypatch):
    config, annotations, train, _ = data
    detector = ElasticSSD(config, len(annotations.classes))
    loader = configured_train_loader(annotations, train, 64, 8, config, CPU)
    model, calls = detector.extract(detector.space.smallest()), []

    def slow_losses(*arguments):
        calls.append(arguments)
        clock.work(0.05)
        yield {"loss": next(model.parameters()).sum() * 0}

    monkeypatch.setattr(plan, "detection_losses", slow_losses)
    steps = loader.batch_sampler.batches_per_epoch * config.final.epochs
    assert final_seconds(model, config, CPU, loader) == pytest.approx(0.05 * steps)
    assert calls[0][0] is model and calls[0][-2:] == (0.0, None)


def test_an_evaluation_is_that_of_the_whole_test_set(data, clock, monkeypatch):
    config, annotations, _, _ = data
    monkeypatch.setattr(plan, "SCORED_SAMPLE", 8)
    monkeypatch.setattr(plan, "detect", lambda model, images, *_: clock.work(0.02 * len(images[0])))
    detector = ElasticSSD(config, len(annotations.classes))
    found = detecting_seconds(detector.extract(detector.space.smallest()), annotations, config, CPU)
    assert found == pytest.approx(0.02 * len(annotations))
