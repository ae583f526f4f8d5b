"""What several test files share: a tiny configuration, its detector, and the scripts as a user runs them."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lib import config
from lib.detector import ElasticSSD

REPOSITORY = Path(__file__).parent.parent

TINY = {
    "name": "tiny",
    "data": {"shapes_train": 24, "shapes_test": 8, "workers": 0, "data_portion": [0.75, 0.25]},
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
    "supernet": {"epochs": 2, "batch_size": 4, "panel": 0, "eval_every": 2, "learning_rate": 0.01},
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
    return config.with_overrides(copy.deepcopy(TINY), overrides)


@pytest.fixture(scope="session")
def tiny_config():
    """`tiny_config(head__predictor="plain")`: the tiny configuration with some keys changed."""
    return lambda **changes: config.from_dict(tiny_settings(**changes))


@pytest.fixture(scope="session")
def tiny_detector(tiny_config):
    """`tiny_detector(...)`: a detector whose every weight and statistic is random, so that none can be mistaken."""

    def make(num_classes: int = 3, **changes: object) -> ElasticSSD:
        torch.manual_seed(0)
        detector = ElasticSSD(tiny_config(**changes), num_classes).eval()
        with torch.no_grad():
            for parameter in detector.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
            for name, buffer in detector.named_buffers():
                if name.endswith("running_mean"):
                    buffer.normal_(0, 0.1)
                elif name.endswith("running_var"):
                    buffer.uniform_(0.5, 1.5)
        return detector

    return make


def environment() -> dict[str, str]:
    """One thread: sums in the same order every time."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MPLCONFIGDIR": str(_MPL)}


_MPL = REPOSITORY / ".pytest_cache" / "matplotlib"


def command(script: str, *arguments: object) -> list[str]:
    return [sys.executable, str(REPOSITORY / script), *map(str, arguments)]


def run_script(script: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    """One of the three scripts as a user runs it."""
    return subprocess.run(
        command(script, *arguments), cwd=cwd, env=environment(), capture_output=True, text=True, timeout=240
    )
