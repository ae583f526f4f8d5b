"""The three scripts killed or stopped in the middle, and resumed: nothing is lost, nothing is done twice."""

from __future__ import annotations

import json
import signal
import time

import torch
from dispatch_helpers import wait_for
from search_runs import search
from tiny_runs import FINAL, SEARCH, SUPERNET, finish, read_lines, run, start

from lib import checkpoint
from lib.genotype import Genotype

BATCH = 4  # of epoch 2, after which the signal comes
SIGNALLED = f"""
import os
from lib.training import Trainer
update = Trainer.update
def update_and_signal(trainer, losses):
    found = update(trainer, losses)
    if (trainer.epoch, trainer.batch) == (2, {BATCH}):
        os.kill(os.getpid(), NUMBER)
    return found
Trainer.update = update_and_signal
"""


def assert_equal_state(a, b, path="payload"):
    """Every tensor bit by bit, every number exactly."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_equal_state(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal_state(x, y, f"{path}[{i}]")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, path


def interrupted(folder, script, arguments, number):
    """The checkpoints of a run and of one that sends itself a signal within its second epoch and is then resumed."""
    whole = start(folder, script, *arguments, "--train-dir", "whole")
    if script == FINAL:
        wait_for(lambda: (folder / "whole" / ".lock").exists())
        second = finish(start(folder, script, *arguments, "--train-dir", "whole", "--resume"))
        assert second.returncode == 2 and "whole: in use by process" in second.stderr, second.stderr
    signalled = SIGNALLED.replace("NUMBER", str(int(number)))
    done = finish(start(folder, script, *arguments, "--train-dir", "broken", prelude=signalled))
    if number == signal.SIGINT:
        assert done.returncode == 130 and "--resume goes on" in done.stdout, done.stderr
    else:
        assert done.returncode == -number, done.stderr
    halfway = checkpoint.read(folder / "broken" / "last.pt")
    printed = run(folder, script, *arguments, "--train-dir", "broken", "--resume")
    assert "resumed broken/last.pt" in printed
    done = finish(whole)
    assert done.returncode == 0, done.stderr
    return halfway, *(checkpoint.read(folder / name / "last.pt") for name in ("broken", "whole"))


def test_a_killed_supernet_goes_on_bit_by_bit(arguments, tmp_path):
    """Killed in epoch 2, where channels are sorted, with a moving average and AdamW's two moments."""
    more = ["supernet.epochs=3", "supernet.ema_decay=0.9", "supernet.optimizer=adamw"]
    options = [*arguments, *(part for key in more for part in ("--set", key))]
    halfway, broken, whole = interrupted(tmp_path, SUPERNET, options, signal.SIGKILL)
    assert (halfway["epoch"], halfway["batch"]) == (2, 0) and broken["epoch"] == 4 and broken["step"] == 3 * 9
    assert_equal_state(broken, whole)


def test_ctrl_c_within_an_epoch_goes_on_bit_by_bit(arguments, tmp_path):
    options = [*arguments, "--set", "supernet.epochs=3", "--set", "supernet.samples=3"]
    options += ["--set", "search_space.schedule_cfg.width_choice.boundary=[1, 3]"]  # nothing is scored before epoch 2
    halfway, broken, whole = interrupted(tmp_path, SUPERNET, options, signal.SIGINT)
    assert (halfway["epoch"], halfway["batch"]) == (2, BATCH)
    assert_equal_state(broken, whole)


def test_a_killed_final_training_goes_on_bit_by_bit(flow, arguments, tmp_path):
    folder, _ = flow
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tiny").symlink_to(folder / "runs" / "tiny")
    options = ["--genotype", folder / "runs/tiny/search/best.json", "--set", "final.epochs=4"]
    halfway, broken, whole = interrupted(tmp_path, FINAL, options, signal.SIGKILL)
    assert (halfway["epoch"], halfway["batch"]) == (2, 0) and broken["epoch"] == 5
    assert_equal_state(broken, whole)
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("broken", "whole")]
    for m in metrics:
        assert m.pop("latency")
        del m["commit"]  # it changes when somebody works on the code meanwhile
    assert metrics[0] == metrics[1]


def test_a_killed_search_has_every_evaluation_once(flow, tmp_path):
    folder, _ = flow
    options = ["--load", folder / "runs/tiny/supernet", "--gpus", "cpu", "--train-dir", tmp_path / "search"]
    options += ["--set", "search.num_epochs=3", "--set", "search.steps=8"]
    evaluations = tmp_path / "search" / "evals.jsonl"
    process = search(tmp_path, options, "gated")
    wait_for(lambda: evaluations.exists() and evaluations.read_bytes().endswith(b"\n"))
    process.kill()
    time.sleep(2)  # its forked worker, which shares the ledger's lock, ends within a second
    assert finish(process).returncode == -signal.SIGKILL and len(read_lines(evaluations)) == 1
    printed = run(tmp_path, SEARCH, *options, "--resume")
    assert "1 evaluations of this search" in printed
    records = read_lines(evaluations)
    assert len(records) == len({r["key"] for r in records}) == 24
    assert len({Genotype.from_dict(r["genotype"]) for r in records}) == 24
    assert all(r["status"] == "ok" for r in records) and not (tmp_path / "search" / "images.pt").exists()
    again = run(tmp_path, SEARCH, *options, "--resume")  # nothing is left to do
    assert "24 evaluations of this search" in again and len(read_lines(evaluations)) == 24
