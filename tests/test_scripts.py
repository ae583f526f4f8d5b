"""The three scripts, as a user runs them: whole, wrong, killed and resumed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from tiny_data import write_voc
from tiny_runs import REPOSITORY, environment, finish, run, start, tiny_settings
from torchvision.io import decode_image, read_file

import async_search
from lib import checkpoint, latency
from lib.genotype import Genotype
from lib.models import load_supernet

SUPERNET, SEARCH, FINAL = "supernet_train.py", "async_search.py", "final_train.py"


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    """A folder in which the three stages ran one after the other, with no flag that a newcomer would not use."""
    folder = tmp_path_factory.mktemp("flow")
    settings = tiny_settings(data__root=folder / "shapes")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    printed = {
        SUPERNET: run(folder, SUPERNET, "--cfg", "tiny.yaml"),
        SEARCH: run(folder, SEARCH, "--gpus", "cpu"),
        FINAL: run(folder, FINAL, "--genotype", "best.json"),
    }
    return folder, printed


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(process, condition, what):
    """Poll often: what is waited for lasts a fraction of a second."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, f"ended before {what}: {process.stderr.read()}"
        assert time.monotonic() < deadline, f"{what} never came"
        time.sleep(0.005)


def kill(process):
    process.kill()
    process.wait()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def assert_equal_state(a, b, path="payload"):
    """Every tensor bit by bit, every number exactly."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_equal_state(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal_state(x, y, f"{path}[{i}]")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, path


# ----------------------------------------------------------------------------------------------------- the whole flow


def test_each_stage_leaves_its_files(flow):
    folder, printed = flow
    pictures = "front.png", "report.html", "report.png"
    expected = {
        "supernet": {"last.pt", "split.json", "config.yaml", "log.jsonl", "curves.png"},
        "search": {"best.json", "pareto.json", "evals.jsonl", "config.yaml", *pictures},
        "final": {"best.pt", "last.pt", "metrics.json", "config.yaml", "log.jsonl", "curves.png"},
    }
    for stage, names in expected.items():
        assert {p.name for p in (folder / "runs" / "tiny" / stage).iterdir()} == names
        for picture in (folder / "runs" / "tiny" / stage).glob("*.png"):
            assert decode_image(read_file(str(picture))).float().std() > 1
    assert "next: python async_search.py" in printed[SUPERNET]
    assert "next: python final_train.py" in printed[SEARCH]
    assert "search epoch 3: 3 evaluations" in printed[SEARCH]  # numbered on from the supernet's two


def test_the_split_does_not_leak(flow):
    folder, _ = flow
    split = json.loads((folder / "runs/tiny/supernet/split.json").read_text())
    assert (len(split["train"]), len(split["search"])) == (36, 12)
    assert not set(split["train"]) & set(split["search"])


def test_the_genotype_file_holds_all_that_the_next_stage_needs(flow):
    folder, _ = flow
    search = folder / "runs/tiny/search"
    best, pareto = (json.loads((search / name).read_text()) for name in ("best.json", "pareto.json"))
    supernet = folder / best["supernet"]["path"]
    assert best["supernet"]["sha256"] == checkpoint.sha256(supernet)
    assert {"AP", "AP50", "mAP", "flops", "params"} <= best["metrics"].keys()
    assert best["config"] == yaml.safe_load((search / "config.yaml").read_text()) and best["config"]["name"] == "tiny"
    evaluations = read_lines(search / "evals.jsonl")
    assert len(evaluations) == len({e["key"] for e in evaluations}) == 6
    assert best["metrics"]["AP"] == max(e["metrics"]["AP"] for e in evaluations)
    genotypes = [Genotype.from_dict(e["genotype"]) for e in evaluations]
    assert Genotype.from_dict(best) in genotypes and len(set(genotypes)) == 6
    assert {e["origin"] for e in evaluations[:3]} == {"random"}  # the population of this search is three
    page = (search / "report.html").read_text()
    assert f"{best['metrics']['AP']:.4f}" in page and "expected of random search" in page
    costs = [member["metrics"]["flops"] for member in pareto["front"]]
    assert costs == sorted(costs) and pareto["front"][-1]["metrics"]["AP"] == best["metrics"]["AP"]


def test_the_logs_follow_the_schedules(flow):
    folder, printed = flow
    supernet = read_lines(folder / "runs/tiny/supernet/log.jsonl")
    losses = {r["step"]: r["losses"].keys() for r in supernet if r["kind"] == "train"}
    assert losses == {1: {"cls", "loc"}, 2: {"cls", "loc", "distill"}}  # distillation has its weight from epoch 2
    scored = {r["step"]: r["networks"] for r in supernet if r["kind"] == "eval"}
    assert list(scored) == [1, 2]  # before and after narrower ones open
    panel = scored[2]
    assert list(panel) == ["smallest", "largest"] and panel["smallest"]["flops"] < panel["largest"]["flops"]
    assert "hidden channels of 11 blocks sorted" in printed[SUPERNET]  # narrower ones open at epoch 2
    assert [r["step"] for r in read_lines(folder / "runs/tiny/final/log.jsonl") if r["kind"] == "eval"] == [1, 2]


@pytest.mark.parametrize("flags", [[], ["--pycocotools"]])
def test_eval_only_reproduces_the_metrics_to_the_digit(flow, flags):
    folder, _ = flow
    metrics = json.loads((folder / "runs/tiny/final/metrics.json").read_text())
    printed = run(folder, FINAL, "--eval-only", *flags)
    found = dict(re.findall(r"^(\w+) +(\S+)$", printed, re.MULTILINE))
    for name, text in found.items():
        assert text == ("nan" if metrics[name] is None else f"{metrics[name]:.6f}")
    assert {"AP", "AP50", "AR100", "mAP"} <= found.keys() and float(found["AR100"]) > 0
    assert "8 test images" in printed and metrics["test_images"] == 8


def test_predict_draws_pictures_and_writes_detections(flow):
    folder, _ = flow
    run(folder, FINAL, "--predict", "shapes/JPEGImages/test_0000*.jpg", "--out", "seen", "--threshold", "0")
    sources = sorted(p.name for p in (folder / "shapes" / "JPEGImages").glob("test_0000*.jpg"))
    assert sorted(p.name for p in (folder / "seen").glob("*.jpg")) == sources and len(sources) >= 7
    detections = json.loads((folder / "seen" / "detections.json").read_text())
    for name in sources:
        image, drawn = (decode_image(read_file(str(folder / d / name))) for d in ("shapes/JPEGImages", "seen"))
        assert image.shape == drawn.shape and (image.int() - drawn.int()).abs().max() > 60
        _, height, width = image.shape
        boxes = [d["bbox"] for d in detections if d["image_id"] == name.removesuffix(".jpg")]
        assert boxes and all(
            x >= 0 and y >= 0 and x + w <= width + 0.1 and y + h <= height + 0.1 for x, y, w, h in boxes
        )
    assert {d["category_id"] for d in detections} <= {1, 2, 3, 4, 5}


def test_a_pretrained_network_goes_through_all_stages(flow, arguments, tmp_path):
    """From the flow's supernet: embedded, followed in the panel, searched from, trained as the baseline."""
    source = flow[0] / "runs/tiny/supernet"
    arguments += ["--set", f"backbone.pretrained_path={source}", "--set", "supernet.epochs=1", "--resume"]
    printed = run(tmp_path, SUPERNET, *arguments)
    assert "recognised as         supernet of this project" in printed
    written = json.loads((tmp_path / "runs/tiny/supernet/pretrained_genotype.json").read_text())
    (panel,) = (r for r in read_lines(tmp_path / "runs/tiny/supernet/log.jsonl") if r["kind"] == "eval")
    assert list(panel["networks"]) == ["smallest", "pretrained", "largest"]
    assert "resumed" in run(tmp_path, SUPERNET, *arguments)  # where the source is not read again
    run(tmp_path, SEARCH, "--gpus", "cpu")
    first = read_lines(tmp_path / "runs/tiny/search/evals.jsonl")[0]["genotype"]
    assert Genotype.from_dict(first) == Genotype.from_dict(written)
    front = tmp_path / "runs/tiny/search/pareto.json"
    run(tmp_path, SEARCH, "--gpus", "cpu", "--start-from", front, "--train-dir", "again")
    members = [Genotype.from_dict(m) for m in json.loads(front.read_text())["front"]]
    evaluated = [Genotype.from_dict(r["genotype"]) for r in read_lines(tmp_path / "again/evals.jsonl")]
    assert evaluated[: len(members)] == members
    baseline = ["--genotype", tmp_path / "runs/tiny/supernet/pretrained_genotype.json", "--from-pretrained"]
    printed = run(tmp_path, FINAL, *baseline, "--set", "final.epochs=1")
    assert "pretrained weights:" in printed
    metrics = json.loads((tmp_path / "runs/tiny/final/metrics.json").read_text())
    assert Genotype.from_dict(metrics["genotype"]) == Genotype.from_dict(written)


