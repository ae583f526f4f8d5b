"""The dispatcher's processes: signals, memory, and a parent that is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from dispatch_helpers import is_alive, pids_in, take, wait_for

from lib.dispatcher import Dispatcher
from tests.dispatch_workers import setup

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def shared():
    """A worker for the tests that leave it healthy."""
    with Dispatcher(setup, (), ["cpu"]) as dispatcher:
        yield dispatcher


def test_ctrl_c_is_left_to_the_parent(shared):
    shared.submit("interrupt", ("interrupt", None))
    assert take(shared, 1)[0].value == "alive"


def test_ctrl_c_while_workers_start_is_left_to_the_parent():
    with Dispatcher(setup, (), ["cpu"]) as dispatcher:
        (process,) = [worker.process for worker in dispatcher._workers]
        os.kill(process.pid, signal.SIGINT)
        dispatcher.submit("where", ("where", None))
        assert take(dispatcher, 1)[0].value[2] == process.pid


def test_results_sent_before_death_are_taken_from_the_pipe():
    """The parent does not look until the worker, which finished one job, is dead: that job is not run again."""
    with Dispatcher(setup, (), ["cpu"], max_ahead=3) as dispatcher:
        dispatcher.submit("pid", ("where", None))
        pid = take(dispatcher, 1)[0].value[2]
        dispatcher.submit("first", ("where", None))
        dispatcher.submit("second", ("exit", 1))
        wait_for(lambda: not is_alive(pid))
        results = take(dispatcher, 2)
        assert [r.job_id for r in results] == ["first", "second"]
        assert results[0].value[2] == pid


def test_a_death_is_told_in_the_words_of_the_system():
    with Dispatcher(setup, (), ["cpu"]) as dispatcher:
        for job, payload in {"killed": ("killed", None), "left": ("exit", 9)}.items():
            dispatcher.submit(job, payload)
        errors = {r.job_id: r.error for r in take(dispatcher, 2)}
        assert "killed by SIGKILL, as the system does when memory runs out" in errors["killed"]
        assert "the worker died (exit code 9)" in errors["left"]


def test_torch_out_of_memory_fails_the_job_and_not_the_worker():
    with Dispatcher(setup, (), ["cpu"]) as dispatcher:
        dispatcher.submit("greedy", ("tensor", 1 << 50))
        dispatcher.submit("cuda", ("cuda_out_of_memory", None))
        dispatcher.submit("modest", ("tensor", 8))
        results = {r.job_id: r for r in take(dispatcher, 3)}
        assert "can't allocate memory" in results["greedy"].error and results["modest"].value == 8
        assert "OutOfMemoryError" in results["cuda"].error


PARENT = """
import multiprocessing
import sys
from lib.dispatcher import Dispatcher
from tests.dispatch_workers import setup

if __name__ == "__main__":
    dispatcher = Dispatcher(setup, (), ["cpu"] * 3)
    dispatcher.submit("hung", ("pid_then_sleep", sys.argv[1]))
    dispatcher.submit("busy", ("pid_then_compute", sys.argv[1]))
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    dispatcher.results()
"""


def test_workers_of_a_killed_parent_end_by_themselves(tmp_path):
    """One hangs, one computes, one is idle."""
    (tmp_path / "pids").mkdir()
    (tmp_path / "parent.py").write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, tmp_path / "parent.py", tmp_path / "pids"]
    parent = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: len(pids_in(tmp_path / "pids")) == 2)
        children = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(children) == 3
        assert all(map(is_alive, children))
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        wait_for(lambda: not any(map(is_alive, children)), seconds=5)
    finally:
        parent.kill()
        parent.communicate()
