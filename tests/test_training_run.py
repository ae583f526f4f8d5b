"""The epoch loop: what it saves, logs and scores, how it stops, diverges and goes on; and what --resume may change."""

from __future__ import annotations

import functools
import itertools
import json
import math
import signal
from types import SimpleNamespace

import pytest
from test_training import CPU, network, states_equal
from tiny_runs import Killed, killed_at

from lib import UserError, checkpoint, config_io, training_run
from lib.config import Config
from lib.log import read_log
from lib.runtime import Stopped
from lib.training_run import Training, read_previous

PICTURES = SimpleNamespace(classes=("cat", "dog"), fingerprint=lambda: "pictures")


class Loader(list):
    """The batches 0 to 3 of an epoch; `epochs` are those that were asked for."""

    def __init__(self):
        self.epochs = []
        self.batch_sampler = SimpleNamespace(set_epoch=self.set_epoch, batches_per_epoch=4)

    def set_epoch(self, epoch, start):
        self.epochs.append((epoch, start))
        batches = [SimpleNamespace(number=i, boxes=None, labels=None) for i in range(start, 4)]
        self[:] = [SimpleNamespace(to=lambda _device, batch=batch: batch) for batch in batches]


class Counting(Training):
    """Trains on losses that equal the batch's number; `hook(epoch, batch)` is called before each."""

    stage = "supernet"

    def __init__(self, folder, hook=lambda epoch, batch: None, due=(), resume=False, scores=(), **options):
        self.model, self.hook, self.scored, self.scores = network(), hook, [], iter(scores)
        config = Config()
        for name, value in {"epochs": 3, "learning_rate": 0.1, **options}.items():
            setattr(config.supernet, name, value)
        previous = read_previous(folder, config, "supernet") if resume else None
        options = {"folder": folder, "device": CPU, "previous": previous}
        super().__init__(config, self.model, Loader(), {"training": PICTURES}, **options)
        self.due = set(due)
        self.loss = SimpleNamespace(match_together=lambda objects, priors: [None] * len(objects))

    def priors(self):
        return None

    def losses(self, batch, targets):
        self.hook(self.trainer.epoch, batch.number)
        yield {"a": self.model[4].weight.sum() * 0 + float(batch.number)}

    def score(self, epoch):
        self.scored.append(epoch)
        self.log.write("eval", epoch, networks={"largest": {"AP": next(self.scores, 0.0)}})


def logged(folder):
    return [(r["kind"], r["step"]) for r in read_log(folder / "log.jsonl")]


@pytest.fixture
def stop(monkeypatch):
    """The request to stop that every training sees, without signals."""

    class Stop:
        requested, number = False, signal.SIGTERM

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def agree(self):
            pass

    request = Stop()
    monkeypatch.setattr(training_run, "StopRequest", lambda: request)
    return request


def test_a_training_logs_saves_and_scores_its_epochs(tmp_path, stop):
    run = Counting(tmp_path, due=[1, 3], save_every=2)
    run.run()
    assert run.loader.epochs == [(1, 0), (2, 0), (3, 0)] and run.scored == [1, 3]
    assert logged(tmp_path) == [("train", 1), ("eval", 1), ("train", 2), ("train", 3), ("eval", 3)]
    assert read_log(tmp_path / "log.jsonl")[0]["losses"] == {"a": 1.5}
    assert {p.name for p in tmp_path.iterdir()} == {"log.jsonl", "last.pt", "last_good.pt", "epoch_0002.pt"}
    assert (run.trainer.epoch, run.trainer.batch, run.trainer.step) == (4, 0, 12)


