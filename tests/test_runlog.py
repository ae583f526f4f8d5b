"""Logs, run folders and the process: torn lines, NaN, which run was the last, devices, seeds, signals, exit codes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lib import cli
from lib.errors import UserError
from lib.log import RunLog, finite, progress, read_log, say
from lib.runtime import StopRequest, pick_device, run, seed_everything

ROOT = Path(__file__).parent.parent


# The log


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    log = RunLog(path)
    log.write("train", 3, losses={"class": 1.5}, lr=0.1)
    (record,) = read_log(path)
    assert record.pop("time") > 1.6e9
    assert record == {"kind": "train", "step": 3, "losses": {"class": 1.5}, "lr": 0.1}
    log.close()


def test_a_second_run_appends(tmp_path):
    for step in (1, 2):
        log = RunLog(tmp_path / "log.jsonl")
        log.write("train", step)
        log.close()
    assert [r["step"] for r in read_log(tmp_path / "log.jsonl")] == [1, 2]


@pytest.mark.parametrize("cut", [1, 2, 10])
def test_a_torn_line_is_left_out_and_no_other_line_is(tmp_path, cut):
    """Neither the lines before, nor the first one that a resumed run writes after it."""
    path = tmp_path / "log.jsonl"
    log = RunLog(path)
    for step in (1, 2, 3):
        log.write("train", step)
    log.close()
    path.write_bytes(path.read_bytes()[:-cut])
    assert [r["step"] for r in read_log(path)] == ([1, 2, 3] if cut == 1 else [1, 2])
    log = RunLog(path)
    log.write("train", 4)
    log.close()
    assert [r["step"] for r in read_log(path)] == ([1, 2, 3, 4] if cut == 1 else [1, 2, 4])


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
    log.close()

    def refuse(constant: str):
        raise AssertionError(f"{constant} is not JSON")

    (record,) = (json.loads(line, parse_constant=refuse) for line in log.path.read_text().splitlines())
    assert (record["AP"], record["losses"]) == (None, [None])


def test_tensorboard_gets_every_number(tmp_path):
    seen = []

    class Board:
        def add_scalar(self, *scalar):
            seen.append(scalar)

        def close(self):
            seen.append("closed")

    log = RunLog(tmp_path / "log.jsonl")
    log._board = Board()
    log.write("eval", 7, networks={"largest": {"AP": 0.5}}, lr=0.1, name="x", flag=True)
    log.close()
    assert seen == [("eval/networks/largest/AP", 0.5, 7), ("eval/lr", 0.1, 7), "closed"]


def test_a_missing_tensorboard_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        RunLog(tmp_path / "log.jsonl", tensorboard=True)
    assert not any(tmp_path.iterdir())


def test_progress_and_lines_do_not_mix(capsys):
    assert list(progress([1, 2, 3], "epoch 1")) == [1, 2, 3]
    say("a line")
    assert capsys.readouterr().out == "a line\n"


# Run folders


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_last_run_of_each_stage(folder):
    assert cli.last_run("search") is None
    assert cli.stage_folder("bccd", "search") == Path("runs/bccd/search")
    for name in ("one", "two"):
        path = cli.stage_folder(name, "search")
        path.mkdir(parents=True)
        cli.remember("search", path)
    cli.remember("supernet", Path("runs/gone/supernet"))
    assert cli.last_run("search") == Path("runs/two/search")
    assert cli.last_run("supernet") is None  # its folder does not exist


def test_a_broken_pointer_file_is_no_run(folder):
    Path("runs").mkdir()
    cli.POINTER.write_text('{"search": ')
    assert cli.last_run("search") is None
    Path("runs/x/search").mkdir(parents=True)
    cli.remember("search", Path("runs/x/search"))
    assert cli.last_run("search") == Path("runs/x/search")


def test_supernet_checkpoint_from_file_run_or_parent(folder):
    last = Path("runs/x/supernet/last.pt")
    last.parent.mkdir(parents=True)
    last.touch()
    assert [cli.supernet_checkpoint(p) for p in (last, last.parent, last.parent.parent)] == [last] * 3
    for missing in (Path("runs"), Path("nowhere")):
        with pytest.raises(UserError, match=f"^{missing}: no supernet checkpoint here; expected last.pt"):
            cli.supernet_checkpoint(missing)


def test_a_bare_genotype_name_falls_back_to_the_last_search(folder):
    search = cli.stage_folder("x", "search")
    search.mkdir(parents=True)
    (search / "best.json").touch()
    with pytest.raises(UserError, match=r"^best.json: no such genotype file here; async_search.py writes"):
        cli.find_genotype("best.json")
    cli.remember("search", search)
    assert cli.find_genotype("best.json") == search / "best.json"
    assert cli.find_genotype(str(search / "best.json")) == search / "best.json"
    Path("best.json").touch()
    assert cli.find_genotype("best.json") == Path("best.json")


def test_a_genotype_that_is_nowhere_names_where_it_was_sought(folder):
    search = cli.stage_folder("x", "search")
    search.mkdir(parents=True)
    (search / "best.json").touch()
    (search / "other").mkdir()
    (search / "other" / "best.json").touch()
    cli.remember("search", search)
    with pytest.raises(UserError, match=f"^bst.json: no such genotype file here nor in {search}; "):
        cli.find_genotype("bst.json")
    with pytest.raises(UserError, match=r"^other/best.json: no such genotype file here; "):
        cli.find_genotype("other/best.json")


# The process


def test_devices_that_every_machine_has():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["", "gpu", "mps", "meta", "cuda:x", "cuda:", "cuda:-1", "0", "cpu\n"])
def test_a_device_that_is_none_names_the_valid_ones(name):
    with pytest.raises(UserError, match="expected auto, cpu, cuda or cuda:N"):
        pick_device(name)


@pytest.mark.parametrize(("count", "name"), [(0, "cuda"), (0, "cuda:0"), (2, "cuda:2")])
def test_a_device_that_this_machine_lacks(monkeypatch, count, name):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(UserError, match=f"--device {name}: this machine has {count} CUDA devices"):
        pick_device(name)


def test_a_device_that_is_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda:1")


@pytest.mark.parametrize("seed", [0, 7, 2**40])
def test_a_seed_fixes_every_generator(seed):
    draws = []
    for _ in range(2):
        seed_everything(seed)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]
    seed_everything(seed + 1)
    assert all(a != b for a, b in zip(draws[0], (random.random(), np.random.rand(), torch.rand(1).item()), strict=True))


def test_the_first_signal_asks_and_the_handlers_come_back():
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
    assert {n: signal.getsignal(n) for n in before} == before


LOOP = """
import time
from lib.runtime import StopRequest
with StopRequest() as stop:
    print("ready", flush=True)
    for _ in range(3000):
        time.sleep(0.01)
        if stop.requested and {leave}:
            break
