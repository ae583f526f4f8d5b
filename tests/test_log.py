"""What a run writes: torn lines, NaN, TensorBoard, the progress bar, curves."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from lib import UserError
from lib.images import read_picture
from lib.log import RunLog, duration, finite, plot_training, progress, read_log, say


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    log = RunLog(path)
    log.write("train", 3, losses={"class": 1.5}, lr=0.1)
    (record,) = read_log(path)
    assert record.pop("time") > 1.6e9
    assert record == {"kind": "train", "step": 3, "losses": {"class": 1.5}, "lr": 0.1}


def test_a_second_run_appends(tmp_path):
    for step in (1, 2):
        log = RunLog(tmp_path / "log.jsonl")
        log.write("train", step)
    assert [r["step"] for r in read_log(tmp_path / "log.jsonl")] == [1, 2]


@pytest.mark.parametrize("cut", [1, 2, 10])
def test_a_torn_line_is_left_out_and_no_other_line_is(tmp_path, cut):
    path = tmp_path / "log.jsonl"
    log = RunLog(path)
    for step in (1, 2, 3):
        log.write("train", step)
    path.write_bytes(path.read_bytes()[:-cut])
    assert [r["step"] for r in read_log(path)] == ([1, 2, 3] if cut == 1 else [1, 2])


def test_no_log_is_no_records(tmp_path):
    assert read_log(tmp_path / "none.jsonl") == []


def test_nan_becomes_null(tmp_path):
    nan, inf = float("nan"), float("inf")
    assert finite({"a": nan, "b": {"c": -inf, "d": 1.5}, "e": [nan, 2, (inf,)], "f": "nan", "g": None, "h": True}) == {
        "a": None,
        "b": {"c": None, "d": 1.5},
        "e": [None, 2, [None]],
        "f": "nan",
        "g": None,
        "h": True,
    }
    log = RunLog(tmp_path / "log.jsonl")
    log.write("eval", 1, AP=np.float64("nan"), losses=[nan])

    def refuse(constant: str):
        raise AssertionError(f"{constant} is not JSON")

    (record,) = (json.loads(line, parse_constant=refuse) for line in log.path.read_text().splitlines())
    assert (record["AP"], record["losses"]) == (None, [None])


def test_tensorboard_gets_every_number(tmp_path):
    seen = []

    class Board:
        def add_scalar(self, *scalar):
            seen.append(scalar)

        def flush(self):
            seen.append("flushed")

    log = RunLog(tmp_path / "log.jsonl")
    log._board = Board()
    log.write("eval", 7, networks={"largest": {"AP": 0.5}}, lr=0.1, name="x", flag=True)
    assert seen == [("eval/networks/largest/AP", 0.5, 7), ("eval/lr", 0.1, 7), "flushed"]


def test_a_missing_tensorboard_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        RunLog(tmp_path / "log.jsonl", tensorboard=True)
    assert not any(tmp_path.iterdir())


def test_progress_and_lines_do_not_mix(capsys):
    assert list(progress([1, 2, 3], "epoch 1")) == [1, 2, 3]
    say("a line")
    assert capsys.readouterr().out == "a line\n"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "0 s"),
        (89, "89 s"),
        (90, "2 min"),
        (5399, "90 min"),
        (5400, "1.5 h"),
        (172799, "48.0 h"),
        (172800, "2.0 days"),
    ],
)
def test_durations_in_words(seconds, words):
    assert duration(seconds) == words


# Curves


def write_log(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def train(epoch, **losses):
    return {"kind": "train", "step": epoch, "losses": losses}


def evaluation(epoch, **networks):
    return {"kind": "eval", "step": epoch, "networks": networks}


def pixels(path):
    return read_picture(str(path))


@pytest.mark.parametrize(
    "records",
    [
        [],
        [train(1, cls=2.0, loc=1.0)],
        [train(1, cls=2.0), train(2, cls=1.5, distill=0.1), evaluation(2, smallest={"AP": 0.1}, largest={"AP": None})],
        [train(1, cls=None), evaluation(1, detector={"AP": 0.2})],
    ],
    ids=["empty", "losses only", "a loss that comes later", "not a number"],
)
def test_curves_are_drawn_from_any_log(tmp_path, records):
    write_log(tmp_path / "log.jsonl", *records)
    plot_training(tmp_path / "log.jsonl", tmp_path / "curves.png", "AP", phases=[1, 2])
    assert pixels(tmp_path / "curves.png").float().std() > 1


def test_a_resumed_epoch_replaces_the_one_before(tmp_path):
    once, twice = tmp_path / "once", tmp_path / "twice"
    write_log(once, train(1, cls=2.0), train(2, cls=1.0))
    write_log(twice, train(1, cls=2.0), train(2, cls=9.0), train(2, cls=1.0))
    for log in (once, twice):
        plot_training(log, log.with_suffix(".png"), "AP")
    assert pixels(once.with_suffix(".png")).equal(pixels(twice.with_suffix(".png")))


def test_a_loss_that_comes_later_is_drawn(tmp_path):
    """Distillation starts when its schedule says so, not at epoch 1."""
    first, both = tmp_path / "first", tmp_path / "both"
    write_log(first, train(1, cls=2.0), train(2, cls=1.0), train(3, cls=1.0))
    write_log(both, train(1, cls=2.0), train(2, cls=1.0, distill=1.5), train(3, cls=1.0, distill=1.4))
    for log in (first, both):
        plot_training(log, log.with_suffix(".png"), "AP")
    assert not pixels(first.with_suffix(".png")).equal(pixels(both.with_suffix(".png")))
