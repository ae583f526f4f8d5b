"""A tiny experiment, and the three scripts run on it as a user runs them."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

from lib import config_io

REPOSITORY = Path(__file__).parent.parent
SUPERNET, SEARCH, FINAL = "supernet_train.py", "async_search.py", "final_train.py"

TINY = {
    "name": "tiny",
    "data": {"shapes_train": 48, "shapes_test": 8, "workers": 1, "data_portion": [0.75, 0.25]},
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
    return config_io.with_overrides(copy.deepcopy(TINY), overrides)


def environment() -> dict[str, str]:
    """One thread: sums in the same order every time. No GPU: the same on every machine."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def command(script: str, *arguments: object) -> list[str]:
    return [sys.executable, str(REPOSITORY / script), *map(str, arguments)]


def start(cwd: Path, script: str, *arguments: object) -> subprocess.Popen:
    """One of the three scripts as a user runs it, in folder `cwd`."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command(script, *arguments), cwd=cwd, env=environment(), **pipes)


def finish(process: subprocess.Popen) -> subprocess.CompletedProcess:
    out, err = process.communicate(timeout=240)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run(cwd: Path, script: str, *arguments: object) -> str:
    """Run a script to its end; what it printed. Fails where it fails."""
    done = finish(start(cwd, script, *arguments))
    assert done.returncode == 0, done.stderr
    return done.stdout


def read_lines(path: Path) -> list[dict]:
    """The records of a JSONL file, none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
