"""Runs that end before any work begins: plans, help, and a user's mistakes, each answered in one line."""

from __future__ import annotations

import json
import re
import shutil
from importlib import import_module

import pytest
from tiny_data import write_voc
from tiny_runs import FINAL, SEARCH, SUPERNET, run_as_user

from lib import UserError, plan

PLANS = {  # what each script's plan must say
    SUPERNET: [
        *(
            f"images{36:>27}{12:>18}{8:>18}\n",
            "search space: 3.2e+06",
            "smallest: ",
            "largest: ",
            "priors at 64 px: 84",
        ),
        *("epochs of 9 steps", "from epoch 1:", "from epoch 2:"),
    ],
    SEARCH: [
        "trained to epoch 2 of 2",
        "36 images train the supernet",
        "search space: 3.2e+06",
        *("2 epochs of 3 evaluations", "finalists: 2 are trained", "for the finalists' trainings, evaluations apart"),
    ],
    FINAL: [
        f"images{48:>27}{8:>18}\n",
        "genotype: image_size=64",
        "multiply-adds",
        "priors at 64 px: 84",
        "note: runs/tiny/final/last.pt exists",
    ],
}
NETWORK = (
    r"backbone\.mult_ratio: expected 0\.125 as in the supernet runs/tiny/supernet/last\.pt \(--load .*\), found 0\.25"
)
REVERSED = "[triangle, star, square, cross, circle]"
MISTAKES = {
    "an unknown key": ([SUPERNET, "--set", "supernet.epoch=3"], "supernet.epoch.*epochs"),
    "a wrong type": ([SUPERNET, "--set", "supernet.epochs=many"], "supernet.epochs.*many"),
    "a missing configuration": ([SUPERNET, "--cfg", "tini.yaml"], r"tini\.yaml.*tiny\.yaml"),
    "a missing data folder": (
        [SUPERNET, "--set", "data.dataset_type=voc", "--data", "nowhere", "--train-dir", "new"],
        "nowhere",
    ),
    "a data set that is named by its file": (
        [SEARCH, "--data", "tiny.yaml"],
        r"--data tiny\.yaml: is a file; expected the folder of a data set, such as \.",
    ),
    "a missing data folder without a configuration": ([SEARCH, "--data", "nowhere"], "--data nowhere: no such folder"),
    "a folder that holds no data set": ([SUPERNET, "--data", "runs"], r"runs: expected VOC .*COCO .*YOLO .*; found "),
    "a wrong number of classes": ([SUPERNET, "--set", "data.num_classes=3"], r"data\.num_classes: 3.* 5 classes"),
    "a pretrained network that is not there": (
        [SUPERNET, "--set", "backbone.pretrained_path=efficientnet_lite", "--train-dir", "new"],
        r"backbone\.pretrained_path: efficientnet_lite: expected a file.*did you mean 'efficientnet_lite0'",
    ),
    "nothing that is pretrained": (
        [FINAL, "--from-pretrained"],
        r"--from-pretrained: backbone\.pretrained_path is empty",
    ),
    "a comparison of no file": (
        [FINAL, "--compare", "--genotype", "cell_0=1"],
        "--compare: takes a genotype from a file",
    ),
    "no epoch of comparison": (
        [FINAL, "--compare", "--compare-epochs", "0"],
        "--compare-epochs 0: expected at least 1",
    ),
    "a start that is denied": (
        [FINAL, "--from-scratch", "--load", "runs/tiny/final"],
        r"--load .*final: starts from a detector; --from-scratch",
    ),
    "another network on going on": (
        [SUPERNET, "--resume", "--set", "backbone.mult_ratio=0.25"],
        r"backbone\.mult_ratio: expected 0\.125, with which .*supernet.last\.pt began, found 0\.25; --train-dir",
    ),
    "another seed on going on": ([SUPERNET, "--resume", "--seed", "7"], "seed: expected 0, with which .*found 7"),
    "another split on going on": (
        [SUPERNET, "--resume", "--set", "data.data_portion=[0.5, 0.5]"],
        r"data\.data_portion: expected \[0\.75, 0\.25\], with which .*found \[0\.5, 0\.5\]",
    ),
    "another optimizer on going on": (
        [FINAL, "--resume", "--set", "final.optimizer=adamw"],
        r"final\.optimizer: expected 'sgd', with which .*final.last\.pt began, found 'adamw'",
    ),
    "the folder of the other training": (
        [FINAL, "--resume", "--train-dir", "runs/tiny/supernet"],
        r"supernet.last\.pt: is of the other training",
    ),
    "a supernet with the classes in another order": (
        [SUPERNET, "--load", "runs/tiny/supernet", "--train-dir", "new", "--set", f"data.classes={REVERSED}"],
        r"data\.classes: expected circle, cross, .* in this order, as in .*backbone\.pretrained_path=",
    ),
    "a run that is there already": ([SUPERNET], r"last\.pt exists: --resume"),
    "no epoch of search": ([SEARCH, "--set", "search.num_epochs=0"], "search.num_epochs"),
    "a budget out of reach": (
        [SEARCH, "--max-flops", "1000"],
        r"is within the budget: flops from 0 to 1000 \(sub-networks have .* to ",
    ),
    "pycocotools without an evaluation": ([FINAL, "--pycocotools"], "--pycocotools: goes with --eval-only"),
    "a device that is not there": ([SEARCH, "--gpus", "7"], "--gpus 7: '7' is not among this machine's devices: cpu$"),
    "another network": ([SEARCH, "--set", "backbone.mult_ratio=0.25"], NETWORK),
    "no such genotype": ([FINAL, "--genotype", "bets.json"], r"bets\.json: no such genotype file here nor in runs"),
    "no such genotype by its key": (
        [FINAL, "--set", "final.genotypes=bets.json"],
        r"bets\.json: no such genotype file",
    ),
    "no such supernet to start from": (
        [FINAL, "--set", "final.supernet_state_dict=nowhere", "--train-dir", "new"],
        "nowhere: no supernet checkpoint here",
    ),
    "a start that would be written over": (
        [FINAL, "--load", "runs/tiny/final", "--train-dir", "runs/tiny/final", "--resume"],
        "runs/tiny/final: holds the detector to start from",
    ),
    "another network than the supernet's": (
        [FINAL, "--set", "backbone.mult_ratio=0.25", "--train-dir", "new"],
        NETWORK,
    ),
    "no such start": ([SEARCH, "--dry-run", "--start-from", "bets.json"], r"bets\.json: cannot be read"),
    "two things at once": (
        [FINAL, "--eval-only", "--compare"],
        "--eval-only and --compare: a command does one",
    ),
    "two starts": ([FINAL, "--from-scratch", "--from-pretrained"], "--from-pretrained contradict each other"),
    "a start of no training": ([FINAL, "--from-scratch", "--compare"], "--from-pretrained: go with training"),
    "a genotype of no training": ([FINAL, "--eval-only", "--index", "1"], "--genotype and --index: go with training"),
    "an index of a string": ([FINAL, "--genotype", "cell_0=1", "--index", "1"], "--index: goes with a file"),
    "a string without a supernet": ([FINAL, "--genotype", "cell_0=1", "--train-dir", "new"], "names no supernet"),
    "fewer than no competitors": (
        [FINAL, "--compare", "--compare-random=-1"],
        "--compare-random -1: expected 0 or more",
    ),
    "epochs of no comparison": ([FINAL, "--compare-epochs", "3"], "--compare-epochs: goes with --compare"),
    "a folder of no picture": ([FINAL, "--out", "x"], "--out: goes with --predict"),
    "finalists of a measurement": ([SEARCH, "--measure-latency", "--finalists", "2"], "--measure-latency: does not go"),
    "a final training in a search's folder": (
        [FINAL, "--train-dir", "runs/tiny/search"],
        r"search: holds a run of another kind \(evals\.jsonl\)",
    ),
    "a comparison in a training's folder": (
        [FINAL, "--compare", "--train-dir", "runs/tiny/final"],
        r"final: holds a run of another kind \(last\.pt\)",
    ),
    "a detector that is not there": (
        [FINAL, "--eval-only", "--load", "empty"],
        r"best\.pt: no such.*--load names",
    ),
    "a plan of no training": ([FINAL, "--predict", "shapes", "--dry-run"], "--dry-run: goes with training"),
    "an unknown key of a prediction": (
        [FINAL, "--predict", "shapes/JPEGImages", "--set", "postprocess.topk=9"],
        "topk.*top_k",
    ),
    "no score": (
        [FINAL, "--predict", "shapes", "--threshold", "2"],
        "--threshold: expected a number from 0 to 1, found 2",
    ),
    "tiles without pictures": ([FINAL, "--tiles", "2x2"], "--tiles: goes with --predict"),
    "no picture": ([FINAL, "--predict", "nothing.jpg"], r"nothing\.jpg: no picture"),
    "an empty test set": (
        [FINAL, "--set", "data.dataset_type=voc", "--data", "bare", "--set", "data.classes=[cat]", "--from-scratch"],
        "none of the 1 test images has an object",
    ),
}