@pytest.mark.parametrize(("stop_after", "position"), [(0, (1, 1)), (2, (1, 3)), (3, (2, 0))])
def test_a_stop_ends_the_epoch_after_its_step(tmp_path, stop, stop_after, position):
    """On the last batch the epoch is over: it is logged and scored before the training stops."""

    def hook(_epoch, batch):
        stop.requested = batch == stop_after

    run = Counting(tmp_path, hook, due=[1])
    with pytest.raises(Stopped, match=r"everything is in .*last\.pt, the same command with --resume goes on") as caught:
        run.run()
    assert caught.value.number == signal.SIGTERM and (run.trainer.epoch, run.trainer.batch) == position
    assert len(read_log(tmp_path / "log.jsonl")) == (2 if stop_after == 3 else 0)
    stop.requested = False
    resumed = Counting(tmp_path, due=[1], resume=True)
    resumed.run()
    assert resumed.loader.epochs[0] == position and resumed.trainer.step == 12
    assert run.scored + resumed.scored == [1]
    assert read_log(tmp_path / "log.jsonl")[0]["losses"] == {"a": 1.5}  # the mean of the epoch, not of its rest


def test_a_stop_waits_for_the_batches_that_share_a_step(tmp_path, stop):
    def hook(epoch, batch):
        stop.requested = True

    run = Counting(tmp_path, hook, accumulate=2)
    with pytest.raises(Stopped):
        run.run()
    assert (run.trainer.epoch, run.trainer.batch, run.trainer.step) == (1, 2, 1)


def test_a_training_that_was_killed_while_it_scored_scores_again_and_once(tmp_path, stop, monkeypatch):
    def die(self, epoch):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Counting, "score", die)
        Counting(tmp_path, due=[2]).run()
    run = Counting(tmp_path, due=[2], resume=True)
    run.run()
    assert run.scored == [2] and run.loader.epochs == [(3, 0)]
    again = Counting(tmp_path, due=[2, 3], resume=True)  # 3 was not due before
    again.run()
    assert again.scored == [3] and again.loader.epochs == []


def test_a_training_that_starts_over_is_scored_anew(tmp_path, stop):
    """Its folder may hold the log of an earlier one whose last.pt is gone."""
    Counting(tmp_path, due=[2]).run()
    for name in ("last.pt", "last_good.pt"):
        (tmp_path / name).unlink()
    run = Counting(tmp_path, due=[2], resume=True)
    run.run()
    assert run.scored == [2] and logged(tmp_path) == [("train", 1), ("train", 2), ("eval", 2), ("train", 3)]


@pytest.mark.parametrize("at", range(22))
def test_killed_anywhere_between_two_writes_the_end_is_the_same(tmp_path, stop, monkeypatch, at):
    """Each file that is written, and each line of the log, is a point to be killed at: before it, or right after it."""

    def whole(folder, **options):
        run = Counting(folder, due=[1, 3], save_every=2, scores=itertools.repeat(0.5), **options)
        run.run()
        return run

    expected = whole(tmp_path / "whole")
    with killed_at(at, (checkpoint, "save"), (checkpoint, "copy"), (training_run.RunLog, "write")):
        whole(tmp_path / "broken")
    resumed = whole(tmp_path / "broken", resume=True)
    assert states_equal(resumed.model.state_dict(), expected.model.state_dict())
    assert logged(tmp_path / "broken") == logged(tmp_path / "whole")
    for name in ("last.pt", "last_good.pt", "epoch_0002.pt"):
        ends = [checkpoint.read(tmp_path / run / name) for run in ("broken", "whole")]
        assert states_equal(*({k: v for k, v in end.items() if k != "random"} for end in ends)), name
    losses = [[r.get("losses") for r in read_log(tmp_path / run / "log.jsonl")] for run in ("broken", "whole")]
    assert losses[0] == losses[1]


def test_work_is_saved_within_an_epoch_every_so_many_minutes(tmp_path, stop, monkeypatch):
    """A batch takes 4 minutes here: after three of them, the time of 10 minutes is over."""
    now, saved = itertools.count(0, 240), []
    monkeypatch.setattr(training_run.time, "monotonic", lambda: next(now))
    save = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda path, state: saved.append(state["batch"]) or save(path, state))

    def hook(epoch, batch):
        if (epoch, batch) == (2, 3):
            raise Killed

    with pytest.raises(Killed):
        Counting(tmp_path, hook, save_minutes=10).run()
    position = saved[-1]
    assert 0 < position < 4
    resumed = Counting(tmp_path, resume=True)
    resumed.run()
    assert resumed.loader.epochs[0] == (2, position) and resumed.trainer.step == 12
    assert [r["losses"] for r in read_log(tmp_path / "log.jsonl")] == [{"a": 1.5}] * 3
    before = len(saved)
    Counting(tmp_path / "never", save_minutes=0).run()
    assert saved[before:] == [0, 0, 0]


