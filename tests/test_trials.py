"""Short trainings of several networks: what is done is kept, whom --compare compares, and the table it prints."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import pytest

from lib import UserError, trials
from lib.runtime import Stopped
from lib.trials import Recipe, Trials, as_markdown, contestants, shortened


@pytest.fixture(scope="module")
def supernet(tiny_detector):
    detector = tiny_detector()
    return SimpleNamespace(detector=detector, space=detector.space)


@pytest.fixture
def recipe(supernet, tiny_config, tmp_path):
    (tmp_path / "supernet.pt").write_text("weights")
    data = SimpleNamespace(fingerprint=lambda: "pictures")
    return Recipe(tiny_config(), supernet, tmp_path / "supernet.pt", data, data, "cpu")


@pytest.fixture
def networks(supernet):
    return {"found": supernet.space.smallest(), "random 1": supernet.space.largest()}


def test_trials_that_are_done_are_never_done_again(recipe, networks, tmp_path, monkeypatch):
    """A signal stops in the second network's second start; the next run does that network alone."""
    done = []

    def train(self, start, genotype, folder):
        done.append((start, genotype))
        (folder / "last.pt").parent.mkdir(parents=True, exist_ok=True)
        (folder / "last.pt").touch()
        if len(done) == 5:
            raise Stopped("everything is saved", 15)
        return {"AP": 0.1 * len(done), "AP50": 0.5}

    monkeypatch.setattr(Trials, "_try", train)
    with pytest.raises(Stopped):
        Trials(recipe, tmp_path / "trials", networks).run()
    assert (tmp_path / "trials" / "random_1" / "fine_tuned" / "last.pt").exists()  # to resume from
    again = Trials(recipe, tmp_path / "trials", networks)
    for _ in range(2):
        again.run()
    assert [genotype for _, genotype in done] == [networks["found"]] * 3 + [networks["random 1"]] * 5
    assert not list((tmp_path / "trials").rglob("last.pt"))
    first, second = again.results
    assert (first["name"], first["inherited"]["AP"], first["fine_tuned"]["AP"]) == ("found", 0.1, 0.2)
    assert (second["name"], second["genotype"]) == ("random 1", networks["random 1"].to_dict())
    assert second["flops"] == recipe.supernet.detector.cost(networks["random 1"]).flops


def test_trials_by_another_plan_are_named_and_left_alone(recipe, networks, tmp_path):
    Trials(recipe, tmp_path, networks)
    before = (tmp_path / "plan.json").read_text()
    (tmp_path / "supernet.pt").write_text("other weights")
    with pytest.raises(UserError, match=r"holds trials with another supernet; .*--train-dir"):
        Trials(recipe, tmp_path, networks)
    assert (tmp_path / "plan.json").read_text() == before and set(json.loads(before)) >= {"contestants", "data"}


def test_what_no_trial_depends_on_may_change(recipe, networks, tmp_path):
    """Also keys that the version lacked which wrote the plan."""
    Trials(recipe, tmp_path, networks)
    plan = json.loads((tmp_path / "plan.json").read_text())
    del plan["config"]["final"]["cuda_graph"]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    recipe.config.search.num_epochs, recipe.config.name = 77, "other"
    Trials(recipe, tmp_path, networks)
    recipe.config.search.bn_images += 1
    with pytest.raises(UserError, match=r"another search\.bn_images"):
        Trials(recipe, tmp_path, networks)


def test_a_network_in_the_place_of_another_is_refused_before_anything_is_written(recipe, networks, tmp_path):
    Trials(recipe, tmp_path, networks)
    content = {"name": "found", "genotype": networks["random 1"].to_dict(), "flops": 1, "params": 1}
    content |= {start: {"AP": 0.5, "AP50": 0.5} for start in trials.STARTS}
    (tmp_path / "found").mkdir()
    (tmp_path / "found" / "result.json").write_text(json.dumps(content))
    before = (tmp_path / "plan.json").read_text()
    with pytest.raises(UserError, match=r"result\.json: is of another genotype than found is now"):
        Trials(recipe, tmp_path, {"found": networks["found"]})
    assert (tmp_path / "plan.json").read_text() == before


# Whom --compare compares


@pytest.mark.parametrize("seed", [0, 1])
def test_random_contestants_cost_about_as_much_and_nobody_is_there_twice(supernet, seed):
    space = supernet.space
    flops = lambda genotype: supernet.detector.cost(genotype).flops  # noqa: E731
    found, pretrained = (space.sample(random.Random(n)) for n in (5, 6))
    chosen = contestants(supernet, found, pretrained, 3, seed)
    assert list(chosen) == ["found", "largest", "smallest", "pretrained", "random 1", "random 2", "random 3"]
    assert chosen == contestants(supernet, found, pretrained, 3, seed) and len(set(chosen.values())) == 7
    assert (chosen["largest"], chosen["smallest"]) == (space.largest(), space.smallest())
    for n in (1, 2, 3):
        assert abs(flops(chosen[f"random {n}"]) / flops(found) - 1) <= 0.1
    other = contestants(supernet, found, pretrained, 3, seed + 10)
    assert other["random 1"] != chosen["random 1"]


def test_one_in_two_roles_has_both_names(supernet, monkeypatch):
    space = supernet.space
    chosen = contestants(supernet, space.largest(), space.largest(), 2, 0)  # few random ones are as large
    assert list(chosen) == ["found and largest and pretrained", "smallest", "random 1", "random 2"]
    monkeypatch.setattr(trials, "TRIES", 10)
    with pytest.raises(UserError, match=r"--compare-random 99: only \d+ other sub-networks .* within 10%"):
        contestants(supernet, space.smallest(), None, 99, 0)


def test_the_short_recipe_keeps_its_proportions(tiny_config):
    config = tiny_config(
        final__epochs=40,
        final__lr_schedule="{type: multistep, milestones: [20, 30], warmup_steps: 100, T_0: 8}",
        final__save_every=3,
    )
    short = shortened(config, None, 100)
    schedule = short.final.lr_schedule
    assert (short.final.epochs, short.final.eval_every, short.final.save_every) == (10, 10, 0)
    assert (schedule.milestones, schedule.warmup_steps, schedule.T_0) == ([5, 8], 25, 2)
    assert shortened(config, 7, 100).final.epochs == 7 and config.final.epochs == 40
    config.final.max_steps = 20 * (100 // config.final.batch_size)
    assert shortened(config, None, 100).final.epochs == 5


ROWS = [
    {"name": name, "flops": mega * 1e6, "params": 2e6, "latency_ms": 1.5}
    | {
        start: {"AP": ap + bonus, "AP50": 2 * ap}
        for start, bonus in (("inherited", 0), ("fine_tuned", 0.1), ("scratch", -0.1))
    }
    for name, mega, ap in (("found and largest", 10, 0.3), ("random 1", 9, 0.2), ("random 2", 11, 0.25))
]


def test_the_table_and_what_the_search_gave():
    lines = as_markdown(ROWS, 6).splitlines()
    assert "| found and largest | 10.0 | 2.000 | 1.50 | 0.300 (0.600) | 0.400 (0.600) | 0.200 (0.600) |" in lines
    assert "- fine-tuned: found 0.400, random 0.325 on average (0.300 to 0.350): +0.075" in lines
    assert len([line for line in lines if line.startswith("- ")]) == 3
    assert not [line for line in as_markdown(ROWS[:1], 6).splitlines() if line.startswith("- ")]
