"""The progressive schedule: what is open at each epoch, the space that this spans, and the panel that is scored."""

from __future__ import annotations

import random

import pytest

from lib.config import ChoiceSchedule, Config, ScheduleConfig, SupernetConfig, ValueSchedule
from lib.genotype import BlockChoices
from lib.log import RunLog, read_log
from lib.shrinking import (
    Panel,
    boundaries,
    choices_at,
    describe_openings,
    first_narrower_epoch,
    full_space,
    make_panel,
    space_at,
    value_at,
)
from lib.training_run import due_epochs


@pytest.mark.parametrize(("epoch", "value"), [(1, 0.0), (80, 0.0), (81, 0.1), (82, 0.1), (10_000, 0.1)])
def test_a_value_holds_from_its_boundary_on(epoch, value):
    assert value_at(ValueSchedule([1, 81], [0.0, 0.1]), epoch) == value


@pytest.mark.parametrize(
    ("epoch", "kernel", "width", "depth"),
    [
        (1, [7, 5], [6], [4]),
        (80, [7, 5], [6], [4]),
        (81, [7, 5, 3], [6], [4]),
        (160, [7, 5, 3], [6], [4]),
        (161, [7, 5, 3], [6, 4], [4]),
        (241, [7, 5, 3], [6, 4, 3], [4]),
        (320, [7, 5, 3], [6, 4, 3], [4]),
        (321, [7, 5, 3], [6, 4, 3], [4, 3]),
        (401, [7, 5, 3], [6, 4, 3], [4, 3, 2]),
        (500, [7, 5, 3], [6, 4, 3], [4, 3, 2]),
    ],
)
def test_the_reference_schedule_opens_step_by_step(epoch, kernel, width, depth):
    assert choices_at(Config().search_space, epoch) == ([300], kernel, width, depth)
    stage = space_at(Config(), epoch).stages[3]
    assert (list(stage.block.kernel), list(stage.block.expand)) == (kernel[::-1], width[::-1])
    assert list(stage.depth) == depth[::-1]


def test_sizes_of_the_reference_space():
    """Once-for-All's own count at the end: ((3 * 3)**2 + (3 * 3)**3 + (3 * 3)**4)**5, about 2e19."""
    assert space_at(Config(), 1).size() == 2 ** (4 * 5)
    assert space_at(Config(), 81).size() == 3 ** (4 * 5)
    assert space_at(Config(), 500).size() == (9**2 + 9**3 + 9**4) ** 5 == full_space(Config()).size()
    assert f"{full_space(Config()).size():.0e}" == "2e+19"


def test_a_fixed_stage_stays_fixed():
    """Expansion 1 and one block: kernel 3, whatever is open."""
    for epoch in (1, 500):
        stage = space_at(Config(), epoch).stages[0]
        assert (stage.depth, stage.block) == ((1,), BlockChoices((1,), (3,)))


def test_choices_are_capped_at_each_stages_own_maximum():
    config = Config()
    config.search_space.num_cell_groups = [1, 2, 3, 4, 4, 4]
    config.search_space.expansions = [1, 3, 4, 6, 6, 5]
    config.backbone.kernels = [3, 3, 5, 7, 7, 7]
    stages = full_space(config).stages
    assert [s.depth for s in stages] == [(1,), (2,), (2, 3), (2, 3, 4), (2, 3, 4), (2, 3, 4)]
    assert [s.block.expand for s in stages] == [(1,), (3,), (3, 4), (3, 4, 6), (3, 4, 6), (3, 4, 5)]
    assert [s.block.kernel for s in stages] == [(3,), (3,), (3, 5), (3, 5, 7), (3, 5, 7), (3, 5, 7)]
    assert [s.depth for s in space_at(config, 1).stages] == [(1,), (2,), (3,), (4,), (4,), (4,)]
    assert [s.depth for s in space_at(config, 321).stages] == [(1,), (2,), (3,), (3, 4), (3, 4), (3, 4)]


def test_every_phase_is_within_the_full_space_and_has_its_largest():
    full = full_space(Config())
    for epoch in boundaries(Config().search_space.schedule_cfg, 500):
        space = space_at(Config(), epoch)
        for i in range(5):
            full.check(space.sample(random.Random(i)))
        assert space.largest() == full.largest()


def test_the_full_space_is_the_union_even_of_choices_that_close_again():
    config = Config()
    config.search_space.schedule_cfg.kernel_choice = ChoiceSchedule([1, 5, 9], [[7], [3], [5]])
    assert full_space(config).stages[1].block.kernel == (3, 5, 7)
    assert space_at(config, 9).stages[1].block.kernel == (5,)