# What fails


@pytest.mark.parametrize(
    "error", [RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), MemoryError(), UserError("a.jpg: torn")]
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_an_epoch_has_done_is_saved_before_an_error_ends_it(tmp_path, stop, error, accumulate):
    whole = Counting(tmp_path / "whole", accumulate=accumulate)
    whole.run()

    def hook(epoch, batch):
        if (epoch, batch) == (2, 3):
            raise error

    with pytest.raises(type(error)):
        Counting(tmp_path / "broken", hook, accumulate=accumulate).run()
    payload = checkpoint.read(tmp_path / "broken" / "last.pt")
    assert (payload["epoch"], payload["batch"]) == (2, 3 if accumulate == 1 else 2)
    resumed = Counting(tmp_path / "broken", resume=True, accumulate=accumulate)
    resumed.run()
    assert states_equal(resumed.model.state_dict(), whole.model.state_dict())


def test_a_loader_that_heard_the_signal_too_does_not_cost_the_stop_its_save(tmp_path, stop):
    def hook(epoch, batch):
        if batch == 2:
            stop.requested = True
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated.")

    with pytest.raises(Stopped):
        Counting(tmp_path, hook).run()
    assert checkpoint.read(tmp_path / "last.pt")["batch"] == 2


@pytest.mark.parametrize("within", [True, False])
def test_weights_that_are_not_finite_are_never_saved(tmp_path, stop, within):
    """The loss of the last batch still is finite, or the next one is not."""

    def hook(epoch, batch):
        if (epoch, batch) == (2, 1 if within else 3):
            run.model[4].bias.data.fill_(float("nan"))

    run = Counting(tmp_path, hook, save_minutes=1e-9 if within else 0)
    with pytest.raises(
        UserError, match=r"4\.bias is no longer finite; .*last\.pt is the last one that was saved, --res"
    ):
        run.run()
    payload = checkpoint.read(tmp_path / "last.pt")
    assert all(tensor.isfinite().all() for tensor in payload["model"].values())
    assert (payload["epoch"], payload["batch"]) == ((2, 1) if within else (2, 0))


@pytest.mark.parametrize("read_every", [1, 10])
def test_nothing_is_saved_after_a_loss_that_is_not_finite(tmp_path, stop, monkeypatch, read_every):
    """Neither at the epoch's end, nor within the epoch, nor when something else fails before the loss is read."""
    for failure in (0, 2):
        run = Counting(tmp_path / str(failure), save_minutes=1e-9 if failure == 0 else 0)
        run.trainer._read_every = read_every

        def losses(batch, targets, run=run, failure=failure):
            if run.trainer.step == 6 + failure // 2 and failure:
                raise RuntimeError("the machine")
            yield {"a": run.model[4].bias.sum() * (float("nan") if run.trainer.step == 6 else 0.0)}

        monkeypatch.setattr(run, "losses", losses)
        if failure and read_every > 1:
            with pytest.raises(RuntimeError, match="the machine"):
                run.run()
        else:
            with pytest.raises(UserError, match=r"epoch 2, step 6: the loss 'a' is nan.*last\.pt is the last one"):
                run.run()
        saved = checkpoint.read(run.last)
        assert saved["step"] <= 6 and all(t.isfinite().all() for t in saved["model"].values())


