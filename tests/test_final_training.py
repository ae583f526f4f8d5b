"""Stage 3: what a training starts from, its losses, and what it keeps of its evaluations."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import killed_at
from torch import nn

from lib import UserError, checkpoint, distributed, final_training
from lib.config import FinalConfig
from lib.datasets import Batch
from lib.detector import Normalize
from lib.elastic import to_device
from lib.final_training import FinalTraining, freeze_norms, supernet_path
from lib.log import RunLog, read_log
from lib.losses import DetectionLoss
from lib.training import Trainer
from lib.training_run import read_previous

CPU = torch.device("cpu")


def test_a_supernet_that_is_named_goes_before_that_of_the_search(tiny_config, tmp_path, capsys):
    """By --load before the configuration before the genotype file, whose supernet may have changed since."""
    for name in ("flag", "key", "file"):
        checkpoint.save(tmp_path / name / "last.pt", {"model": {}})
    source = {"supernet": {"path": str(tmp_path / "file" / "last.pt"), "sha256": "another"}}
    named = tiny_config(final__supernet_state_dict=tmp_path / "key")
    found = [supernet_path(*given) for given in ((named, source, tmp_path / "flag"), (named, source, None))]
    assert [path.parent.name for path in found] == ["flag", "key"]
    assert supernet_path(tiny_config(), source, None).parent.name == "file"
    assert capsys.readouterr().out.count("last.pt is not the supernet that was searched, or has changed since") == 3
    source["supernet"]["sha256"] = checkpoint.sha256(tmp_path / "file" / "last.pt")
    assert supernet_path(tiny_config(), source, None) and not capsys.readouterr().out
    with pytest.raises(UserError, match="names no supernet: --load DIR"):
        supernet_path(tiny_config(), {}, None)


# The losses


@pytest.fixture
def batch():
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([0.2, 0.2, 0.7, 0.8]).expand(4, 1, 4)
    return Batch(images, boxes, torch.ones(4, 1, dtype=torch.int64), torch.arange(4))


def test_a_frozen_base_net_keeps_its_statistics_and_has_its_own_learning_rate(tiny_detector, tiny_config):
    config = tiny_config(final__freeze_base_net=True, final__weight_decay=0)
    detector = tiny_detector().train()
    model = detector.extract(detector.space.smallest())
    t = Trainer(model, config.final, CPU, 4, backbone_lr=0.0)
    model.train()
    freeze_norms(model.backbone)
    before = copy.deepcopy(model.state_dict())
    loss = DetectionLoss(config.loss)
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    targets = loss.match(torch.rand(4, 1, 4).sort(-1).values, torch.ones(4, 1, dtype=torch.int64), model.priors)
    t.update(iter([loss(*model(images), targets)]))
    changed = {
        name.split(".")[0] for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert changed == {"extras", "predictors"}


# What is kept


class FakeTestSet(list):
    """Stands in for annotations: two images of three classes."""

    classes = ("cat", "dog", "eel")
    category_ids = (1, 7, 9)

    def fingerprint(self):
        return "pictures"


@pytest.fixture
def train(tiny_detector, tiny_config, batch, tmp_path, monkeypatch):
    """`train(resume)`: a training of three epochs of one batch; after epochs 1 to 3 its AP is 0.2, 0.5 and 0.3."""
    evaluated = []

    def make(resume=False, largest=False, **changes):
        config = tiny_config(final__epochs=3, final__save_every=1, **changes)
        detector = tiny_detector()
        genotype = detector.space.largest() if largest else detector.space.smallest()
        sampler = SimpleNamespace(batches_per_epoch=1, batch_size=4, per_rank=4, set_epoch=lambda epoch, start: None)
        dataset = SimpleNamespace(annotations=FakeTestSet())
        loader = type("Loader", (list,), {"batch_sampler": sampler, "dataset": dataset})([batch])
        previous = read_previous(tmp_path / "run", config, "final") if resume else None
        options = {"folder": tmp_path / "run", "device": CPU, "inherits": False, "previous": previous}
        options["recipe"] = tiny_config(**changes | {"final__epochs": 99})
        return FinalTraining(config, detector, genotype, loader, FakeTestSet("ab"), **options)

    def evaluate(model, *_):
        epoch = training[-1].trainer.epoch - 1
        evaluated.append(epoch)
        ap = {1: 0.2, 2: 0.5, 3: 0.3}[epoch]
        return {"AP": ap, "AP50": 0.1 * epoch, "mAP": float("nan"), "threshold": 0.5, "per_class": {}}

    training = []

    def run(resume=False, **changes):
        training.append(make(resume, **changes))
        training[-1].run()

    monkeypatch.setattr(final_training, "evaluate", evaluate)
    monkeypatch.setattr(final_training, "plot_training", lambda *_: None)
    monkeypatch.setattr(checkpoint, "code_revision", lambda: None)  # it takes longer than all the rest
    return SimpleNamespace(make=make, run=run, evaluated=evaluated, folder=tmp_path / "run")


def test_the_best_evaluation_is_kept(train):
    train.run()
    assert train.evaluated == [1, 2, 3]
    metrics = json.loads((train.folder / "metrics.json").read_text())
    assert (metrics["epoch"], metrics["AP"], metrics["mAP"], metrics["test_images"]) == (2, 0.5, None, 2)
    best, last = (checkpoint.read(train.folder / name) for name in ("best.pt", "last.pt"))
    assert (best["epoch"], last["epoch"], last["best"]["epoch"]) == (2, 4, 2)
    assert best.keys() == {"format", "genotype", "config", "classes", "category_ids", "epoch", "model", "thresholds"}
    assert (best["config"]["final"]["epochs"], last["config"]["final"]["epochs"]) == (99, 3)  # the recipe, and this run
    train.run(resume=True)
    assert train.evaluated == [1, 2, 3]  # nothing is left to do


class Plain(nn.Sequential):
    image_size = 8
    priors = torch.zeros(1)


@pytest.fixture
def gpu(monkeypatch):
    """A stand-in that warms up and refuses as torch does, and then takes batches of one shape in memory of its own."""
    replayed = []

    def record(module, inputs):
        assert not torch.is_autocast_enabled("cpu") or not torch.is_autocast_cache_enabled()
        for _ in range(3):
            module(*inputs)
        forward, (own,) = module.forward, inputs

        def replay(images):
            replayed.append(images.shape)
            return forward(own.copy_(images))

        module.forward = replay

    real = torch.autocast.__init__
    monkeypatch.setattr(torch.autocast, "__init__", lambda self, _, *args, **more: real(self, "cpu", *args, **more))
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    return replayed


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recorded_passes_compute_what_the_network_does_and_leave_no_trace(gpu, precision):
    torch.manual_seed(0)
    model = Plain(Normalize([128.0] * 3, [128.0] * 3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    model[0].register_forward_pre_hook(lambda module, images: (*images, 8))
    other = copy.deepcopy(model)
    network = final_training.launched(model, FinalConfig(precision=precision), 4, torch.device("cuda"))
    for count in (4, 2, 4):
        images = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8)
        assert torch.equal(network(images), other(images))
    assert gpu == [(4, 3, 8, 8)] * 2
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), other.buffers(), strict=True))


@pytest.mark.parametrize(
    ("changes", "processes", "records"),
    [
        ({}, 2, True),
        ({"cuda_graph": False}, 1, False),
        ({"accumulate": 2}, 1, False),  # a replay overwrites the gradients
        ({"sync_batch_norm": True}, 1, True),
        ({"sync_batch_norm": True}, 2, False),
    ],
)
def test_passes_are_recorded_on_a_gpu_unless_gradients_accumulate(gpu, monkeypatch, changes, processes, records):
    monkeypatch.setattr(distributed, "world", lambda: distributed.World(size=processes))
    model = Plain(Normalize([128.0] * 3, [128.0] * 3), nn.Conv2d(3, 4, 3))
    model[0].register_forward_pre_hook(lambda module, images: (*images, 8))
    assert (final_training.launched(model, FinalConfig(**changes), 4, torch.device("cuda")) is model) != records


@pytest.mark.parametrize(
    ("device", "half", "channels_last"),
    [("cpu", False, True), ("cpu", True, True), ("meta", False, False), ("meta", True, True)],
)
def test_weights_are_channels_last_on_a_cpu_and_for_one_network_in_half_precision(device, half, channels_last):
    conv = to_device(nn.Conv2d(8, 8, 3), torch.device(device), trains_in_half=half)
    assert conv.weight.is_contiguous(memory_format=torch.channels_last) == channels_last


def test_what_trains_on_a_cpu_is_channels_last(train):
    training = train.make()
    convs = [m for m in training.trainer.model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size[0] > 1]
    assert convs and all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in convs if m.groups == 1)


@pytest.mark.parametrize(("objective", "epoch"), [("AP", 2), ("AP50", 3), ("mAP", 1)])
def test_the_best_epoch_is_that_of_the_objective(train, capsys, objective, epoch):
    """The mAP is NaN here, since no object counts: the first epoch stays."""
    train.run(search__objective=objective)
    assert json.loads((train.folder / "metrics.json").read_text())["epoch"] == epoch
    assert checkpoint.read(train.folder / "best.pt")["epoch"] == epoch
    printed = capsys.readouterr().out.splitlines()
    kept = [line for line in printed if f"the best {objective} so far" in line]
    assert kept[-1].startswith(f"epoch {epoch}: AP ")


def damage(path):
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(
    ("spoil", "words"), [(damage, "not a readable checkpoint"), (Path.unlink, "no such checkpoint")]
)
def test_a_run_that_ended_says_that_its_best_detector_is_gone(train, spoil, words):
    train.run()
    spoil(train.folder / "best.pt")
    before = {path.name: path.read_bytes() for path in train.folder.iterdir()}
    with pytest.raises(
        UserError, match=rf"best\.pt: {words}.*run has ended.*last\.pt is the detector of the last epoch"
    ):
        train.run(resume=True)
    assert before == {path.name: path.read_bytes() for path in train.folder.iterdir()}


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_best_detector_of_an_epoch_that_is_trained_again_is_no_second_timeline(train, monkeypatch, epoch):
    """From a checkpoint before the best epoch, on another course: best.pt is of an epoch that this run has trained."""
    train.run()
    (train.folder / "last.pt").write_bytes((train.folder / f"epoch_000{epoch}.pt").read_bytes())
    train.run(resume=True, final__learning_rate=0.02)
    assert train.evaluated == [1, 2, 3, *range(epoch + 1, 4)]
    best = checkpoint.read(train.folder / "best.pt")
    assert best["epoch"] == json.loads((train.folder / "metrics.json").read_text())["epoch"] == 2
    assert best["config"]["final"]["learning_rate"] == (0.02 if epoch == 1 else 0.01)


@pytest.mark.parametrize("at", [0, 1, 3, 5, 7])
def test_a_final_training_that_is_killed_between_two_writes_ends_the_same(train, monkeypatch, at):
    """Before or right after best.pt, metrics.json, last.pt or a line of the log, in the epoch that is the best."""
    train.run()
    names = ("best.pt", "last.pt")
    expected = {name: checkpoint.read(train.folder / name) for name in names}
    metrics = (train.folder / "metrics.json").read_bytes()
    log = [(r["kind"], r["step"]) for r in read_log(train.folder / "log.jsonl")]
    shutil.rmtree(train.folder)
    train.evaluated.clear()
    writers = (checkpoint, "save"), (checkpoint, "write_text"), (RunLog, "write")
    with killed_at(at, *writers, counts=lambda: train.evaluated[-1:] == [2]):
        train.run()
    train.run(resume=True)
    for name in names:
        found = checkpoint.read(train.folder / name)
        assert all(torch.equal(tensor, expected[name]["model"][key]) for key, tensor in found["model"].items()), name
        assert found["epoch"] == expected[name]["epoch"]
    assert (train.folder / "metrics.json").read_bytes() == metrics
    assert [(r["kind"], r["step"]) for r in read_log(train.folder / "log.jsonl")] == log


def test_an_evaluation_that_was_not_logged_is_repeated_and_its_best_is_known(train, monkeypatch):
    write = RunLog.write

    def die_at_the_second(log, kind, step, **values):
        if (kind, step) == ("eval", 2):
            raise KeyboardInterrupt
        write(log, kind, step, **values)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunLog, "write", die_at_the_second)
        train.run()
    assert checkpoint.read(train.folder / "last.pt")["best"]["epoch"] == 2
    train.run(resume=True)
    assert train.evaluated == [1, 2, 2, 3]
    assert checkpoint.read(train.folder / "last.pt")["best"]["epoch"] == 2
    assert [r["step"] for r in read_log(train.folder / "log.jsonl") if r["kind"] == "eval"] == [1, 2, 3]


def test_a_folder_with_another_genotype_is_refused_and_left_alone(train):
    train.run()
    before = {path.name: path.read_bytes() for path in train.folder.iterdir()}
    with pytest.raises(UserError, match=r"last\.pt: holds another genotype; .*--genotype.*--train-dir"):
        train.make(resume=True, largest=True)
    assert {path.name: path.read_bytes() for path in train.folder.iterdir()} == before