@pytest.fixture(scope="module")
def prepared(flow, tmp_path_factory):
    """A copy of the stages' folder, which other tests write to meanwhile."""
    folder = tmp_path_factory.mktemp("prepared")
    for name in ("runs", "shapes"):
        shutil.copytree(flow[0] / name, folder / name, ignore=shutil.ignore_patterns("*.part"))
    shutil.copy(flow[0] / "tiny.yaml", folder)
    stages = {stage: f"runs/tiny/{stage}" for stage in ("supernet", "search", "final")}
    (folder / "runs/last.json").write_text(json.dumps(stages))  # another test may have searched elsewhere
    write_voc(folder / "bare", {"a": [("cat", 1, 1, 20, 20)]})
    write_voc(folder / "bare", {"b": []}, "test")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def main(monkeypatch):
    """`main(folder, script, *arguments)`: a script in this process, with a dry run that measures for no time."""
    monkeypatch.setattr(plan, "SECONDS", 0.0)

    def call(folder, script, *arguments):
        monkeypatch.chdir(folder)
        import_module(script.removesuffix(".py")).main(arguments)

    return call


def listing(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*")}


@pytest.mark.parametrize("script", PLANS)
def test_a_dry_run_prints_the_plan_and_changes_nothing(prepared, script, main, capsys):
    before = listing(prepared)
    finalists = ["--finalists", "2"] if script == SEARCH else []
    main(prepared, script, "--cfg", "tiny.yaml", "--dry-run", *finalists)
    printed = capsys.readouterr().out
    assert printed.startswith(("configuration: tiny.yaml", "recognised"))
    for words in PLANS[script]:
        assert words in printed
    assert before == listing(prepared)


@pytest.mark.parametrize("script", PLANS)
def test_help_explains_the_flags(script, main, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(tmp_path, script, "--help")
    printed = capsys.readouterr().out
    assert ended.value.code == 0 and f"python {script}" in printed
    for flag in ("--cfg", "--set", "--train-dir", "--load", "--resume", "--save-every", "--device", "--seed"):
        assert flag in printed


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_refused_in_one_line_and_changes_nothing(prepared, name, main):
    before = listing(prepared)
    (script, *arguments), words = MISTAKES[name]
    if script == SUPERNET and "--cfg" not in arguments:
        arguments += ["--cfg", "tiny.yaml"]
    with pytest.raises(UserError, match=words) as caught:
        main(prepared, script, *arguments)
    assert "\n" not in str(caught.value) and before == listing(prepared)


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        (SEARCH, [], r"no supernet run found: .*supernet_train\.py"),
        (FINAL, ["--eval-only"], r"no detector found: .*final_train\.py"),
    ],
)
def test_stages_without_the_one_before_say_so(prepared, script, arguments, words, main):
    with pytest.raises(UserError, match=words):
        main(prepared / "empty", script, *arguments)


def test_for_a_user_a_mistake_is_one_line_and_exit_status_2(prepared):
    """In a process of its own, as `python supernet_train.py` is."""
    done = run_as_user(prepared, SUPERNET, "--cfg", "tiny.yaml", "--set", "supernet.epoch=3")
    assert done.returncode == 2 and not done.stdout
    last = done.stderr.strip().splitlines()[-1]  # a library may have said something before
    assert re.match(r"error: supernet\.epoch: unknown key .*supernet\.epochs", last) and "Traceback" not in done.stderr
