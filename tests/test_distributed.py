"""Several processes train as one does: gradients, BatchNorm, evaluation, and the scripts under torchrun."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import distributed_workers as workers
import imaginary_gpu
import pytest
import torch
import yaml
from test_imaginary_gpu import on_imaginary_gpu
from tiny_runs import FINAL, REPOSITORY, SUPERNET, environment, finish, tiny_settings
from torch import nn

from lib import UserError, checkpoint, distributed
from lib.config import Config, TrainConfig
from lib.config_io import validate_shares
from lib.detector import ElasticSSD
from lib.runtime import pick_device


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("several")


@pytest.fixture(scope="module")
def ranks(folder):
    """What two processes found, by rank."""
    job = workers.Job(folder, lambda rank: workers.be_one_of_several(rank, folder))
    assert job.wait() == [0, 0], job.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(workers.PROCESSES)]


# Exchanges


def test_one_process_gets_back_what_it_gave():
    assert distributed.world() == distributed.World(0, 1, 0) and distributed.world().main
    assert distributed.mean_of({"a": 1.5}) == {"a": 1.5} and distributed.from_main("x") == "x"
    assert distributed.collect(distributed.deal([1, 2, 3])) == [1, 2, 3]
    assert [distributed.any_of(flag) for flag in (False, True)] == [False, True]
    assert distributed.normalizer(torch.tensor([5, 0])).tolist() == [5, 1]
    assert distributed.stack(torch.ones(2)).tolist() == [[1, 1]] and distributed.first_to_report()


def test_the_processes_exchange(ranks):
    first, second = (rank["messages"] for rank in ranks)
    for gradient, same in zip(first["gradients"], second["gradients"], strict=True):
        if gradient is None:
            assert same is None
            continue
        assert torch.equal(gradient.flatten(), torch.arange(1.0, gradient.numel() + 1) * 2)  # the mean of 1 and 3
        assert torch.equal(gradient, same)
    assert [g is None for g in first["gradients"]] == [False] * 4 + [True] * 2
    assert first["copied"] == second["copied"] == [[n] for n in range(6)]
    assert (first["dealt"], second["dealt"]) == ("ace", "bd")
    assert (first["collected"], second["collected"]) == (["aa", "bb", "cc", "dd", "ee"], [])
    assert (first["few"], second["few"]) == (["alone"], [])
    assert first["told"] == second["told"] == {"rank": 0}
    assert first["mean"] == second["mean"] == {"a": 1.5, "b": 2.0}
    assert first["any"] == second["any"] == [False, True, True]
    assert first["normalizers"] == second["normalizers"] == [1.5, 0.5]
    assert [rank["reports"] for rank in ranks].count(True) == 1


def test_all_sort_channels_as_the_main_process_does(ranks):
    assert [rank["messages"]["sorted"] for rank in ranks] == [[*range(15, -1, -1)]] * 2


def test_gradients_travel_in_buckets_and_the_host_waits_for_none(monkeypatch):
    """On an imaginary GPU: three of five numbers fit a bucket, and an unused parameter stays without a gradient."""
    for name, value in {"RANK": 0, "WORLD_SIZE": 4, "LOCAL_RANK": 0}.items():
        monkeypatch.setenv(name, str(value))
    sent = []
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda flat: sent.append(flat.numel()))
    monkeypatch.setattr(distributed, "BUCKET", 500)

    def work() -> tuple:
        parameters = [nn.Parameter(torch.zeros(10, 10, device="cuda:0")) for _ in range(12)]
        for number, parameter in enumerate(parameters[:-1]):
            parameter.grad = torch.full_like(parameter, number)
        imaginary_gpu.counts.clear()
        distributed.average_gradients(parameters)
        waits = imaginary_gpu.counts.totals()[1:]
        return waits, sent, [p.grad is None or p.grad.sum().item() for p in parameters]

    waits_and_copies, sizes, found = on_imaginary_gpu(work)
    assert waits_and_copies == (0, 0) and sizes == [400, 500, 200]
    assert found == [25.0 * number for number in range(11)] + [True]


def test_all_stop_after_the_same_step(ranks):
    for rank in ranks:
        assert rank["stops"] == [False, False, False, True, True, True]


def test_a_lost_process_is_told_in_one_line(ranks, folder):
    for name in ("forward", "backward"):
        words = r"a process of this job died or no longer answers \([^\n]{5,100}\); .* --resume"
        assert re.fullmatch(words, (folder / name).read_text())


# Batchnorm


def test_synchronised_norms_are_those_of_the_whole_batch(ranks):
    """Against torch's own layers; the first one runs with four of its six channels."""
    found = [rank["norms"] for rank in ranks]
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(6, 4, 5, 5, generator=generator) * 3 + mean for mean in (50.0, 0.0))
    first, second = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    for number, parameter in enumerate((*first.parameters(), *second.parameters())):
        parameter.data += 0.1 * torch.arange(4) * (number + 1)
    y = second(first(x.requires_grad_()).relu())
    (y.square() * weight).mean().backward()
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(torch.cat([f["y"] for f in found]), y.detach(), **close)
    torch.testing.assert_close(torch.cat([f["x"] for f in found]) / 2, x.grad, **close)  # each has the mean of its half
    for f in found:
        gradients = f["gradients"]
        expected = [p.grad for p in (*first.parameters(), *second.parameters())]
        for gradient, theirs in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient[:4], theirs, **close)
            assert not gradient[4:].any()
        for name, norm in (("0", first), ("1.0", second)):
            torch.testing.assert_close(f["net"][f"{name}.running_mean"][:4], norm.running_mean, **close)
            torch.testing.assert_close(f["net"][f"{name}.running_var"][:4], norm.running_var, **close)
        assert f["net"]["0.running_mean"][4:].tolist() == [0, 0] and f["net"]["0.running_var"][4:].tolist() == [1, 1]