def test_head_and_image_sizes_are_read_and_ordered():
    config = Config()
    config.search_space.image_size_choice = [320, 256, 320]
    config.search_space.head_width_choice = [0.5, 0.25]
    config.search_space.head_kernel_choice = [5, 3]
    space = space_at(config, 1)
    assert space.image_size == (256, 320)
    assert space.head == (BlockChoices((0.25, 0.5), (3, 5)),) * 4


def test_image_sizes_open_by_the_schedule():
    config = Config()
    config.search_space.image_size_choice = [128, 96, 64]
    config.search_space.schedule_cfg.image_size_choice = ChoiceSchedule([1, 5], [[128], [128, 64]])
    assert [space_at(config, epoch).image_size for epoch in (1, 4, 5, 500)] == [(128,), (128,), (64, 128), (64, 128)]
    assert full_space(config).image_size == (64, 96, 128)
    assert 5 in boundaries(config.search_space.schedule_cfg, 500)


def test_boundaries_up_to_the_last_epoch():
    schedule = Config().search_space.schedule_cfg
    assert boundaries(schedule, 500) == [1, 81, 161, 241, 321, 401]
    assert boundaries(schedule, 241) == [1, 81, 161, 241]
    assert boundaries(schedule, 240) == [1, 81, 161]


def test_first_narrower_epoch():
    assert first_narrower_epoch(Config().search_space.schedule_cfg) == 161
    cases = [([1], [[6]], None), ([1], [[6, 4]], 1), ([1, 4, 8], [[4, 6], [6], [6, 4]], 1), ([1, 9], [[6], [3]], 9)]
    for boundary, value, epoch in cases:
        assert first_narrower_epoch(ScheduleConfig(width_choice=ChoiceSchedule(boundary, value))) == epoch


def test_openings_in_words():
    lines = describe_openings(Config(), 100)
    assert lines[0].startswith("from epoch 1: size {300}, kernel {5, 7}, width {6}, depth {4}; 1.05e+06 sub-networks")
    assert [line.split(":")[0] for line in lines] == ["from epoch 1", "from epoch 81"]


# The panel


def panel_config(every=1):
    """Phases open at epochs 4 and 7 of 9, at 7 two choices at once."""
    config = Config(supernet=SupernetConfig(epochs=9, eval_every=every, interference_tolerance=0.05))
    schedule = config.search_space.schedule_cfg
    schedule.kernel_choice.boundary, schedule.width_choice.boundary = [1, 4], [1, 7, 99]
    schedule.depth_choice.boundary = [1, 7, 99]
    return config


def score_panel(tmp_path, ap_by_epoch):
    """A panel of one network with this AP after each of the epochs."""
    scores = iter(ap_by_epoch.values())
    scorer = lambda _detector, _genotype: {"metrics": {"AP": next(scores)}}  # noqa: E731
    panel = Panel({"largest": "genotype"}, scorer, panel_config())
    log = RunLog(tmp_path / "log.jsonl")
    for epoch in ap_by_epoch:
        panel.score(None, epoch, log)


def test_the_panel_is_always_the_same(tiny_detector):
    space = tiny_detector().space
    panel = make_panel(space, 2, 0)
    assert list(panel) == ["smallest", "random 1", "random 2", "largest"] and panel == make_panel(space, 2, 0)
    assert (panel["smallest"], panel["largest"]) == (space.smallest(), space.largest())
    assert list(make_panel(space, 1, 0, pretrained=space.smallest())) == [
        "smallest",
        "random 1",
        "pretrained",
        "largest",
    ]


def test_both_sides_of_each_opening_are_due():
    config = panel_config(every=5)
    assert due_epochs(config.supernet, boundaries(config.search_space.schedule_cfg, 9)) == {3, 4, 5, 6, 7, 9}
    assert due_epochs(config.supernet, [1]) == {5, 9}


def test_a_drop_of_the_largest_is_one_warning_that_names_the_phase(tmp_path, capsys):
    score_panel(tmp_path, {3: 0.50, 4: 0.46, 5: 0.44, 6: 0.40, 7: 0.40, 9: 0.30})
    found = [r for r in read_log(tmp_path / "log.jsonl") if r["kind"] == "interference"]
    assert [(r["step"], r["phase"], r["before"], r["now"]) for r in found] == [(5, 4, 0.5, 0.44), (9, 7, 0.4, 0.3)]
    printed = capsys.readouterr().out
    assert "warning: the largest sub-network fell from AP 0.500 to 0.440 since the phase of epoch 4" in printed
    assert "(width_choice [6, 4], depth_choice [4, 3])" in printed and printed.count("warning") == 2


def test_no_warning_within_the_tolerance_nor_before_the_first_opening(tmp_path):
    score_panel(tmp_path, {2: 0.9, 3: 0.5, 4: 0.46, 5: 0.8})
    assert not [r for r in read_log(tmp_path / "log.jsonl") if r["kind"] == "interference"]
