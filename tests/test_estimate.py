"""Estimates are held against work whose time is known: it sleeps."""

from __future__ import annotations

import time

import pytest
import torch

from lib import estimate
from lib.config import TrainConfig
from lib.datasets import configured_train_loader, load_records, split_indices
from lib.detector import ElasticSSD
from lib.estimate import detecting_seconds, final_seconds, scoring_seconds, training_seconds, typical_seconds
from lib.scoring import Scorer

CPU = torch.device("cpu")


def test_the_first_call_does_not_count():
    durations = iter([0.3, *[0.01] * 20])
    calls = []

    def work():
        calls.append(next(durations))
        time.sleep(calls[-1])

    assert typical_seconds(work, budget=0.05) == pytest.approx(0.01, abs=0.005)
    assert 4 <= len(calls) <= 8
    assert typical_seconds(lambda: None, budget=60.0) < 0.01  # after 9 calls it knows


@pytest.fixture(scope="module")
def data(tiny_config, tmp_path_factory):
    config = tiny_config(data__root=tmp_path_factory.mktemp("shapes"))
    records = load_records(config.data, "train")
    return config, records, *split_indices(records, config.data.data_portion, 0)


class SlowLoss(torch.nn.Module):
    """A model whose losses take as long as it is told."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def losses(self, seconds: float):
        time.sleep(seconds)
        yield {"loss": self.weight * 1.0}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_training_is_its_phases_and_the_slower_of_step_and_pictures(data, workers, monkeypatch):
    config, records, train, _ = data
    monkeypatch.setattr(estimate, "SECONDS", 1.0)
    loader = configured_train_loader(records, train, 64, 8, config, CPU)
    loader = type(loader)(loader.dataset, batch_sampler=loader.batch_sampler, num_workers=workers)
    steps, model = loader.batch_sampler.batches_per_epoch, SlowLoss()
    phases = [(10, lambda b: model.losses(0.1)), (30, lambda b: model.losses(0.05))]
    found = training_seconds(model, TrainConfig(), CPU, loader, phases)
    expected = steps * (10 * 0.1 + 30 * 0.05)
    assert expected < found < 1.6 * expected


def test_a_score_is_that_of_all_pictures(data, monkeypatch):
    """Measured on a part of them, within a factor of the time that all take."""
    config, records, train, search = data
    detector = ElasticSSD(config, len(records.classes))
    monkeypatch.setattr(Scorer, "race", lambda self, detector, g: time.sleep(0.005 * (8 + self.num_images)))
    monkeypatch.setattr(estimate, "SAMPLE", 8)
    found = scoring_seconds(detector, [detector.space.smallest()], records, train, search, config, CPU)
    assert len(search) == 12 and config.search.bn_images == 8
    assert found == pytest.approx(0.005 * (8 + 12), rel=0.2)


def test_a_final_training_is_its_steps_with_the_teachers_share(data, monkeypatch):
    config, records, train, _ = data
    monkeypatch.setattr(estimate, "SECONDS", 0.3)
    detector = ElasticSSD(config, len(records.classes))
    loader = configured_train_loader(records, train, 64, 8, config, CPU)
    model, calls = detector.extract(detector.space.smallest()), []

    def slow_losses(*arguments):
        calls.append(arguments)
        time.sleep(0.05)
        yield {"loss": next(model.parameters()).sum() * 0}

    monkeypatch.setattr(estimate, "detection_losses", slow_losses)
    found = final_seconds(model, config, CPU, loader)
    steps = loader.batch_sampler.batches_per_epoch * config.final.epochs
    assert 0.05 * steps < found < 0.1 * steps
    assert calls[0][0] is model and calls[0][-2:] == (0.0, None)


def test_an_evaluation_is_that_of_the_whole_test_set(data, monkeypatch):
    config, records, _, _ = data
    monkeypatch.setattr(estimate, "SAMPLE", 8)
    monkeypatch.setattr(estimate, "SECONDS", 0.3)
    monkeypatch.setattr(estimate, "detect", lambda model, images, *_: time.sleep(0.02 * len(images[0])))
    model = ElasticSSD(config, len(records.classes)).extract(ElasticSSD(config, len(records.classes)).space.smallest())
    found = detecting_seconds(model, records, config, CPU)
    assert 0.02 * len(records) < found < 0.06 * len(records)