def test_a_copy_is_the_layer_that_was_replaced_and_normalises_its_own_share(ranks):
    for local in (rank["norms"]["local"] for rank in ranks):
        torch.testing.assert_close(local.mean((0, 2, 3)), 0.4 * torch.arange(4.0), rtol=0, atol=1e-3)


# Training


@pytest.mark.parametrize("case", [case for case in workers.CASES if "local" not in case])
def test_steps_are_those_of_one_process(ranks, folder, case):
    """The same weights, averages, statistics and losses from the same batches, each process with half of them."""
    alone, found = workers.train(folder, case), [rank["trained"][case] for rank in ranks]
    assert alone["images"] == 8 and alone["moved"] > 4e-3 and len(alone["losses"]) == workers.STEPS
    for rank in found:
        assert rank["images"] == 4
        for losses, theirs in zip(rank["losses"], alone["losses"], strict=True):
            assert losses == pytest.approx(theirs, rel=1e-3)
        for state in ("model", "ema"):
            compare(rank[state], alone[state], atol=1e-5)
            compare(rank[state], found[0][state], atol=0)


def compare(state, other, atol):
    assert state.keys() == other.keys()
    for name in state:
        if not name.endswith("num_batches_tracked"):  # nothing reads it
            torch.testing.assert_close(state[name], other[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def test_without_synchronisation_the_weights_are_still_the_same_in_all(ranks):
    first, second = (rank["trained"]["supernet local"]["model"] for rank in ranks)
    whole = ranks[0]["trained"]["supernet synchronised"]["model"]
    differ = {name for name in first if not torch.equal(first[name], second[name])}
    assert differ and all(name.endswith(("running_mean", "running_var")) for name in differ)
    assert max((first[name] - whole[name]).abs().max() for name in first if name.endswith("weight")) > 1e-4


# Evaluation


def test_a_shared_evaluation_is_that_of_one_process_to_the_digit(ranks, folder):
    alone = workers.evaluate(folder)
    assert alone["AR100"] > 0 and "per_class" in alone
    for rank in ranks:
        assert repr(rank["metrics"]) == repr(alone)


def test_a_shared_panel_is_that_of_one_process_to_the_digit(ranks, folder):
    alone = workers.score_panel(folder, "panel alone")
    assert ranks[0]["panel"] == alone and list(alone[0]) == ["smallest", "random 1", "largest"]
    assert ranks[1]["panel"] == [] and not (folder / "panel of 1").exists()


# Configuration


def test_a_batch_that_cannot_be_shared_is_refused():
    validate_shares(Config(final=TrainConfig(batch_size=6)), "final", 3)
    validate_shares(Config(final=TrainConfig(batch_size=3, sync_batch_norm=True)), "final", 3)
    with pytest.raises(UserError, match=r"final\.batch_size: expected a multiple of the 4 processes, found 6"):
        validate_shares(Config(final=TrainConfig(batch_size=6)), "final", 4)
    with pytest.raises(UserError, match=r"at least 2 images for each of the 3 processes, or final\.sync_batch_norm"):
        validate_shares(Config(final=TrainConfig(batch_size=3)), "final", 3)


def test_each_process_has_its_own_gpu(monkeypatch):
    for name, value in {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1}.items():
        monkeypatch.setenv(name, str(value))
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert distributed.world() == distributed.World(5, 8, 1) and pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert not current and pick_device("auto") == pick_device("cuda") == torch.device("cuda:1")
    for name in ("cuda:0", "0", "0,1", "gpu"):
        with pytest.raises(UserError, match=f"--device {name}: .* a GPU of its own"):
            pick_device(name)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match=r"--device cuda:2: 'cuda:2' is not among .*: cpu, cuda:0, cuda:1"):
        pick_device("auto")
    assert current == ["cuda:1"] * 2


# The scripts


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with the outcome of an undisturbed training of the supernet in two processes."""
    folder = tmp_path_factory.mktemp("scripts")
    sizes = {"data__shapes_train": 24, "data__shapes_test": 4, "supernet__epochs": 3}
    settings = tiny_settings(data__root=folder / "shapes", supernet__sync_batch_norm=True, **sizes)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    job = workers.run_script(folder, SUPERNET, "--cfg", "tiny.yaml", "--train-dir", "whole")
    assert job.wait() == [0, 0], job.stderr
    return folder, job


def last(folder: Path) -> dict:
    return checkpoint.read(folder / "last.pt")


def assert_same_end(state: dict, other: dict) -> None:
    assert [state[key] for key in ("epoch", "batch", "step")] == [other[key] for key in ("epoch", "batch", "step")]
    for name, tensor in state["model"].items():
        assert torch.equal(tensor, other["model"][name]), name


def assert_told_once(stderr: str) -> None:
    lines = re.findall(r"^error: .*$", stderr, re.MULTILINE)
    assert len(lines) == 1 and "a process of this job died" in lines[0], stderr
    assert not re.search(r"supernet_train.py\", line|final_train.py\", line", stderr)  # no traceback of ours


def test_only_the_main_process_prints_and_writes(whole):
    folder, job = whole
    for words in ("in batches", "4 images a step", "writes to: whole", "epoch 3: AP on", "next: python"):
        assert job.stdout.count(words) == (words != "in batches"), job.stdout
    assert "Error" not in job.stderr and last(folder / "whole")["epoch"] == 4
    assert {p.name for p in (folder / "whole").iterdir()} == {
        *("last.pt", "last_good.pt", "split.json", "config.yaml", "log.jsonl", "curves.png")
    }
    records = [json.loads(line) for line in (folder / "whole" / "log.jsonl").read_text().splitlines()]
    assert [(r["kind"], r["step"]) for r in records] == [(kind, n) for n in (1, 2, 3) for kind in ("train", "eval")]


def test_torchrun_restarts_a_killed_process_and_the_run_ends_as_if_nothing_had_happened(whole):
    folder, _ = whole
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    command = [*launcher, str(REPOSITORY / SUPERNET), "--cfg", "tiny.yaml", "--train-dir", "restarted", "--resume"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    job = subprocess.Popen(command, cwd=folder, env=environment(), **pipes)
    wait_for(folder / "restarted" / "last.pt", job)
    os.kill(process_of(job, 1), signal.SIGKILL)
    done = finish(job)
    assert done.returncode == 0 and "resumed restarted/last.pt" in done.stdout, done.stderr
    assert_told_once(done.stderr)
    assert_same_end(last(folder / "restarted"), last(folder / "whole"))


def process_of(launcher: subprocess.Popen, rank: int) -> int:
    """The process that torchrun started as `rank`."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    if not children.exists():
        pytest.skip("needs Linux's list of child processes")
    for pid in children.read_text().split():
        with contextlib.suppress(OSError):
            if f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text():
                return int(pid)
    raise AssertionError(f"no process of rank {rank}")


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_sigterm_stops_after_a_step_and_the_run_goes_on_as_if_nothing_had_happened(whole):
    """One process can go on as well; over tens of steps in float32 it need not end at the very same weights."""
    folder, _ = whole
    arguments = ["--cfg", "tiny.yaml", "--train-dir", "stopped", "--resume"]
    job = workers.run_script(folder, SUPERNET, *arguments, interrupt=(1, signal.SIGTERM))
    assert job.wait() == [143, 143] and "--resume goes on" in job.stdout, job.stderr
    assert "DataLoader worker" not in job.stderr
    halfway = last(folder / "stopped")
    assert (halfway["epoch"], halfway["batch"]) == (2, 3)
    shutil.copytree(folder / "stopped", folder / "alone")
    resumed = workers.run_script(folder, SUPERNET, *arguments)
    assert resumed.wait() == [0, 0], resumed.stderr
    assert_same_end(last(folder / "stopped"), last(folder / "whole"))
    arguments[3] = "alone"
    alone = workers.run_script(folder, SUPERNET, *arguments, size=1)
    assert alone.wait() == [0] and last(folder / "alone")["step"] == last(folder / "whole")["step"]


def test_the_detector_is_trained_killed_resumed_and_evaluated(whole):
    """The main process is killed, the other one has to notice; --eval-only finds the same metrics alone."""
    folder, _ = whole
    genotype = ElasticSSD(workers.settings(folder), 5).space.smallest()
    (folder / "best.json").write_text(json.dumps(genotype.to_dict()))
    arguments = ["--cfg", "tiny.yaml", "--genotype", "best.json", "--from-scratch", "--train-dir", "final", "--resume"]
    job = workers.run_script(folder, FINAL, *arguments, interrupt=(0, signal.SIGKILL))
    assert job.wait() == [-signal.SIGKILL, 1], job.stderr
    assert_told_once(job.stderr)
    job = workers.run_script(folder, FINAL, *arguments)
    assert job.wait() == [0, 0] and "resumed final/last.pt" in job.stdout, job.stderr
    metrics = json.loads((folder / "final" / "metrics.json").read_text())
    alone = workers.run_script(folder, FINAL, "--eval-only", "--load", "final", size=1)
    assert alone.wait() == [0], alone.stderr
    assert f"AP50        {metrics['AP50']:.6f}" in alone.stdout and metrics["test_images"] == 4


def test_mistakes_are_told_once(whole):
    folder, _ = whole
    options = ["--cfg", "tiny.yaml", "--set", "supernet.batch_size=5", "--dry-run"]
    job = workers.run_script(folder, SUPERNET, *options)
    assert job.wait() == [2, 2]
    assert job.stderr == "error: supernet.batch_size: expected a multiple of the 2 processes, found 5\n"
