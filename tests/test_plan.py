"""The plan: what the data holds, sizes and costs, and times held against work whose time is known."""

from __future__ import annotations

import pytest
import torch
from tiny_data import write_voc

from lib import plan
from lib.annotations import read_voc
from lib.config import TrainConfig
from lib.datasets import collate, load_annotations, split_indices, train_loader
from lib.detector import ElasticSSD, module_cost
from lib.plan import (
    detecting_seconds,
    final_seconds,
    preflight,
    scoring_seconds,
    training_seconds,
    typical_seconds,
)
from lib.scoring import Scorer

CPU = torch.device("cpu")


@pytest.fixture
def annotations(tmp_path):
    objects = {f"{i}": [] for i in range(7)} | {
        "a": [("cat", 0, 0, 24, 16), ("cat", 20, 10, 44, 26), ("dog", 0, 0, 48, 32)],
        "b": [("cat", 24, 16, 48, 32, 1), ("eel", 3, 3, 4, 4)],
    }
    write_voc(tmp_path, objects)
    return read_voc(tmp_path, ["trainval"], ["cat", "dog", "eel"])


PRIORS = torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.9, 0.9, 0.1, 0.1]])


def test_it_counts_and_names(annotations):
    lines = preflight(annotations, range(9), PRIORS, 0.5)
    text = "\n".join(lines)
    assert "9 images, 4 boxes (1 ignored: difficult or crowd), 3 classes" in text
    assert "boxes dropped: 1\n" in text and "b.jpg: box [3.0, 3.0, 4.0, 4.0] of 'eel' has no area" in text
    assert "images without objects: 7\n  0.jpg\n  1.jpg\n  2.jpg\n  3.jpg\n  4.jpg\n  and 2 more" in text
    assert [line.split() for line in lines[-3:]] == [["cat", "2", "50.0%"], ["dog", "1", "0.0%"], ["eel", "0", "-"]]


def test_it_is_about_the_images_asked_for(annotations):
    lines = preflight(annotations, [0, 8], PRIORS, 0.5)
    assert "2 images, 1 boxes (1 ignored" in lines[0]
    assert [line.split() for line in lines[-3:]] == [["cat", "0", "-"], ["dog", "0", "-"], ["eel", "0", "-"]]


@pytest.mark.parametrize(("threshold", "share"), [(0.24, "100.0%"), (0.26, "0.0%")])
def test_coverage_is_at_the_matching_threshold(annotations, threshold, share):
    """The first prior covers a quarter of the dog, whose box is the whole picture."""
    lines = preflight(annotations, range(9), PRIORS, threshold)
    assert lines[-2].split() == ["dog", "1", share]


def test_many_objects_are_sampled(annotations, monkeypatch):
    monkeypatch.setattr("lib.plan.COVERAGE_SAMPLE", 2)
    monkeypatch.setattr("lib.plan.CHUNK", 1)
    lines = preflight(annotations, range(9), PRIORS, 0.5)
    assert "measured on 2 of them" in lines[-4]
    assert [line.split()[1] for line in lines[-3:]] == ["2", "1", "0"]


def test_the_plan_says_sizes_costs_and_priors(tiny_detector, tiny_config):
    detector = tiny_detector()
    assert plan.describe_split(10, range(7), range(3)) == ("split: 10 images, 7 train the supernet, 3 score candidates")
    first, smallest, largest = plan.describe_space(detector, detector.space)
    # five stages of one or two blocks, each of 2 widths and 2 kernels
    assert first == f"search space: {float((4 + 16) ** 5):.4g} sub-networks of mbv3_backbone"
    for line, genotype in ((smallest, detector.space.smallest()), (largest, detector.space.largest())):
        cost, _ = module_cost(detector.extract(genotype), (1, 3, 64, 64))
        assert f"{cost.flops / 1e6:.1f} M multiply-adds, {cost.params / 1e6:.3f} M parameters" in line
    assert plan.describe_priors(detector, tiny_config()) == ["priors at 64 px: 84 = 4x4x4, 2x2x4, 1x1x4"]
    assert len(detector.priors(64)) == 84


def test_the_plan_says_how_long_training_is(tiny_config):
    line = plan.describe_training("final", tiny_config().final, 24, 6)
    assert line == "final: 2 epochs of 6 steps, batches of 4, 24 images, sgd, learning rate 0.01 (cosine)"


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
    loader = train_loader(annotations, train, 64, 8, config, CPU)
    loader = type(loader)(loader.dataset, batch_sampler=loader.batch_sampler, num_workers=workers)
    model = SlowLoss(clock)
    phases = [(10, lambda b: model.losses(0.1)), (30, lambda b: model.losses(0.05))]
    found = training_seconds(model, TrainConfig(), CPU, loader, phases)
    assert found == pytest.approx(loader.batch_sampler.batches_per_epoch * (10 * steps[0] + 30 * steps[1]))


def test_a_score_is_that_of_all_pictures(data, clock, monkeypatch):
    """Measured on a part of them."""
    config, annotations, train, search = data
    detector = ElasticSSD(config, len(annotations.classes))
    monkeypatch.setattr(Scorer, "__call__", lambda self, detector, g: clock.work(0.005 * (8 + self.num_images)))
    monkeypatch.setattr(plan, "SCORED_SAMPLE", 8)
    found = scoring_seconds(detector, [detector.space.smallest()], annotations, train, search, config, CPU)
    assert len(search) == 12 and config.search.bn_images == 8
    assert found == pytest.approx(0.005 * (8 + 12))


def test_a_final_training_is_its_steps(data, clock, monkeypatch):
    config, annotations, train, _ = data
    detector = ElasticSSD(config, len(annotations.classes))
    loader = train_loader(annotations, train, 64, 8, config, CPU)
    model, calls = detector.extract(detector.space.smallest()), []

    def slow_losses(*arguments):
        calls.append(arguments)
        clock.work(0.05)
        yield {"loss": next(model.parameters()).sum() * 0}

    monkeypatch.setattr(plan, "detection_losses", slow_losses)
    steps = loader.batch_sampler.batches_per_epoch * config.final.epochs
    assert final_seconds(model, config, CPU, loader) == pytest.approx(0.05 * steps)
    assert calls[0][0] is model


def test_an_evaluation_is_that_of_the_whole_test_set(data, clock, monkeypatch):
    config, annotations, _, _ = data
    monkeypatch.setattr(plan, "SCORED_SAMPLE", 8)
    monkeypatch.setattr(plan, "detect", lambda model, images, *_: clock.work(0.02 * sum(map(len, images))))
    detector = ElasticSSD(config, len(annotations.classes))
    found = detecting_seconds(detector.extract(detector.space.smallest()), annotations, config, CPU)
    assert found == pytest.approx(0.02 * len(annotations))
