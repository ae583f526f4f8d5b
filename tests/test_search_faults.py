"""async_search.py when the disk is full, the folder read-only, the memory short, or the user impatient.

Each ends in one line and leaves a ledger that replays: the same command with --resume finishes.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from dispatch_helpers import wait_for
from search_runs import launch, search, search_command
from tiny_runs import SEARCH, Script, finish, read_lines, start

import async_search
from lib import UserError, checkpoint
from lib.ledger import Ledger
from tests.search_workers import fate


@pytest.fixture
def options(flow):
    """A search of 12 evaluations, always the same, by two workers in the folder `search`; results at its end only."""
    supernet = flow[0] / "runs/tiny/supernet"
    settings = ["search.num_epochs=3", "search.steps=4"]
    flags = ["--load", supernet, "--gpus", "cpu,cpu", "--train-dir", "search", "--save-every", "9"]
    flags += ["--controller", "random"]
    return [*flags, *(part for setting in settings for part in ("--set", setting))]


def lines_in(folder: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return (folder / "search" / "evals.jsonl").read_bytes().count(b"\n")
    return 0


def assert_one_line(stderr: str, words: str) -> None:
    last = stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and words in last and "Traceback" not in stderr, stderr


def assert_resume_finishes(cwd: Path, options: list, found: int) -> None:
    """The ledger replays, and then every evaluation is in it once."""
    with Ledger(cwd / "search" / "evals.jsonl") as ledger:
        assert len(ledger.records()) == found
    done = finish(search(cwd, [*options, "--resume"], "quick"))
    assert done.returncode == 0, done.stderr
    records = read_lines(cwd / "search" / "evals.jsonl")
    assert len(records) == len({r["key"] for r in records}) == 12
    assert (cwd / "search" / "best.json").is_file() and not (cwd / "search" / "images.pt").exists()


def test_ctrl_c_finishes_what_runs_and_saves(options, tmp_path):
    process = search(tmp_path, options, "gated")
    wait_for(lambda: lines_in(tmp_path) == 2)
    os.killpg(process.pid, signal.SIGINT)
    (tmp_path / "go").touch()
    done = finish(process)
    assert done.returncode == 130 and "Traceback" not in done.stderr, done.stderr
    assert "stopped; the same command with --resume goes on" in done.stdout
    assert (tmp_path / "search" / "best.json").is_file() and not (tmp_path / "search" / "images.pt").exists()
    assert 4 <= lines_in(tmp_path) <= 6  # each worker had one or two more
    assert_resume_finishes(tmp_path, options, lines_in(tmp_path))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_before_the_first_result_is_no_error(options, tmp_path, number):
    process = search(tmp_path, options, "slow")
    wait_for(lambda: (tmp_path / "search" / "images.pt").exists())
    os.kill(process.pid, number)
    done = finish(process)
    assert done.returncode == 143 and "with --resume goes on" in done.stdout, done.stderr


def test_ctrl_c_twice_ends_at_once_and_loses_nothing(options, tmp_path):
    process = search(tmp_path, options, "gated")
    wait_for(lambda: lines_in(tmp_path) == 2)
    os.killpg(process.pid, signal.SIGINT)
    wait_for(lambda: "Stopping after this step" in process.err.read_text())
    os.killpg(process.pid, signal.SIGINT)
    done = finish(process)
    assert done.returncode == 128 + signal.SIGINT and lines_in(tmp_path) == 2, done.stderr
    assert_resume_finishes(tmp_path, options, 2)


def test_a_file_that_may_not_grow_is_a_clear_end(options, tmp_path):
    """The kernel takes a part of a line and refuses the rest, as a disk that fills up does."""
    process = search(tmp_path, options, "gated")
    wait_for(lambda: lines_in(tmp_path) == 2)
    ledger = tmp_path / "search" / "evals.jsonl"
    size = len(ledger.read_bytes()) + 20
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))
    (tmp_path / "go").touch()
    done = finish(process)
    assert done.returncode == 2
    assert_one_line(done.stderr, "evals.jsonl: cannot write the ledger: File too large")
    assert lines_in(tmp_path) == 2 and len(ledger.read_bytes()) == size
    assert_resume_finishes(tmp_path, options, 2)


def test_a_supernet_that_is_trained_anew_meanwhile_is_refused_and_nothing_is_lost(options, flow, tmp_path):
    """The workers that are there go on with what they have loaded; one that takes the place of a dead one looks."""
    (tmp_path / "supernet").mkdir()
    for name in ("last.pt", "split.json"):
        shutil.copy(flow[0] / "runs/tiny/supernet" / name, tmp_path / "supernet")
    path = tmp_path / "supernet" / "last.pt"
    options = [*options, "--load", tmp_path / "supernet"]
    process = search(tmp_path, options, "gated")
    wait_for(lambda: lines_in(tmp_path) == 2)
    done = finish(start(tmp_path, SEARCH, *options, "--resume"))
    assert done.returncode == 2
    assert_one_line(done.stderr, f"search: in use by process {process.pid} on ")
    before = path.read_bytes()
    checkpoint.save(path, {**checkpoint.read(path), "anew": 1})
    os.kill(workers_of(process)[0], signal.SIGKILL)
    done = finish(process)
    assert done.returncode == 2
    assert_one_line(done.stderr, "last.pt: has changed since the search began")
    assert lines_in(tmp_path) == 2 and (tmp_path / "search" / "best.json").is_file()
    path.write_bytes(before)
    assert_resume_finishes(tmp_path, options, 2)


def workers_of(process: Script) -> list[int]:
    """The forked processes that score, by their number: they receive jobs in a thread beside the main one."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children]