print("saved", flush=True)
"""


def test_one_signal_lets_the_loop_save():
    with start(LOOP.format(leave=True)) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "saved\n")
    assert "once more to stop at once" in error


TWICE = """
import os, signal
from lib.runtime import StopRequest
with StopRequest() as stop:
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
print("saved")
"""


def test_a_batch_systems_second_sigterm_at_once_is_no_second_wish():
    with start(TWICE) as process:
        assert process.communicate(timeout=120)[0] == "saved\n" and process.returncode == 0


def test_a_log_whose_reader_is_gone_does_not_keep_the_loop_from_saving(tmp_path):
    script = LOOP.format(leave=True).replace("range(3000)", "progress(range(3000), 'work')")
    script = script.replace("        time", "        say('a line'); time").replace('print("saved", flush=True)', "SAVE")
    save = f"open({str(tmp_path / 'saved')!r}, 'w')"
    with start("from lib.runlog import progress, say" + script.replace("SAVE", save)) as process:
        process.stdout.readline()
        process.stdout.close()
        process.stderr.close()
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)
    assert (tmp_path / "saved").exists()


def test_the_second_signal_ends_it():
    with start(LOOP.format(leave=False)) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "\n"
        assert "Stopping" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=30)
    assert (process.returncode, out) == (128 + signal.SIGINT, "")


def start(script: str, **environment: str) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = {**os.environ, **environment}
    return subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=environment, text=True, **pipes)


LOST = """
import contextlib, os, signal
from lib.distributed import PeerLost
from lib.runtime import StopRequest, run

def main():
    with contextlib.ExitStack() as stack:
        if {within}:
            stack.callback(os.kill, os.getpid(), signal.SIGTERM)  # between the error and its report
            stack.enter_context(StopRequest())
        raise PeerLost("gone")

report = PeerLost.__str__
PeerLost.__str__ = lambda self: os.kill(os.getpid(), signal.SIGTERM) or report(self)
run(main)
"""


@pytest.mark.parametrize("within", [True, False])
def test_a_lost_process_is_reported_whatever_the_launcher_sends_meanwhile(within):
    several = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    with start(LOST.format(within=within), **several) as process:
        _, error = process.communicate(timeout=120)
    assert process.returncode == 1
    assert error.startswith("\nerror: a process of this job died") and error.count("\n") == 2


@pytest.mark.parametrize(
    ("error", "status", "message"), [(UserError("one line"), 2, "error: one line\n"), (KeyboardInterrupt(), 130, "")]
)
def test_a_script_ends_with_a_status_and_a_line(capsys, error, status, message):
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        run(main)
    assert caught.value.code == status
    assert capsys.readouterr().err == message


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)