# ------------------------------------------------------------------------------- runs that end before any work begins


PLANS = {  # what each script's plan must say
    SUPERNET: [
        *("48 images, 36 train", "search space: 3.2e+06", "smallest: ", "largest: ", "priors at 64 px: 84"),
        *("epochs of 9 steps", "from epoch 1:", "from epoch 2:"),
    ],
    SEARCH: ["trained to epoch 2 of 2", "48 images, 36 train", "search space: 3.2e+06", "2 epochs of 3 evaluations"],
    FINAL: ["test set: 8 images", "genotype: image_size=64", "multiply-adds", "priors at 64 px: 84"],
}
MISTAKES = {
    "an unknown key": ([SUPERNET, "--set", "supernet.epoch=3"], "supernet.epoch.*epochs"),
    "a wrong type": ([SUPERNET, "--set", "supernet.epochs=many"], "supernet.epochs.*many"),
    "a missing configuration": ([SUPERNET, "--cfg", "tini.yaml"], r"tini\.yaml.*tiny\.yaml"),
    "a missing data folder": (
        [SUPERNET, "--set", "data.dataset_type=voc", "--data", "nowhere", "--train-dir", "new"],
        "nowhere",
    ),
    "a wrong number of classes": ([SUPERNET, "--set", "data.num_classes=3"], r"data\.num_classes: 3.* 5 classes"),
    "a pretrained network that is not there": (
        [SUPERNET, "--set", "backbone.pretrained_path=efficientnet_lite", "--train-dir", "new"],
        r"backbone\.pretrained_path: efficientnet_lite: no such file.*did you mean 'efficientnet_lite0'",
    ),
    "nothing that is pretrained": ([FINAL, "--from-pretrained"], r"--from-pretrained: backbone\.pretrained_path names"),
    "a run that is there already": ([SUPERNET], r"last\.pt exists: --resume"),
    "no epoch of search": ([SEARCH, "--set", "search.num_epochs=0"], "search.num_epochs"),
    "a budget out of reach": ([SEARCH, "--max-flops", "1000"], r"search\.max_flops: 1000.*sub-networks have .* to "),
    "pycocotools without an evaluation": ([FINAL, "--pycocotools"], "--pycocotools: goes with --eval-only"),
    "a device that is not there": ([SEARCH, "--gpus", "7"], "--gpus 7.*0 CUDA devices"),
    "another network": ([SEARCH, "--set", "backbone.mult_ratio=0.25"], "backbone: differs from that of the supernet"),
    "no such genotype": ([FINAL, "--genotype", "bets.json"], r"bets\.json: no such genotype file here nor in runs"),
    "no picture": ([FINAL, "--predict", "nothing.jpg"], r"nothing\.jpg: no picture"),
    "an empty test set": (
        [FINAL, "--set", "data.dataset_type=voc", "--data", "bare", "--set", "data.classes=[cat]", "--from-scratch"],
        "none of the 1 test images has an object",
    ),
}


