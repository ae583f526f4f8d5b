"""async_search.py with stand-ins for its scoring worker, in a process group of its own."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from tiny_runs import SEARCH, Script, environment, start

HANGING = """
limit = script.TimeLimit(factor=0.1, floor=1.0, least=1)  # the floor, however slow the machine
script.TimeLimit = lambda factor, **_: limit
"""


def prelude_of(worker: str) -> str:
    """Code that has one of the workers of search_workers.py score the candidates."""
    stand_in = f"from tests import search_workers; script.scoring_worker = search_workers.{worker}\n"
    return stand_in + (HANGING if worker == "hanging" else "")


def search(cwd: Path, options: list, worker: str = "") -> Script:
    """async_search.py, with one of the workers of search_workers.py if it is named."""
    return start(cwd, SEARCH, *options, prelude=prelude_of(worker) if worker else "")


def search_command(options: list, worker: str) -> str:
    """The same for a shell."""
    code = f"""
import multiprocessing, async_search as script, lib.dispatcher, lib.runtime
lib.dispatcher.CONTEXT = multiprocessing.get_context("fork")
{prelude_of(worker)}
lib.runtime.run(script.main)
"""
    return shlex.join(map(str, [sys.executable, "-c", code, *options]))


def launch(cwd: Path, *words: object) -> subprocess.Popen:
    """A command in a group of its own, which Ctrl-C in a terminal would reach as a whole."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(list(map(str, words)), cwd=cwd, env=environment(), start_new_session=True, **pipes)
