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
