"""Fixtures of several test files: a tiny configuration, its supernet, a detector cut from it."""

from __future__ import annotations

import fcntl
import json
import random
import time

import pytest
import torch
import yaml
from hypothesis import settings
from tiny_runs import FINAL, SEARCH, SUPERNET, run_as_user, tiny_settings

from lib import checkpoint, config_io
from lib.detector import Detector, ElasticSSD
from lib.export import export_graph

torch.set_num_threads(1)  # sums in the same order every time
settings.register_profile("patient", deadline=None)  # how long an example takes is the machine's affair
settings.load_profile("patient")


# What each of the three test processes begins with: the files that take longest, and together those that wait for one
# `flow`. The first file forks and then trains, which autograd refuses where it has started threads before.
FIRST = (
    ("test_imaginary_gpu.py", "test_distributed.py"),
    ("test_scripts.py", "test_interrupted.py", "test_search_faults.py", "test_mistakes.py", "test_faults.py"),
    ("test_export.py", "test_converters.py", "test_final_training.py", "test_pretrained.py", "test_detector.py"),
)


def pytest_collection_modifyitems(items):
    rest = [item for item in items if item.path.name not in sum(FIRST, ())]
    ordered = []
    for number, files in enumerate(FIRST, start=1):
        ordered += [item for file in files for item in items if item.path.name == file]
        fill = max(0, len(items) * number // len(FIRST) - len(ordered))  # up to the end of this process's share
        ordered += rest[:fill]
        rest = rest[fill:]
    items[:] = ordered + rest


class Clock:
    """It stands still but for the work that is said to take time."""

    now = 0.0

    def work(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    """`time.perf_counter` reads a clock that only `clock.work(seconds)` moves."""
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock


@pytest.fixture(scope="session")
def tiny_config():
    """`tiny_config(head__predictor="plain")`: the tiny configuration with some keys changed."""
    return lambda **changes: config_io.from_dict(tiny_settings(**changes))


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


@pytest.fixture(scope="session")
def tiny_trained(tiny_config, tiny_detector):
    """`tiny_trained(...)`: a finished detector as load_detector gives it, with confident and varied predictions."""

    def make(**changes: object) -> Detector:
        network = tiny_detector(**changes)
        genotype = network.space.sample(random.Random(1))
        model = network.extract(genotype)
        with torch.no_grad():
            for net in (*model.predictors.classes, *model.predictors.boxes):
                net[-1].weight.normal_(0, 0.5)
            for net in model.predictors.classes:
                net[-1].bias.normal_(-2, 0.5)
        classes, thresholds = ("cat", "dog", "eel"), (0.5, 0.4, None, 0.6)
        return Detector(model.eval(), tiny_config(**changes), genotype, classes, (1, 7, 9), 5, thresholds)

    return make


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_trained, tmp_path_factory):
    """The best.pt of a run of final_train.py that ended with `tiny_trained()`."""
    detector, path = tiny_trained(), tmp_path_factory.mktemp("trained") / "best.pt"
    identity = {
        "genotype": detector.genotype.to_dict(),
        "config": config_io.to_dict(detector.config),
        "classes": list(detector.classes),
        "category_ids": list(detector.category_ids),
        "epoch": detector.epoch,
    }
    checkpoint.save(path, {**identity, "model": detector.model.state_dict()})
    return path


@pytest.fixture(scope="session")
def tiny_graph(tiny_trained):
    """`tiny_trained()` as an ONNX graph without NMS. Do not change it: the export takes seconds and is shared."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    return export_graph(tiny_trained(), nms=False)


@pytest.fixture(scope="session")
def flow(tmp_path_factory, worker_id):
    """A folder in which the three stages ran one after the other, with no flag that a newcomer would not use."""
    # The test processes share one: whoever comes first runs the stages, the others wait for its lock.
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "flow"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        printed = folder / "printed.json"
        if not printed.exists():
            printed.write_text(json.dumps(run_stages(folder)))
        return folder, json.loads(printed.read_text())


def run_stages(folder):
    """What each of the three scripts prints."""
    settings = tiny_settings(data__root=folder / "shapes")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    commands = {SUPERNET: ["--cfg", "tiny.yaml"], SEARCH: ["--gpus", "cpu"], FINAL: ["--genotype", "best.json"]}
    printed = {}
    for script, arguments in commands.items():
        done = run_as_user(folder, script, *arguments)
        assert done.returncode == 0, done.stderr
        printed[script] = done.stdout
    return printed


@pytest.fixture
def arguments(flow, tmp_path):
    """A folder of its own on the same pictures."""
    settings = tiny_settings(data__root=flow[0] / "shapes")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings))
    return ["--cfg", "tiny.yaml", "--set", "supernet.eval_every=9"]
