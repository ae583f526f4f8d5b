"""What goes wrong in a run's folder, kind by kind in each of the three stages: one line, and every file stays.

Faults while a stage runs (signals, kill -9, a full disk, processes that hang or die, no memory) need processes of their
own: test_interrupted, test_search_faults, test_distributed.
"""

from __future__ import annotations

import itertools
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from tiny_runs import FINAL, SEARCH, SUPERNET

from lib import UserError, checkpoint

RUNS = Path("runs/tiny")
OWN = {SUPERNET: RUNS / "supernet", SEARCH: RUNS / "search", FINAL: RUNS / "final"}  # the folder that it goes on from
RECORD = {SUPERNET: "last.pt", SEARCH: "evals.jsonl", FINAL: "last.pt"}  # what it goes on with
SETTINGS = ["--set", "data.root=shapes"]
LOCK = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"


def change(path: Path, **values: object) -> None:
    payload = {key: value for key, value in checkpoint.read(path).items() if key != "format"}
    checkpoint.save(path, {**payload, **values})


def cut(script: str) -> str:
    """Not at its end, where a ledger's last line may be cut by a crash."""
    path = OWN[script] / RECORD[script]
    content = path.read_bytes()
    path.write_bytes(content[:500] + content[700:])
    return rf"{path.name}(, line 1)?: "


def of_another_program(script: str) -> str:
    (OWN[script] / RECORD[script]).write_text('{"loss": 0.5}\n')
    return rf"{RECORD[script]}(, line 1)?: "


def of_a_later_version(script: str) -> str:
    """A search reads the supernet's."""
    path = OWN[SUPERNET if script == SEARCH else script] / "last.pt"
    torch.save({**checkpoint.read(path), "format": "supernet/99"}, path)
    return r"last\.pt: "


def not_finite(script: str) -> str:
    path = OWN[SUPERNET if script == SEARCH else script] / "last.pt"
    model = checkpoint.read(path)["model"]
    name = next(name for name in model if name.endswith("weight"))
    change(path, model={**model, name: model[name] * math.nan})
    return r"last\.pt: .*finite"


def without_configuration(script: str) -> str:
    (OWN[script] / "config.yaml").write_text("")
    return r"config\.yaml: holds no settings any more; --cfg names"


def with_a_torn_configuration(script: str) -> str:
    (OWN[script] / "config.yaml").write_text("data: {root: [\n")
    return r"config\.yaml: not valid YAML"


def with_a_value_out_of_bounds(script: str) -> str:
    path = OWN[script] / "config.yaml"
    path.write_text(path.read_text().replace("nms_threshold: 0", "nms_threshold: 7"))
    return r"config\.yaml.*postprocess\.nms_threshold: expected .*found 7"


def without_the_split(script: str) -> str:
    """It was drawn when the supernet began; another one would have trained on pictures that score candidates."""
    if script == FINAL:
        pytest.skip("a final training has no split")
    (OWN[SUPERNET] / "split.json").write_text('{"train": ["no such picture"], "search": []}')
    return r"split\.json"


def with_a_damaged_annotation(script: str) -> str:
    path = next(Path("shapes/Annotations").glob("*.xml"))
    path.write_text("<annotation><object>")
    return rf"{path.name}: "


FAULTS: list[Callable[[str], str]] = [
    cut,
    of_another_program,
    of_a_later_version,
    not_finite,
    without_configuration,
    with_a_torn_configuration,
    with_a_value_out_of_bounds,
    without_the_split,
    with_a_damaged_annotation,
]


@pytest.fixture
def stages(flow, tmp_path, monkeypatch):
    for name in ("runs", "shapes"):
        shutil.copytree(flow[0] / name, tmp_path / name, ignore=shutil.ignore_patterns("*.part"))
    monkeypatch.chdir(tmp_path)


def contents() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def refuse(script: str, words: str) -> None:
    before = contents()
    with pytest.raises(UserError, match=words) as caught:
        import_module(script.removesuffix(".py")).main(["--resume", "--train-dir", str(OWN[script]), *SETTINGS])
    assert "\n" not in str(caught.value) and before == contents()


@pytest.mark.parametrize(("fault", "script"), list(itertools.product(FAULTS, OWN)))
def test_a_run_that_cannot_go_on_says_so_and_changes_nothing(stages, fault, script):
    refuse(script, fault(script))


@pytest.mark.parametrize("script", OWN)
def test_a_second_process_is_refused(stages, script):
    lock = OWN[script] / ".lock"
    holder = subprocess.Popen([sys.executable, "-c", LOCK, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()  # it has the lock
    refuse(script, rf"{OWN[script]}: in use by")
    holder.communicate(b"\n")