def test_a_training_that_finds_nothing_any_more_stops_and_keeps_the_last_good_checkpoint(tmp_path, stop):
    """A score of 0 before anything was found, or now and then, is no collapse."""
    scores = [0.0, 0.0, 0.0, 0.2, 0.0, 0.0, 0.3, 0.0, 0.0, 0.0, 0.5]
    run = Counting(tmp_path, due=range(1, 12), scores=scores, epochs=11)
    words = r"epoch 10: AP has been 0 for 3 evaluations, after 0\.300 at epoch 7; .*last_good\.pt is that of the"
    with pytest.raises(UserError, match=words):
        run.run()
    assert [checkpoint.read(tmp_path / name)["epoch"] for name in ("last.pt", "last_good.pt")] == [11, 8]
    (tmp_path / "last.pt").write_bytes((tmp_path / "last_good.pt").read_bytes())
    again = Counting(
        tmp_path, due=range(1, 12), scores=[0.4, 0.4, 0.4, 0.4], resume=True, epochs=11, learning_rate=0.01
    )
    again.run()
    assert again.loader.epochs[0] == (8, 0) and logged(tmp_path) == [
        (kind, n) for n in range(1, 12) for kind in ("train", "eval")
    ]


# What --resume goes on from


@pytest.fixture
def begun(tmp_path, stop):
    """The folder of a run that was stopped in epoch 2."""

    def hook(epoch, batch):
        stop.requested = (epoch, batch) == (2, 1)

    with pytest.raises(Stopped):
        Counting(tmp_path, hook, due=[1]).run()
    stop.requested = False
    return tmp_path


