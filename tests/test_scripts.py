"""The three scripts as a user runs them: as subprocesses, in an empty folder, on a tiny set of drawn shapes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import command, environment, run_script, tiny_settings

SCRIPTS = ("supernet_train.py", "async_search.py", "final_train.py")


def write_config(folder: Path, **changes: object) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_settings(**changes)))
    return path


def succeed(script: str, *arguments: object, cwd: Path) -> str:
    done = run_script(script, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def fail(script: str, *arguments: object, cwd: Path) -> str:
    """The message of a command that a user got wrong: one line, no traceback."""
    done = run_script(script, *arguments, cwd=cwd)
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert "Traceback" not in done.stderr
    assert lines[-1].startswith("error: ")
    return lines[-1]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which all three stages ran, each with as few flags as a user needs."""
    folder = tmp_path_factory.mktemp("flow")
    succeed("supernet_train.py", "--cfg", write_config(folder), cwd=folder)
    succeed("async_search.py", "--gpus", "cpu", cwd=folder)
    succeed("final_train.py", "--genotype", "best.json", cwd=folder)
    return folder


@pytest.fixture
def workplace(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained folder that a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def test_every_stage_writes_what_it_says(trained: Path) -> None:
    runs = trained / "runs" / "tiny"
    expected = {
        "supernet": ["last.pt", "split.json", "config.yaml", "log.jsonl", "curves.png"],
        "search": ["best.json", "pareto.json", "evals.jsonl", "front.png", "config.yaml"],
        "final": ["best.pt", "last.pt", "metrics.json", "log.jsonl", "curves.png", "config.yaml"],
    }
    for stage, names in expected.items():
        assert [name for name in names if not (runs / stage / name).is_file()] == []
    best = json.loads((runs / "search" / "best.json").read_text())
    assert best["format"] == "genotype/1"
    assert {"AP", "AP50", "flops", "params"} <= best["metrics"].keys()
    assert len(best["supernet"]["sha256"]) == 64
    assert best["config"]["name"] == "tiny"
    assert not (runs / "search" / "images.pt").exists()


def test_no_image_trains_and_scores(trained: Path) -> None:
    split = json.loads((trained / "runs" / "tiny" / "supernet" / "split.json").read_text())
    assert len(split["train"]) == 18 and len(split["search"]) == 6
    assert not set(split["train"]) & set(split["search"])


def test_eval_only_reproduces_the_metrics(trained: Path) -> None:
    printed = succeed("final_train.py", "--eval-only", cwd=trained)
    metrics = json.loads((trained / "runs" / "tiny" / "final" / "metrics.json").read_text())
    for name in ("AP", "AP50", "AR100", "mAP", "mAP_11point"):
        assert f"{name:11} {metrics[name]:.6f}" in printed


def test_predict_draws_and_lists_detections(trained: Path, tmp_path: Path) -> None:
    pictures = trained / "data" / "shapes" / "JPEGImages"
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    out = tmp_path / "drawn"
    arguments = ("--predict", pictures, broken, "--out", out, "--threshold", "0.01")
    printed = succeed("final_train.py", *arguments, cwd=trained)
    assert "broken.jpg" in printed
    assert len(list(out.glob("*.jpg"))) == 32
    results = json.loads((out / "detections.json").read_text())
    assert {"image_id", "category_id", "bbox", "score"} == results[0].keys()


@pytest.mark.parametrize("script", SCRIPTS)
def test_dry_run_prints_the_plan_and_writes_nothing(script: str, workplace: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in workplace.rglob("*") if path.is_file()}
    arguments = ("--cfg", workplace / "tiny.yaml") if script == "supernet_train.py" else ()
    printed = succeed(script, *arguments, "--dry-run", "--train-dir", "elsewhere", cwd=workplace)
    assert "multiply-adds" in printed
    assert {path: path.stat().st_mtime_ns for path in workplace.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_teaches(script: str, tmp_path: Path) -> None:
    printed = succeed(script, "--help", cwd=tmp_path)
    assert f"python {script}" in printed and "--resume" in printed


def test_mistakes_are_one_line(workplace: Path) -> None:
    cfg = workplace / "tiny.yaml"
    train = ("supernet_train.py", "--cfg", cfg)
    assert "supernet.batch_sizes: unknown key" in fail(*train, "--set", "supernet.batch_sizes=3", cwd=workplace)
    assert "tiny.yaml" in fail("supernet_train.py", "--cfg", workplace / "tinny.yaml", cwd=workplace)
    voc = ("--set", "data.dataset_type=voc", "--data", "nowhere")
    assert "nowhere" in fail(*train, *voc, cwd=workplace)
    assert "data.num_classes" in fail(*train, "--set", "data.num_classes=7", cwd=workplace)
    assert "--resume" in fail(*train, cwd=workplace)
    assert "sub-networks have" in fail("async_search.py", "--max-flops", "1000", cwd=workplace)
    assert "search.num_epochs" in fail("async_search.py", "--set", "search.num_epochs=0", cwd=workplace)
    assert "bst.json" in fail("final_train.py", "--genotype", "bst.json", cwd=workplace)


def test_search_without_a_supernet_says_what_to_do(tmp_path: Path) -> None:
    assert "supernet_train.py" in fail("async_search.py", cwd=tmp_path)


def test_a_second_search_reuses_every_evaluation(workplace: Path) -> None:
    ledger = workplace / "runs" / "tiny" / "search" / "evals.jsonl"
    before = ledger.read_bytes()
    assert before.count(b"\n") == 6
    # A random search proposes the same genotypes again, whatever it was told meanwhile.
    arguments = ("async_search.py", "--gpus", "cpu", "--controller", "random")
    succeed(*arguments, cwd=workplace)
    once = ledger.read_bytes()
    assert once.startswith(before)
    succeed(*arguments, cwd=workplace)
    assert ledger.read_bytes() == once


def test_a_front_member_and_a_genotype_string_can_be_trained(workplace: Path) -> None:
    succeed("final_train.py", "--genotype", "pareto.json", "--index", "0", "--train-dir", "a", cwd=workplace)
    best = json.loads((workplace / "runs" / "tiny" / "search" / "best.json").read_text())
    cells = [f"cell_{i}={len(stage)}" for i, stage in enumerate(best["backbone"]["stages"])]
    blocks = [
        f"cell_{i}_block_{j}=({b['expand']}, {b['kernel']})"
        for i, stage in enumerate(best["backbone"]["stages"])
        for j, b in enumerate(stage)
    ]
    text = ", ".join([*cells, *blocks])
    flags = ("--cfg", workplace / "tiny.yaml", "--from-scratch", "--train-dir", "b", "--dry-run")
    assert text in succeed("final_train.py", "--genotype", text, *flags, cwd=workplace)


# --------------------------------------------------------------------------------------------------------- interrupted


def interrupt(arguments: list[str], cwd: Path, when: Callable[[], bool], number: signal.Signals) -> int:
    """Start a command, send it a signal once `when()` holds, and wait for its end; its return code."""
    process = subprocess.Popen(
        arguments, cwd=cwd, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not when():
        assert process.poll() is None, "the command ended before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(number)
    return process.wait(timeout=60)


def lines(path: Path, kind: str = "") -> int:
    return path.read_text().count(kind or "\n") if path.exists() else 0


def same(a: object, b: object) -> bool:
    """Whether two checkpoints hold the same numbers, bit by bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def weights(path: Path) -> dict:
    payload = torch.load(path, weights_only=True)
    return {name: payload[name] for name in ("model", "optimizer", "ema", "epoch", "batch", "step")}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_supernet_equals_an_uninterrupted_one(number: signal.Signals, tmp_path: Path) -> None:
    cfg = write_config(tmp_path, data__workers=1, supernet__epochs=3, supernet__ema_decay=0.9)
    succeed("supernet_train.py", "--cfg", cfg, "--train-dir", "whole", cwd=tmp_path)
    arguments = ("supernet_train.py", "--cfg", cfg, "--train-dir", "part")
    log = tmp_path / "part" / "log.jsonl"
    code = interrupt(command(*arguments), tmp_path, lambda: lines(log, '"train"') >= 1, number)
    assert code == (-9 if number == signal.SIGKILL else 0)
    assert weights(tmp_path / "part" / "last.pt")["epoch"] < 4
    succeed(*arguments, "--resume", cwd=tmp_path)
    assert same(weights(tmp_path / "whole" / "last.pt"), weights(tmp_path / "part" / "last.pt"))


def test_a_killed_final_training_equals_an_uninterrupted_one(workplace: Path) -> None:
    base = ("final_train.py", "--set", "final.epochs=3", "--set", "data.workers=1", "--set", "final.eval_every=3")
    succeed(*base, "--train-dir", "whole", cwd=workplace)
    log = workplace / "part" / "log.jsonl"
    last = workplace / "part" / "last.pt"
    killed = command(*base, "--train-dir", "part")
    assert interrupt(killed, workplace, lambda: lines(log) >= 1 and last.exists(), signal.SIGKILL) == -9
    succeed(*base, "--train-dir", "part", "--resume", cwd=workplace)
    assert same(weights(workplace / "whole" / "last.pt"), weights(last))
    assert same(*(torch.load(workplace / run / "best.pt", weights_only=True)["model"] for run in ("whole", "part")))


def test_a_killed_search_has_every_evaluation_once(workplace: Path) -> None:
    arguments = ("async_search.py", "--gpus", "cpu", "--train-dir", "part", "--set", "search.num_epochs=4")
    ledger = workplace / "part" / "evals.jsonl"
    assert interrupt(command(*arguments), workplace, lambda: lines(ledger) >= 2, signal.SIGKILL) == -9
    survived = ledger.read_text().splitlines()[:2]
    succeed(*arguments, "--resume", cwd=workplace)
    records = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert ledger.read_text().splitlines()[:2] == survived
    assert len({record["key"] for record in records}) == len(records) == 12