def test_workers_that_hang_or_fail_in_their_set_up_are_replaced(options, tmp_path):
    done = finish(search(tmp_path, [*options, "--set", "search.first_time_limit=1"], "slow_to_start"))
    assert done.returncode == 0, done.stderr
    records = read_lines(tmp_path / "search" / "evals.jsonl")
    assert len(records) == 12 and {r["status"] for r in records} == {"ok"}


def test_set_ups_that_fail_end_the_search_with_the_reason(options, tmp_path):
    done = finish(search(tmp_path, options, "broken"))
    assert done.returncode == 2
    assert_one_line(done.stderr, "failed 3 times in a row before it was ready: RuntimeError: CUDA error: out of memory")
    assert not (tmp_path / "search" / "evals.jsonl").exists()  # the same command starts the search


def test_a_finished_search_is_not_mixed_with_another_one(flow, tmp_path):
    shutil.copytree(flow[0] / "runs/tiny/search", tmp_path / "search")
    before = {path.name: path.read_bytes() for path in (tmp_path / "search").iterdir()}
    command = ["--load", str(flow[0] / "runs/tiny/supernet"), "--train-dir", str(tmp_path / "search")]
    with pytest.raises(UserError, match=r"evals\.jsonl exists: --resume continues that run"):
        async_search.main([*command, "--controller", "random"])
    with pytest.raises(UserError, match=r"final: holds a run of another kind \(last\.pt\)"):
        async_search.main([*command[:2], "--train-dir", str(flow[0] / "runs/tiny/final"), "--resume"])
    for flag, value in (
        *(("--max-flops", v) for v in ("nan", "inf", "-1")),
        *(("--max-params", v) for v in ("nan", "inf", "-1")),
        *(("--max-latency", v) for v in ("nan", "-1", "5")),
        *(("--top", "-1"), ("--save-every", "0"), ("--save-every", "-3"), ("--gpus", "")),
    ):
        with pytest.raises(UserError) as caught:
            async_search.main([*command, "--resume", f"{flag}={value}"])
        assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in (tmp_path / "search").iterdir()} == before


def in_namespace(cwd: Path, script: str) -> subprocess.CompletedProcess:
    """Run a shell script that may mount things which nobody else sees; skips where that is not permitted."""
    unshare = ["unshare", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("this system lets no process mount a file system of its own")
    return finish(launch(cwd, *unshare, "sh", "-ec", script))


def test_a_full_disk_is_a_clear_end(options, tmp_path):
    """A real one of 1 MB: at first without room for the pictures, then filled up while the search runs."""
    script = f"""
        mkdir search out
        mount -t tmpfs -o size=1m tmpfs search
        head -c 900k /dev/zero > search/filler
        {search_command(options, "quick")} 2> out/pictures || echo $? >> out/status
        rm search/filler
        {search_command(options, "gated")} 2> out/ledger &
        until [ "$(cat search/evals.jsonl 2> /dev/null | wc -l)" -eq 2 ]; do sleep 0.1; done
        cat /dev/zero > search/filler 2> /dev/null || true
        touch go
        wait $! || echo $? >> out/status
        ls search > out/left
        rm search/filler
        cp -r search full
    """
    done = in_namespace(tmp_path, script)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "status").read_text().split() == ["2", "2"]
    assert_one_line(
        (tmp_path / "out" / "pictures").read_text(), "images.pt: cannot be written (No space left on device)"
    )
    reason = "evals.jsonl: cannot write the ledger: No space left on device"
    assert_one_line((tmp_path / "out" / "ledger").read_text(), reason)
    # The pictures made room for the results.
    left = {"config.yaml", "evals.jsonl", "filler", "best.json", "pareto.json", "report.html"}
    assert set((tmp_path / "out" / "left").read_text().split()) == left
    (tmp_path / "search").rmdir()  # the mount point, empty now
    (tmp_path / "full").rename(tmp_path / "search")
    found = lines_in(tmp_path)
    assert 2 <= found < 12
    assert_resume_finishes(tmp_path, options, found)