@pytest.fixture(scope="module")
def outcomes(flow):
    """How many short runs ended, two at a time; none of them may change the folder."""
    folder, _ = flow
    write_voc(folder / "bare", {"a": [("cat", 1, 1, 20, 20)]})
    write_voc(folder / "bare", {"b": []}, "test")
    (folder / "empty").mkdir()
    before = listing(folder)
    commands: dict = {("dry", script): [script, "--cfg", "tiny.yaml", "--dry-run"] for script in PLANS}
    commands |= {("help", script): [script, "--help"] for script in PLANS}
    for name, (arguments, _) in MISTAKES.items():
        given = [] if "--cfg" in arguments or arguments[0] != SUPERNET else ["--cfg", "tiny.yaml"]
        commands[name] = [*arguments, *given]
    jobs = {key: (folder, arguments) for key, arguments in commands.items()}
    jobs["no supernet"] = (folder / "empty", [SEARCH])
    jobs["no detector"] = (folder / "empty", [FINAL, "--eval-only"])
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda job: finish(start(job[0], *job[1])), jobs.values())
        ended = dict(zip(jobs, found, strict=True))
    return ended, before == listing(folder)


def listing(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*")}


@pytest.mark.parametrize("script", PLANS)
def test_a_dry_run_prints_the_plan(outcomes, script):
    done = outcomes[0]["dry", script]
    assert done.returncode == 0, done.stderr
    for words in PLANS[script]:
        assert words in done.stdout


@pytest.mark.parametrize("script", PLANS)
def test_help_explains_the_flags(outcomes, script):
    done = outcomes[0]["help", script]
    assert done.returncode == 0 and f"python {script}" in done.stdout
    for flag in ("--cfg", "--set", "--train-dir", "--load", "--resume", "--save-every", "--device", "--seed"):
        assert flag in done.stdout


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(outcomes, name):
    assert_one_line(outcomes[0][name], MISTAKES[name][1])


def test_stages_without_the_one_before_say_so(outcomes):
    assert_one_line(outcomes[0]["no supernet"], r"no supernet run found: .*supernet_train\.py")
    assert_one_line(outcomes[0]["no detector"], r"no detector found: .*final_train\.py")


def assert_one_line(done, pattern):
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and re.search(pattern, lines[0]), done.stderr


def test_none_of_these_runs_changed_a_file(outcomes):
    assert outcomes[1]


# ------------------------------------------------------------------------------------------------- killed and resumed


def interrupted(folder, script, arguments, ready, stop):
    """The checkpoints of a run and of one that `stop(process)` ended once `ready(its folder)`, then resumed."""
    whole = start(folder, script, *arguments, "--train-dir", "whole")
    process = start(folder, script, *arguments, "--train-dir", "broken")
    wait_for(process, lambda: ready(folder / "broken"), "the moment to stop")
    stop(process)
    halfway = checkpoint.load(folder / "broken" / "last.pt")
    printed = run(folder, script, *arguments, "--train-dir", "broken", "--resume")
    assert "resumed broken/last.pt" in printed
    done = finish(whole)
    assert done.returncode == 0, done.stderr
    return halfway, *(checkpoint.load(folder / name / "last.pt") for name in ("broken", "whole"))


@pytest.fixture
def arguments(flow, tmp_path):
    """A folder of its own on the same pictures."""
    settings = tiny_settings(data__root=flow[0] / "shapes")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings))
    return ["--cfg", "tiny.yaml", "--set", "supernet.batch_size=2", "--set", "supernet.eval_every=9"]


