"""async_search.py with stand-ins for its scoring worker, in a process group of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tiny_runs import REPOSITORY, SEARCH, command, environment

STAND_IN = """
import sys
import async_search
from lib.runtime import run
from tests import search_workers
async_search.scoring_worker = getattr(search_workers, sys.argv[1])
if sys.argv[1] == "hanging":
    limit = async_search.TimeLimit(factor=0.1, floor=1.0, least=1)  # the floor, however slow the machine
    async_search.TimeLimit = lambda factor: limit
run(lambda: async_search.main(sys.argv[2:]))
"""


def launch(cwd: Path, *words: object) -> subprocess.Popen:
    """A command in a group of its own, which Ctrl-C in a terminal would reach as a whole."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env = {**environment(), "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(list(map(str, words)), cwd=cwd, env=env, start_new_session=True, **pipes)


def search(cwd: Path, options: list, worker: str = "") -> subprocess.Popen:
    """async_search.py, with one of the workers of search_workers.py if it is named."""
    return launch(cwd, *([sys.executable, "-c", STAND_IN, worker, *options] if worker else command(SEARCH, *options)))
