"""Helpers that wait for results and watch processes."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

from lib.dispatcher import Result, WorkerPool, die_with_parent

PATIENCE = 120  # seconds until a test gives up waiting


def take(dispatcher: WorkerPool, count: int) -> list[Result]:
    """The next `count` results, in their order."""
    found: list[Result] = []
    deadline = time.monotonic() + PATIENCE
    while len(found) < count:
        assert time.monotonic() < deadline, f"only {found}"
        found += dispatcher.results(timeout=1)
    assert len(found) == count
    return found


def wait_for(condition: Callable, seconds: float = PATIENCE):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"still {value!r} after {seconds} s"
        time.sleep(0.02)
    return value


def is_alive(pid: int) -> bool:
    """Whether a process runs. One that ended and waits for its parent to collect it (a zombie) does not."""
    multiprocessing.active_children()  # collects our own
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except ProcessLookupError:
        return False
    except FileNotFoundError:  # it ended just now, or this is not Linux, where orphans are collected at once
        return not Path("/proc/self").exists()


def pids_in(folder: Path) -> list[int]:
    return [int(file.name) for file in folder.iterdir()]


def outlive(path: str) -> None:
    """What a loader process does, as far as its end is concerned."""
    die_with_parent()
    Path(path).write_text(str(os.getpid()))
    time.sleep(60)


def start_a_child(method: str, path: str) -> None:
    multiprocessing.get_context(method).Process(target=outlive, args=(path,), daemon=True).start()
    time.sleep(60)