def test_a_killed_supernet_goes_on_bit_by_bit(arguments, tmp_path):
    """Killed in epoch 2 or soon after, where channels are sorted, with a moving average and AdamW's two moments."""
    more = ["supernet.epochs=4", "supernet.ema_decay=0.9", "supernet.optimizer=adamw"]
    options = [*arguments, *(part for key in more for part in ("--set", key))]
    halfway, broken, whole = interrupted(tmp_path, SUPERNET, options, lambda f: (f / "last.pt").exists(), kill)
    assert halfway["epoch"] < 5 and broken["epoch"] == 5 and broken["step"] == 4 * 18
    assert_equal_state(broken, whole)


def test_ctrl_c_within_an_epoch_goes_on_bit_by_bit(arguments, tmp_path):
    def interrupt(process):
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        done = finish(process)
        assert done.returncode == 0 and "--resume goes on" in done.stdout, done.stderr

    options = [*arguments, "--set", "supernet.epochs=3", "--set", "supernet.sampling=sandwich"]
    options += ["--set", "search_space.schedule_cfg.width_choice.boundary=[1, 3]"]  # nothing is scored before epoch 2
    first_epoch_done = lambda f: len(read_lines_so_far(f / "log.jsonl")) == 1  # noqa: E731
    halfway, broken, whole = interrupted(tmp_path, SUPERNET, options, first_epoch_done, interrupt)
    assert halfway["epoch"] == 2 and 0 < halfway["batch"] < 18
    assert_equal_state(broken, whole)


def test_a_killed_final_training_goes_on_bit_by_bit(flow, arguments, tmp_path):
    folder, _ = flow
    (tmp_path / "runs").symlink_to(folder / "runs")
    options = ["--genotype", folder / "runs/tiny/search/best.json", "--set", "final.epochs=4"]
    halfway, broken, whole = interrupted(tmp_path, FINAL, options, lambda f: (f / "last.pt").exists(), kill)
    assert halfway["epoch"] < 5 and broken["epoch"] == 5
    assert_equal_state(broken, whole)
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("broken", "whole")]
    assert metrics[0] == metrics[1]


def read_lines_so_far(path):
    with contextlib.suppress(FileNotFoundError):
        return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return []