def other(value):
    """Another value of the same type, as far as `value` tells."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return f"{value}x" if isinstance(value, str) else [*value, *value, 1]


ALLOWED = {
    *("data.root", "data.workers", "data.cache", "data.on_error", "supernet.epochs", "supernet.learning_rate"),
    *("supernet.batch_size", "supernet.accumulate", "supernet.momentum", "supernet.weight_decay"),
    *("supernet.lr_schedule.warmup_steps", "supernet.eval_every", "supernet.save_minutes", "search.max_flops"),
}
REFUSED = {
    *("seed", "data.data_portion", "data.augment.flip", "backbone.mult_ratio", "search_space.num_cell_groups"),
    *("head.scales", "loss.type", "supernet.optimizer", "supernet.precision", "supernet.decay_norm_and_bias"),
    *("supernet.backbone_learning_rate", "supernet.ema_decay", "supernet.sampling", "supernet.distill.beta"),
}


def test_every_key_may_change_or_is_refused_by_its_name(begun, monkeypatch):
    before = {path.name: path.read_bytes() for path in begun.iterdir()}
    payload, saved = checkpoint.read(begun / "last.pt"), Config()
    monkeypatch.setattr(checkpoint, "read", lambda path: payload)
    monkeypatch.setattr(config_io, "from_dict", lambda data, source: saved)  # takes most of the time
    allowed, refused = set(), set()
    for key in config_io.KEYS:
        asked = Config()
        *path, leaf = key.split(".")
        section = functools.reduce(getattr, path, asked)
        if not hasattr(section, leaf):
            continue  # an alias
        setattr(section, leaf, other(getattr(section, leaf)))
        try:
            read_previous(begun, asked, "supernet")
            allowed.add(key)
        except UserError as error:
            assert str(error).startswith(f"{key}: expected ") and "last.pt began, found" in str(error), error
            refused.add(key)
    assert allowed >= ALLOWED and refused >= REFUSED
    assert before == {path.name: path.read_bytes() for path in begun.iterdir()}


def test_a_rate_of_the_backbone_that_was_set_may_change_and_not_be_taken_back(begun):
    path = begun / "last.pt"
    payload = checkpoint.read(path)
    payload["config"]["supernet"]["backbone_learning_rate"] = 0.01
    checkpoint.save(path, {k: v for k, v in payload.items() if k != "format"})
    config = Config()
    config.supernet.backbone_learning_rate = 0.02
    assert read_previous(begun, config, "supernet")
    with pytest.raises(UserError, match=r"backbone_learning_rate: expected 0\.01"):
        read_previous(begun, Config(), "supernet")


def test_the_best_epoch_of_a_final_training_keeps_its_measure(begun, monkeypatch):
    config = Config()
    config.search.objective = "AP50"
    assert read_previous(begun, config, "supernet")
    with pytest.raises(UserError, match=r"last\.pt: is of the other training"):
        read_previous(begun, config, "final")
    payload = checkpoint.read(begun / "last.pt")
    monkeypatch.setattr(checkpoint, "read", lambda path: {**payload, "genotype": {}})
    with pytest.raises(UserError, match=r"search\.objective: expected 'AP', with which"):
        read_previous(begun, config, "final")


MISTAKES = {
    "other classes": (
        {"classes": ("cat", "cow")},
        r"data\.classes: expected cat, dog, in this order, .* found cat, cow",
    ),
    "another order": ({"classes": ("dog", "cat")}, r"data\.classes: expected cat, dog, .* found dog, cat"),
    "other groups": ({"options": {"decay_norm_and_bias": False}}, "supernet.decay_norm_and_bias: expected True"),
    "a torn checkpoint": (
        {"torn": True},
        r"last\.pt: not a readable checkpoint.*last_good\.pt is that of the last .*: copy it",
    ),
    "a checkpoint that is gone": ({"gone": True}, r"last\.pt: no such checkpoint; .*last_good\.pt is that of the last"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistaken_resume_leaves_every_file_as_it_was(begun, name, monkeypatch):
    changes, words = MISTAKES[name]
    if "torn" in changes:
        (begun / "last.pt").write_bytes((begun / "last.pt").read_bytes()[:1000])
    if "gone" in changes:
        (begun / "last.pt").unlink()
    (begun / ".last.pt.999999999.part").write_text("left over")
    before = {path.name: path.read_bytes() for path in begun.iterdir()}
    monkeypatch.setattr(PICTURES, "classes", changes.get("classes", PICTURES.classes))
    with pytest.raises(UserError, match=words):
        Counting(begun, resume=True, **changes.get("options", {}))
    assert before == {path.name: path.read_bytes() for path in begun.iterdir()}


PARTS = ("config", "classes", "model", "optimizer", "epoch", "batch", "random")


@pytest.mark.parametrize(
    ("part", "value"), [*itertools.product(PARTS, [None, {"a": 1}, -1]), ("step", math.inf), ("step", -1), ("data", 5)]
)
def test_a_part_of_a_checkpoint_that_is_missing_or_nonsense_is_one_line(begun, monkeypatch, part, value):
    payload = checkpoint.read(begun / "last.pt")
    monkeypatch.setattr(checkpoint, "read", lambda path: {k: v for k, v in {**payload, part: value}.items() if v})
    with pytest.raises(UserError, match=r"last\.pt"):
        Counting(begun, resume=True)


def test_what_a_killed_process_left_over_goes(begun):
    (begun / ".last.pt.999999999.part").write_text("left over")
    Counting(begun, resume=True)
    assert not list(begun.glob(".*.part"))


def test_other_pictures_are_said(begun, monkeypatch, capsys):
    monkeypatch.setattr(PICTURES, "fingerprint", lambda: "others")
    Counting(begun, resume=True)
    assert "note: the training data are not those that" in capsys.readouterr().out


def test_a_larger_batch_goes_on_at_the_same_picture(begun):
    """Two of four batches of 32 are done: one of two of 64."""
    resumed = Counting(begun, resume=True, batch_size=64)
    assert (resumed.trainer.epoch, resumed.trainer.batch) == (2, 1)


def test_each_epoch_is_in_the_log_once(begun):
    """An earlier version logged an epoch again when it was resumed."""
    log = begun / "log.jsonl"
    lines = log.read_text().splitlines()
    log.write_text("\n".join([*lines, json.dumps({**json.loads(lines[0]), "step": 2}), lines[0], ""]))
    Counting(begun, due=[1], resume=True).run()
    assert logged(begun) == [("train", 1), ("eval", 1), ("train", 2), ("train", 3)]


def test_a_run_of_a_sampling_that_was_removed_is_refused(begun, monkeypatch):
    payload = checkpoint.read(begun / "last.pt")
    payload["config"]["supernet"]["sampling"] = "sandwich"
    monkeypatch.setattr(checkpoint, "read", lambda path: payload)
    with pytest.raises(UserError, match=r"last\.pt: began with supernet\.sampling sandwich, which was removed"):
        read_previous(begun, Config(), "supernet")
