"""The plan: what the data holds, sizes and costs, and times held against work whose time is known."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_data import read_voc, write_picture, write_voc

from lib import UserError, plan
from lib.annotations import Objects
from lib.config import DataConfig, TrainConfig
from lib.datasets import collate, load_annotations, split_indices, train_loader
from lib.detector import ElasticSSD, module_cost
from lib.plan import (
    describe_data,
    detecting_seconds,
    final_seconds,
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


def table(annotations, rows, threshold=0.5):
    """The cells of each line of the table of one split."""
    return [line.split() for line in describe_data({"all": (annotations, rows)}, PRIORS, threshold)]


def test_one_table_counts_images_and_objects_of_every_split(annotations):
    splits = {"train": (annotations, range(8)), "search": (annotations, [8])}
    lines = describe_data(splits, PRIORS, 0.5)
    cells = [line.split() for line in lines]
    assert cells[:2] == [["data", "train", "search"], ["images", "8", "1"]]
    assert cells[2:5] == [
        ["without", "objects", "7", "0"],
        ["boxes", "dropped", "0", "1"],
        ["ignored", "objects", "0", "1"],
    ]
    assert cells[6:9] == [["cat", "2", "50.0%", "0", "-"], ["dog", "1", "0.0%", "0", "-"], ["eel", "0", "-", "0", "-"]]
    assert "1 boxes without area do not train; the first: " in lines[9] and lines[9].endswith("b.jpg")
    assert len({len(line) for line in (*lines[:5], *lines[6:9])}) == 1


def test_it_is_about_the_images_asked_for(annotations):
    assert table(annotations, [0, 8])[1:5] == [
        ["images", "2"],
        ["without", "objects", "1"],
        ["boxes", "dropped", "1"],
        ["ignored", "objects", "1"],
    ]


@pytest.mark.parametrize(("threshold", "share"), [(0.24, "100.0%"), (0.26, "0.0%")])
def test_coverage_is_at_the_matching_threshold(annotations, threshold, share):
    """The first prior covers a quarter of the dog, whose box is the whole picture."""
    assert ["dog", "1", share] in table(annotations, range(9), threshold)


def test_coverage_of_many_objects_is_that_of_a_sample(annotations, monkeypatch):
    monkeypatch.setattr("lib.plan.COVERAGE_SAMPLE", 2)
    monkeypatch.setattr("lib.priors.CHUNK", 1)
    assert ["cat", "2", "100.0%"] in table(annotations, range(9))  # the second cat is not in the sample


class RandomBoxes:
    """Annotations of one image with random boxes of three classes, one of which is ignored."""

    classes = ("cat", "dog", "eel")

    def __init__(self, count, seed, longest):
        random = torch.Generator().manual_seed(seed)
        size = torch.rand(count, 2, generator=random) ** torch.tensor([1.0, longest])
        corner = torch.rand(count, 2, generator=random) * (1 - size)
        boxes = 100 * torch.cat([corner, corner + size], 1)
        labels = torch.randint(1, 4, (count,), generator=random)
        self.objects = Objects(boxes, labels, torch.arange(count) == 1, torch.zeros(0), torch.tensor([0, count]))
        self.sizes = torch.tensor([[100, 100]])

    def __len__(self):
        return 1


# The pictures' files


def write_set(folder, names=("train", "search", "test"), per_split=3):
    """Splits of VOC sets of their own, each picture with other bytes."""
    splits = {}
    for number, name in enumerate(names):
        stems = {f"{name}{'x' * (10 * number + i)}": [("cat", 0, 0, 24, 16)] for i in range(per_split)}
        write_voc(folder / name, stems)
        split = read_voc(folder / name, ["trainval"])
        splits[name] = (split, range(len(split)))
    return splits


def test_all_faulty_pictures_are_one_list(tmp_path):
    splits = write_set(tmp_path)
    assert plan.check_pictures(splits, DataConfig()) == []
    broken = [splits["train"][0].paths[1], splits["test"][0].paths[0]]
    Path(broken[0]).write_bytes(b"")
    write_picture(tmp_path / "other.jpg", 20, 20)
    (tmp_path / "other.jpg").rename(broken[1])
    with pytest.raises(UserError) as caught:
        plan.check_pictures(splits, DataConfig(root="DATA"))
    lines = str(caught.value).splitlines()
    assert (
        "DATA: 2 faults" in lines[0] and broken[0] in lines[1] and "20 x 20 pixels, its annotation says 48" in lines[2]
    )
    data = DataConfig(root="DATA", on_error="skip", max_skipped=0.5)
    assert plan.check_pictures(splits, data) == ["DATA: 2 of 9 pictures left out (2 unreadable)"]


def test_a_picture_in_two_splits_is_named(tmp_path):
    splits = write_set(tmp_path)
    one, other = splits["search"][0].paths[2], splits["test"][0].paths[0]
    shutil.copy(one, other)
    (note,) = plan.check_pictures(splits, DataConfig())
    where = "1 of 3 pictures of test are in train or search as well, byte for byte"
    assert note == f"warning: {where}: {other} = {one}"


def test_a_test_split_that_is_the_training_data_is_said(tmp_path):
    splits = write_set(tmp_path, names=["all"], per_split=5)
    everything = splits["all"][0]
    parts = {"train": [0, 1, 2], "search": [3, 4], "test": range(5)}
    (note,) = plan.check_pictures({name: (everything, rows) for name, rows in parts.items()}, DataConfig())
    assert note.startswith("warning: 5 of 5 pictures of test are in train or search as well, byte for byte: ")


# Prior boxes that fit


def test_priors_are_proposed_where_a_class_is_not_covered(tiny_detector, tiny_config, tmp_path):
    config, detector = tiny_config(), tiny_detector(num_classes=2)
    objects = {f"p{i}": [("bar", 0, 2 * i, 48, 2 * i + 5), ("box", 10, 5, 34, 25)] for i in range(8)}
    write_voc(tmp_path, objects)
    annotations = read_voc(tmp_path, ["trainval"])
    head, report = plan.propose_priors(annotations, detector, config)
    assert head is config.head
    assert report == ["note: prior boxes cover less than 80% of bar; see --fit-priors"]
    head, report = plan.propose_priors(annotations, detector, config, if_poor=True)
    assert not head.squares and [len(ratios) for ratios in head.aspect_ratios] == [2, 2, 2]
    assert "at 64 px, 84 as before: bar 0.0% -> 100.0%, box 100.0% -> 100.0%" in report[1]
    config.head = head
    fitted = ElasticSSD(config, 2)
    assert len(fitted.priors(64)) == len(detector.priors(64))
    # All is well now, and fitting again would gain nothing.
    assert plan.propose_priors(annotations, fitted, config, if_poor=True) == (head, [])
    again, report = plan.propose_priors(annotations, fitted, config, fit=True)
    assert again is head and "cover no more" in report[0]


@settings(max_examples=15)
@given(count=st.integers(1, 40), seed=st.integers(0, 2**31), longest=st.floats(0.5, 4))
def test_fitted_priors_are_as_many_and_never_cover_less(tiny_detector, tiny_config, count, seed, longest):
    """Of the classes on average, and of the worst one."""
    config, boxes = tiny_config(), RandomBoxes(count, seed, longest)
    detector = tiny_detector()
    with mock.patch("lib.priors.FIT_STARTS", 2):
        config.head, _ = plan.propose_priors(boxes, detector, config, fit=True)
    fitted = ElasticSSD(config, 3)
    assert len(fitted.priors(64)) == len(detector.priors(64))
    split = (boxes, [0])
    before, after = (torch.tensor(plan.coverage_of(split, net.priors(64), 0.5)) for net in (detector, fitted))
    assert after.nanmean() >= before.nanmean() and after[~after.isnan()].min() >= before[~before.isnan()].min()


def test_the_plan_says_sizes_costs_and_priors(tiny_detector, tiny_config):
    detector = tiny_detector()
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
    assert line == "final: 2 epochs of 6 steps, 4 images a step of 24, sgd, learning rate 0.01 (cosine)"
    short = tiny_config(final__lr_schedule__warmup_steps=12).final
    assert plan.describe_training("final", short, 24, 6).startswith(
        f"{line}\nnote: final.lr_schedule.warmup_steps is 12: "
    )


def test_the_first_call_does_not_count_and_the_median_does(clock, monkeypatch):
    durations = iter([0.3, 0.01, 0.01, 0.05, 0.01, 0.01, 0.01])
    monkeypatch.setattr(plan, "SECONDS", 0.38)
    assert typical_seconds([lambda: clock.work(next(durations))]) == pytest.approx([0.01])
    assert list(durations) == [0.01, 0.01]
    calls = []
    assert typical_seconds([lambda: calls.append(0), lambda: calls.append(1)]) == [0, 0] and calls == [0, 1] * 10


def test_measuring_ends_at_its_deadline_however_slow_a_call_is(clock):
    """A first call that used up the time counts; what was never called stands for its like."""
    calls = []

    def work(seconds):
        calls.append(seconds)
        clock.work(seconds)

    assert typical_seconds([partial(work, seconds) for seconds in (7.0, 9.0, 11.0)]) == [7.0] * 3 and calls == [7.0]
    assert typical_seconds([partial(work, seconds) for seconds in (1.0, 3.0, 5.0)]) == [1.0, 3.0, 2.0]


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
        self.norm = torch.nn.BatchNorm2d(1)  # every detector has some
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
