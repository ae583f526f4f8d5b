"""Runs that end before any work begins: plans, help, and a user's mistakes, each answered in one line."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module

import pytest
from tiny_data import write_voc
from tiny_runs import FINAL, SEARCH, SUPERNET, finish, start

from lib.errors import UserError

PLANS = {  # what each script's plan must say
    SUPERNET: [
        *("48 images, 36 train", "search space: 3.2e+06", "smallest: ", "largest: ", "priors at 64 px: 84"),
        *("epochs of 9 steps", "from epoch 1:", "from epoch 2:"),
    ],
    SEARCH: ["trained to epoch 2 of 2", "48 images, 36 train", "search space: 3.2e+06", "2 epochs of 3 evaluations"],
    FINAL: [
        "test set: 8 images",
        "genotype: image_size=64",
        "multiply-adds",
        "priors at 64 px: 84",
        "note: runs/tiny/final/last.pt exists",
    ],
}
NETWORK = (
    r"backbone\.mult_ratio: expected 0\.125 as in the supernet runs/tiny/supernet/last\.pt \(--load .*\), found 0\.25"
)
MISTAKES = {
    "an unknown key": ([SUPERNET, "--set", "supernet.epoch=3"], "supernet.epoch.*epochs"),
    "a wrong type": ([SUPERNET, "--set", "supernet.epochs=many"], "supernet.epochs.*many"),
    "a missing configuration": ([SUPERNET, "--cfg", "tini.yaml"], r"tini\.yaml.*tiny\.yaml"),
    "a missing data folder": (
        [SUPERNET, "--set", "data.dataset_type=voc", "--data", "nowhere", "--train-dir", "new"],
        "nowhere",
    ),
    "a missing data folder without a configuration": ([SEARCH, "--data", "nowhere"], "--data nowhere: no such folder"),
    "pictures of one's own without a configuration": ([SUPERNET, "--data", "bare"], r"bare: expected .*need a config"),
    "a wrong number of classes": ([SUPERNET, "--set", "data.num_classes=3"], r"data\.num_classes: 3.* 5 classes"),
    "a pretrained network that is not there": (
        [SUPERNET, "--set", "backbone.pretrained_path=efficientnet_lite", "--train-dir", "new"],
        r"backbone\.pretrained_path: efficientnet_lite: no such file.*did you mean 'efficientnet_lite0'",
    ),
    "nothing that is pretrained": ([FINAL, "--from-pretrained"], r"--from-pretrained: backbone\.pretrained_path names"),
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
    "a run that is there already": ([SUPERNET], r"last\.pt exists: --resume"),
    "no epoch of search": ([SEARCH, "--set", "search.num_epochs=0"], "search.num_epochs"),
    "a budget out of reach": ([SEARCH, "--max-flops", "1000"], r"search\.max_flops: 1000.*sub-networks have .* to "),
    "pycocotools without an evaluation": ([FINAL, "--pycocotools"], "--pycocotools: goes with --eval-only"),
    "a device that is not there": ([SEARCH, "--gpus", "7"], "--gpus 7.*0 CUDA devices"),
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
    "a plan of no training": ([FINAL, "--predict", "shapes", "--dry-run"], "--dry-run: goes with training"),
    "an unknown key of a prediction": (
        [FINAL, "--predict", "shapes/JPEGImages", "--set", "postprocess.topk=9"],
        "topk.*top_k",
    ),
    "no picture": ([FINAL, "--predict", "nothing.jpg"], r"nothing\.jpg: no picture"),
    "an empty test set": (
        [FINAL, "--set", "data.dataset_type=voc", "--data", "bare", "--set", "data.classes=[cat]", "--from-scratch"],
        "none of the 1 test images has an object",
    ),
}


# Of these a user's process is started; the others run in this one, which takes a tenth of the time.
AS_A_USER = ("an unknown key", "a budget out of reach", "a device that is not there", "no such genotype", "no picture")


@pytest.fixture(scope="module")
def prepared(flow):
    folder, _ = flow
    write_voc(folder / "bare", {"a": [("cat", 1, 1, 20, 20)]})
    write_voc(folder / "bare", {"b": []}, "test")
    (folder / "empty").mkdir()
    return folder


def command_of(name):
    arguments, _ = MISTAKES[name]
    return arguments if "--cfg" in arguments or arguments[0] != SUPERNET else [*arguments, "--cfg", "tiny.yaml"]


@pytest.fixture(scope="module")
def outcomes(prepared):
    """How short runs of users ended, two at a time; none of them may change the folder."""
    before = listing(prepared)
    commands: dict = {("dry", script): [script, "--cfg", "tiny.yaml", "--dry-run"] for script in PLANS}
    commands |= {("help", script): [script, "--help"] for script in PLANS}
    jobs = {key: (prepared, arguments) for key, arguments in commands.items()}
    jobs |= {name: (prepared, command_of(name)) for name in AS_A_USER}
    jobs["no supernet"] = (prepared / "empty", [SEARCH])
    jobs["no detector"] = (prepared / "empty", [FINAL, "--eval-only"])
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda job: finish(start(job[0], *job[1])), jobs.values())
        ended = dict(zip(jobs, found, strict=True))
    return ended, before == listing(prepared)


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


@pytest.mark.parametrize("name", AS_A_USER)
def test_a_users_mistake_is_one_line(outcomes, name):
    assert_one_line(outcomes[0][name], MISTAKES[name][1])


@pytest.mark.parametrize("name", [name for name in MISTAKES if name not in AS_A_USER])
def test_a_mistake_is_refused_in_one_line_and_changes_nothing(prepared, name, monkeypatch):
    """What `lib.runtime.run` makes of a UserError is seen above."""
    monkeypatch.chdir(prepared)
    before, (script, *arguments) = listing(prepared), command_of(name)
    with pytest.raises(UserError, match=MISTAKES[name][1]) as caught:
        import_module(script.removesuffix(".py")).main(arguments)
    assert "\n" not in str(caught.value) and before == listing(prepared)


def test_stages_without_the_one_before_say_so(outcomes):
    assert_one_line(outcomes[0]["no supernet"], r"no supernet run found: .*supernet_train\.py")
    assert_one_line(outcomes[0]["no detector"], r"no detector found: .*final_train\.py")


def assert_one_line(done, pattern):
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and re.search(pattern, lines[0]), done.stderr


def test_none_of_these_runs_changed_a_file(outcomes):
    assert outcomes[1]
