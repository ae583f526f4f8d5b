"""The three scripts killed or stopped in the middle, and resumed: nothing is lost, nothing is done twice."""

from __future__ import annotations

import contextlib
import json
import signal
import time

import torch
from tiny_runs import FINAL, SEARCH, SUPERNET, finish, read_lines, run, start

from lib import checkpoint
from lib.genotype import Genotype


def wait_for(process, condition, what):
    """Poll often: what is waited for lasts a fraction of a second."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, f"ended before {what}: {process.stderr.read()}"
        assert time.monotonic() < deadline, f"{what} never came"
        time.sleep(0.005)


def kill(process):
    process.kill()
    process.wait()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


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


def interrupted(folder, script, arguments, ready, stop):
    """The checkpoints of a run and of one that `stop(process)` ended once `ready(its folder)`, then resumed."""
    whole = start(folder, script, *arguments, "--train-dir", "whole")
    process = start(folder, script, *arguments, "--train-dir", "broken")
    wait_for(process, lambda: ready(folder / "broken"), "the moment to stop")
    stop(process)
    halfway = checkpoint.load(folder / "broken" / "last.pt")
    printed = run(folder, script, *arguments, "--train-dir", "broken", "--resume")
    assert "resumed broken/last.pt" in printed
    done = finish(whole)
    assert done.returncode == 0, done.stderr
    return halfway, *(checkpoint.load(folder / name / "last.pt") for name in ("broken", "whole"))


def test_a_killed_supernet_goes_on_bit_by_bit(arguments, tmp_path):
    """Killed in epoch 2 or soon after, where channels are sorted, with a moving average and AdamW's two moments."""
    more = ["supernet.epochs=4", "supernet.ema_decay=0.9", "supernet.optimizer=adamw"]
    options = [*arguments, *(part for key in more for part in ("--set", key))]
    halfway, broken, whole = interrupted(tmp_path, SUPERNET, options, lambda f: (f / "last.pt").exists(), kill)
    assert halfway["epoch"] < 5 and broken["epoch"] == 5 and broken["step"] == 4 * 18
    assert_equal_state(broken, whole)


def test_ctrl_c_within_an_epoch_goes_on_bit_by_bit(arguments, tmp_path):
    def interrupt(process):
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        done = finish(process)
        assert done.returncode == 0 and "--resume goes on" in done.stdout, done.stderr

    options = [*arguments, "--set", "supernet.epochs=3", "--set", "supernet.sampling=sandwich"]
    options += ["--set", "search_space.schedule_cfg.width_choice.boundary=[1, 3]"]  # nothing is scored before epoch 2
    first_epoch_done = lambda f: len(read_lines_so_far(f / "log.jsonl")) == 1  # noqa: E731
    halfway, broken, whole = interrupted(tmp_path, SUPERNET, options, first_epoch_done, interrupt)
    assert halfway["epoch"] == 2 and 0 < halfway["batch"] < 18
    assert_equal_state(broken, whole)


def test_a_killed_final_training_goes_on_bit_by_bit(flow, arguments, tmp_path):
    folder, _ = flow
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tiny").symlink_to(folder / "runs" / "tiny")
    options = ["--genotype", folder / "runs/tiny/search/best.json", "--set", "final.epochs=4"]
    options += ["--set", "final.distill.weight={boundary: [1, 3], value: [0, 0.5]}"]  # taught by the supernet's largest
    halfway, broken, whole = interrupted(tmp_path, FINAL, options, lambda f: (f / "last.pt").exists(), kill)
    assert halfway["epoch"] < 5 and broken["epoch"] == 5
    assert_equal_state(broken, whole)
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("broken", "whole")]
    assert all(m.pop("latency") for m in metrics) and metrics[0] == metrics[1]


def read_lines_so_far(path):
    with contextlib.suppress(FileNotFoundError):
        return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return []


def test_a_killed_search_has_every_evaluation_once(flow, tmp_path):
    folder, _ = flow
    options = ["--load", folder / "runs/tiny/supernet", "--gpus", "cpu", "--train-dir", tmp_path / "search"]
    options += ["--set", "search.num_epochs=3", "--set", "search.steps=8"]
    evaluations = tmp_path / "search" / "evals.jsonl"
    process = start(tmp_path, SEARCH, *options)
    wait_for(process, lambda: len(read_lines_so_far(evaluations)) >= 2, "two evaluations")
    kill(process)
    found = len(read_lines_so_far(evaluations))
    assert 2 <= found < 24
    printed = run(tmp_path, SEARCH, *options, "--resume")
    assert f"{found} evaluations of this search" in printed
    records = read_lines(evaluations)
    assert len(records) == len({r["key"] for r in records}) == 24
    assert len({Genotype.from_dict(r["genotype"]) for r in records}) == 24
    assert all(r["status"] == "ok" for r in records) and not (tmp_path / "search" / "images.pt").exists()
    again = run(tmp_path, SEARCH, *options, "--resume")  # nothing is left to do
    assert "24 evaluations of this search" in again and len(read_lines(evaluations)) == 24