def test_a_killed_search_has_every_evaluation_once(flow, tmp_path):
    folder, _ = flow
    options = ["--load", folder / "runs/tiny/supernet", "--gpus", "cpu", "--train-dir", tmp_path / "search"]
    options += ["--set", "search.num_epochs=3", "--set", "search.steps=8"]
    evaluations = tmp_path / "search" / "evals.jsonl"
    process = start(tmp_path, SEARCH, *options)
    wait_for(process, lambda: len(read_lines_so_far(evaluations)) >= 2, "two evaluations")
    kill(process)
    found = len(read_lines_so_far(evaluations))
    assert 2 <= found < 24
    printed = run(tmp_path, SEARCH, *options, "--resume")
    assert f"{found} evaluations of this search" in printed
    records = read_lines(evaluations)
    assert len(records) == len({r["key"] for r in records}) == 24
    assert len({Genotype.from_dict(r["genotype"]) for r in records}) == 24
    assert all(r["status"] == "ok" for r in records) and not (tmp_path / "search" / "images.pt").exists()
    again = run(tmp_path, SEARCH, *options, "--resume")  # nothing is left to do
    assert "24 evaluations of this search" in again and len(read_lines(evaluations)) == 24


def test_a_second_search_pays_for_nothing_twice(flow, tmp_path):
    folder, _ = flow
    options = ["--load", folder / "runs/tiny/supernet", "--gpus", "cpu", "--train-dir", tmp_path / "search"]
    evaluations = tmp_path / "search" / "evals.jsonl"
    run(tmp_path, SEARCH, *options, "--controller", "random")
    first, best = read_lines(evaluations), (tmp_path / "search" / "best.json").read_text()
    (tmp_path / "search" / "best.json").unlink()
    run(tmp_path, SEARCH, *options, "--controller", "random")
    assert read_lines(evaluations) == first and len(first) == 6
    assert (tmp_path / "search" / "best.json").read_text() == best
    run(tmp_path, SEARCH, *options, "--controller", "pareto-evo")  # starts from the same random ones
    records = read_lines(evaluations)
    assert records[:6] == first and len(records) < 12
    assert len({r["key"] for r in records}) == len(records)
    page = (tmp_path / "search" / "report.html").read_text()  # the random search is the control of the other
    assert "from the 6 random ones" in page and "--controller random" not in page


def test_a_search_knows_latency_by_its_table(flow, tmp_path, monkeypatch, capsys):
    """Measured once; told with evaluations that are known already, and nothing over the budget is proposed."""
    folder, _ = flow
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(latency, "ROUNDS", 1)
    options = ["--load", str(folder / "runs/tiny/supernet"), "--train-dir", "search"]
    async_search.main([*options, "--measure-latency", "cpu"])
    table = json.loads((tmp_path / "search/latency_cpu.json").read_text())
    assert f"--latency-table {Path('search/latency_cpu.json')} --max-latency " in capsys.readouterr().out
    assert table["format"] == "latency/1" and table["held_out"] == 40 and os.listdir("search") == ["latency_cpu.json"]  # noqa: PTH208
    detector = load_supernet(folder / "runs/tiny/supernet/last.pt").detector

    def milliseconds(data):
        counts = latency.features(detector, Genotype.from_dict(data))
        return sum(table["ms"][name] * count for name, count in counts.items())

    shutil.copy(folder / "runs/tiny/search/evals.jsonl", "search")
    known = read_lines(tmp_path / "search/evals.jsonl")
    options += ["--gpus", "cpu", "--latency-table", "search/latency_cpu.json"]
    assert " ms" in run(tmp_path, SEARCH, *options)
    reused = read_lines(tmp_path / "search/evals.jsonl")
    assert reused[: len(known)] == known and len(reused) < 2 * len(known)  # latency is no reason to evaluate anew
    best = json.loads((tmp_path / "search/best.json").read_text())
    assert best["metrics"]["latency_ms"] == pytest.approx(milliseconds(best), abs=1e-3)
    limit = sorted(milliseconds(record["genotype"]) for record in known)[2]
    options += ["--controller", "pareto-evo", "--set", "search.costs=[latency_ms]", "--max-latency", str(limit)]
    run(tmp_path, SEARCH, *options)
    records = read_lines(tmp_path / "search/evals.jsonl")
    assert records[: len(reused)] == reused and len(records) > len(reused)
    assert all(milliseconds(record["genotype"]) <= limit + 1e-3 for record in records[len(reused) :])
    front = json.loads((tmp_path / "search/pareto.json").read_text())
    times = [member["metrics"]["latency_ms"] for member in front["front"]]
    assert front["costs"] == ["latency_ms"] and times == sorted(times) and times[-1] <= limit + 1e-3


def test_importing_the_scripts_runs_nothing(tmp_path):
    code = "import supernet_train, async_search, final_train; print('fine')"
    environ = {**environment(), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environ, capture_output=True, text=True, check=True
    )
    assert done.stdout == "fine\n" and not os.listdir(tmp_path)  # noqa: PTH208