def test_a_read_only_folder_is_a_clear_end(options, tmp_path):
    """A mount that even root cannot write to."""
    script = f"""
        mkdir search
        mount --bind search search
        mount -o remount,ro,bind search
        {search_command(options, "quick")}
    """
    done = in_namespace(tmp_path, script)
    assert done.returncode == 2
    assert_one_line(done.stderr, "search: cannot be written (Read-only file system)")
    assert_resume_finishes(tmp_path, options, 0)


@contextlib.contextmanager
def no_new_files(folder: Path):
    """Files that are open can still be written, none can be added; root needs a file system with such a flag."""
    if os.geteuid():
        folder.chmod(0o555)
    elif shutil.which("chattr") is None or subprocess.run(["chattr", "+i", folder], capture_output=True).returncode:
        pytest.skip("nothing keeps root from writing to a folder here")
    try:
        yield
    finally:
        folder.chmod(0o755) if os.geteuid() else subprocess.run(["chattr", "-i", folder], check=True)


def test_a_folder_that_becomes_read_only_is_a_clear_end(options, tmp_path):
    """The ledger is open and can go on; the results cannot be written at the end."""
    process = search(tmp_path, options, "gated")
    wait_for(lambda: lines_in(tmp_path) == 2)
    with no_new_files(tmp_path / "search"):
        (tmp_path / "go").touch()
        done = finish(process)
    assert done.returncode == 2
    assert_one_line(done.stderr, "best.json: cannot be written (")
    assert_resume_finishes(tmp_path, options, 12)


@pytest.mark.parametrize("name", ["images.pt", "pareto.json"])
def test_a_file_that_cannot_be_replaced_is_named(options, tmp_path, name):
    """A folder stands in its place."""
    (tmp_path / "search" / name).mkdir(parents=True)
    done = finish(search(tmp_path, options, "quick"))
    assert done.returncode == 2
    assert_one_line(done.stderr, f"search/{name}: cannot be written (Is a directory)")
    (tmp_path / "search" / name).rmdir()
    assert_resume_finishes(tmp_path, options, lines_in(tmp_path))


def test_candidates_that_find_no_memory_are_recorded_and_the_search_goes_on(options, tmp_path):
    done = finish(search(tmp_path, options, "short_of_memory"))
    assert done.returncode == 0, done.stderr
    records = read_lines(tmp_path / "search" / "evals.jsonl")
    failed = [r["error"] for r in records if r["status"] == "failed"]
    assert len(records) == 12 and 0 < len(failed) < 12
    assert all("(attempt 3 of 3)" in error for error in failed)
    assert {"MemoryError" in error for error in failed} == {True, False}  # the others were killed
    assert all("killed by SIGKILL" in error for error in failed if "MemoryError" not in error)
    assert done.stdout.count("a candidate failed on cpu#") == len(failed)


def test_candidates_that_hang_are_stopped_and_recorded_and_the_search_goes_on(options, tmp_path):
    done = finish(search(tmp_path, options, "hanging"))
    assert done.returncode == 0, done.stderr
    records = read_lines(tmp_path / "search" / "evals.jsonl")
    failed = [r for r in records if r["status"] == "failed"]
    assert len(records) == 12 and 0 < len(failed) < 9
    assert all("no result within 1 s (attempt 3 of 3)" in r["error"] for r in failed)
    assert all(fate(r["genotype"]) == 0 for r in failed) and sum(fate(r["genotype"]) == 0 for r in records) == len(
        failed
    )
