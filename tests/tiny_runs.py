"""A tiny experiment, and the three scripts run on it as a user runs them."""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from unittest import mock

import pytest
import torch

from lib import config_io, dispatcher, runtime

REPOSITORY = Path(__file__).parent.parent
SUPERNET, SEARCH, FINAL = "supernet_train.py", "async_search.py", "final_train.py"

TINY = {
    "name": "tiny",
    "data": {
        "dataset_type": "shapes",
        "shapes_train": 48,
        "shapes_test": 8,
        "workers": 1,
        "data_portion": [0.75, 0.25],
    },
    "search_space": {
        "num_cell_groups": [1, 2, 2, 2, 2, 2],
        "image_size_choice": [64],
        "num_head": 1,
        "schedule_cfg": {
            "kernel_choice": {"boundary": [1], "value": [[5, 3]]},
            "width_choice": {"boundary": [1, 2], "value": [[6], [6, 3]]},
            "depth_choice": {"boundary": [1], "value": [[2, 1]]},
        },
    },
    "backbone": {"mult_ratio": 0.125},
    "head": {"channels": [128], "aspect_ratios": [[2], [2], [2]], "scales": [0.2, 0.4, 0.6, 0.9]},
    "supernet": {
        "epochs": 2,
        "batch_size": 4,
        "panel": 0,
        "eval_every": 2,
        "learning_rate": 0.01,
        "distill": {"weight": {"boundary": [1, 2], "value": [0.0, 0.5]}},
    },
    "search": {
        "num_epochs": 2,
        "steps": 3,
        "population_size": 3,
        "tournament_size": 2,
        "bn_images": 8,
        "batch_size": 4,
        "parallelism": 1,
    },
    "final": {"epochs": 2, "batch_size": 4, "learning_rate": 0.01, "eval_every": 1},
}


def tiny_settings(**changes: object) -> dict:
    """TINY with `changes`, whose keys are dotted paths with `__` for the dots."""
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]
    return config_io.with_changes(TINY, map(config_io.parse_override, overrides))


def environment() -> dict[str, str]:
    """One thread: sums in the same order every time. No GPU: the same on every machine."""
    path = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "tests")))
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}


def run_as_user(cwd: Path, script: str, *arguments: object) -> subprocess.CompletedProcess:
    """One of the three scripts from the command line: a new interpreter, which takes seconds to import torch."""
    words = [sys.executable, str(REPOSITORY / script), *map(str, arguments)]
    return subprocess.run(words, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=240)


# Most tests start their scripts from a server that has imported torch and matplotlib already: a process of its own as
# well, which can be killed and signalled like any other, and starts in a tenth of a second.
_SERVER = multiprocessing.get_context("forkserver")
_DRAWING = [f"matplotlib.{name}" for name in ("figure", "backends.backend_agg", "backends.backend_svg")]
_SERVER.set_forkserver_preload(["supernet_train", "async_search", "final_train", "tiny_runs", *_DRAWING])


class Script:
    """A script that runs in a process group of its own. What it prints goes to files."""

    def __init__(self, cwd: Path, script: str, arguments: Sequence[object], prelude: str):
        self._folder = Path(tempfile.mkdtemp())
        self.out, self.err = self._folder / "out", self._folder / "err"
        words = [str(argument) for argument in arguments]
        target = (str(cwd), script, words, prelude, str(self.out), str(self.err))
        with mock.patch.dict(os.environ, environment()):
            self._process = _SERVER.Process(target=_be_script, args=target)
            self._process.start()
        self.pid = self._process.pid

    def kill(self) -> None:
        self._process.kill()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def finish(self, timeout: float = 240) -> subprocess.CompletedProcess:
        """Wait for its end: exit status and what it printed."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, f"still running after {timeout} s"
        out, err = (path.read_text() if path.exists() else "" for path in (self.out, self.err))
        shutil.rmtree(self._folder)
        return subprocess.CompletedProcess([], self._process.exitcode, out, err)


def _be_script(cwd: str, script: str, arguments: list[str], prelude: str, out: str, err: str) -> None:
    """What the new process does. `prelude` is Python that runs first, to stand something in for a part of it."""
    os.setsid()
    os.chdir(cwd)
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    torch.set_num_threads(1)
    # Children start as they do for a user, by fork (else by a server of their own); a search's workers do too, since
    # they then have torch already.
    multiprocessing.set_start_method("fork", force=True)
    dispatcher.CONTEXT = multiprocessing.get_context("fork")
    module = import_module(script.removesuffix(".py"))
    exec(prelude, {"script": module})
    sys.argv = [script, *arguments]
    runtime.run(module.main)


def start(cwd: Path, script: str, *arguments: object, prelude: str = "") -> Script:
    """Start one of the three scripts in folder `cwd`."""
    return Script(cwd, script, arguments, prelude)


def finish(process: Script | subprocess.Popen) -> subprocess.CompletedProcess:
    """Wait for the end of a process: exit status and what it printed."""
    if isinstance(process, Script):
        return process.finish()
    out, err = process.communicate(timeout=240)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run(cwd: Path, script: str, *arguments: object, prelude: str = "") -> str:
    """Run a script to its end; what it printed. Fails where it fails."""
    done = start(cwd, script, *arguments, prelude=prelude).finish()
    assert done.returncode == 0, done.stderr
    return done.stdout


def read_lines(path: Path) -> list[dict]:
    """The records of a JSONL file, none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Killed(BaseException):
    """Stands in for a kill -9: nothing that handles errors sees it."""


@contextlib.contextmanager
def killed_at(at: int, *writers: tuple[object, str], counts: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """End in Killed before (`at` even) or right after call number `at // 2` of the `writers`, (owner, name) each.

    Calls are counted while `counts()` is true.
    """
    left = itertools.count(at // 2, -1)

    def dying(write: Callable) -> Callable:
        def call(*arguments: object, **options: object) -> None:
            now = next(left) if counts() else -1
            if now == 0 and at % 2 == 0:
                raise Killed
            write(*arguments, **options)
            if now == 0:
                raise Killed

        return call

    with contextlib.ExitStack() as patches, pytest.raises(Killed):
        for owner, name in writers:
            patches.enter_context(mock.patch.object(owner, name, dying(getattr(owner, name))))
        yield
