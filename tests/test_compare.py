"""Whom the found network meets, by which recipe, and the table that comes of it."""

from __future__ import annotations

import random

import pytest
from torchvision.io import decode_image, read_file

from lib.errors import UserError
from lib.trials import STARTS, as_markdown, contestants, plot_comparison, refuse_other_plan, shortened


@pytest.fixture(scope="module")
def field(tiny_detector):
    detector = tiny_detector()
    return detector.space, lambda genotype: detector.cost(genotype).flops


@pytest.mark.parametrize("seed", [0, 1])
def test_random_contestants_cost_about_as_much_and_nobody_is_there_twice(field, seed):
    space, flops = field
    found, pretrained = (space.sample(random.Random(n)) for n in (5, 6))
    chosen = contestants(space, flops, found, pretrained, 3, seed)
    assert list(chosen) == ["found", "largest", "smallest", "pretrained", "random 1", "random 2", "random 3"]
    assert chosen == contestants(space, flops, found, pretrained, 3, seed) and len(set(chosen.values())) == 7
    assert (chosen["largest"], chosen["smallest"]) == (space.largest(), space.smallest())
    for n in (1, 2, 3):
        assert abs(flops(chosen[f"random {n}"]) / flops(found) - 1) <= 0.1
    other = contestants(space, flops, found, pretrained, 3, seed + 10)
    assert other["random 1"] != chosen["random 1"]


def test_one_that_plays_two_parts_has_both_names(field):
    space, flops = field
    chosen = contestants(space, flops, space.largest(), space.largest(), 2, 0)  # few random ones are as large
    assert list(chosen) == ["found and largest and pretrained", "smallest", "random 1", "random 2"]
    with pytest.raises(UserError, match=r"--compare-random 2: only 0 other sub-networks .* within 10%"):
        contestants(space, lambda g: 1 + 9 * (g == space.smallest()), space.smallest(), None, 2, 0)


def test_the_short_recipe_keeps_its_proportions(tiny_config):
    config = tiny_config(
        final__epochs=40,
        final__lr_schedule="{type: multistep, milestones: [20, 30], warmup_steps: 100, T_0: 8}",
        final__distill__weight="{boundary: [1, 21], value: [0, 1]}",
        final__save_every=3,
    )
    short = shortened(config, None)
    schedule = short.final.lr_schedule
    assert (short.final.epochs, short.final.eval_every, short.final.save_every) == (10, 10, 0)
    assert (schedule.milestones, schedule.warmup_steps, schedule.T_0) == ([5, 8], 25, 2)
    assert short.final.distill.weight.boundary == [1, 6]
    assert shortened(config, 7).final.epochs == 7 and config.final.epochs == 40


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


def test_the_comparison_is_drawn(tmp_path):
    for name, rows in (("all.png", ROWS), ("one.png", ROWS[:1])):
        plot_comparison(rows, STARTS, tmp_path / name)
    first, second = (decode_image(read_file(str(tmp_path / name))) for name in ("all.png", "one.png"))
    assert first.float().std() > 1 and not first.equal(second)


def test_another_plan_is_named():
    refuse_other_plan({"a": 1, "b": 2}, {"a": 1, "b": 2}, "here")
    with pytest.raises(UserError, match=r"here: that comparison has another 'b'"):
        refuse_other_plan({"a": 1, "b": 3}, {"a": 1, "b": 2}, "here")
