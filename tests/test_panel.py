"""Which epochs are scored, what is logged, and when a drop of the largest sub-network is a warning."""

from __future__ import annotations

from lib.config import Config, ScheduleConfig, SupernetConfig
from lib.log import RunLog, read_log
from lib.shrinking import PanelLog, describe_opening, make_panel


def make_log(tmp_path, scores, every=5):
    """A panel of one network, whose AP at each call is the next of `scores`; phases open at epochs 4 and 7 of 9."""
    left = iter(scores)
    config = Config(supernet=SupernetConfig(epochs=9, eval_every=every, interference_tolerance=0.05))
    schedule = config.search_space.schedule_cfg
    schedule.kernel_choice.boundary, schedule.width_choice.boundary = [1, 4], [1, 7, 99]
    schedule.depth_choice.boundary = [1, 98, 99]
    return PanelLog({"largest": "g"}, lambda _: {"AP": next(left)}, RunLog(tmp_path / "log.jsonl"), config)


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


def test_both_sides_of_each_opening_are_scored_once(tmp_path):
    panel = make_log(tmp_path, [0.5] * 9)
    due = [epoch for epoch in range(10) if panel.due(epoch)]
    assert due == [3, 4, 5, 6, 7, 9]
    panel.score(4)
    assert not panel.due(4) and panel.due(5)


def test_a_drop_of_the_largest_is_one_warning_that_names_the_phase(tmp_path, capsys):
    panel = make_log(tmp_path, [0.50, 0.46, 0.44, 0.40, 0.40, 0.30])
    for epoch in (3, 4, 5, 6, 7, 9):
        panel.score(epoch)
    found = [r for r in read_log(tmp_path / "log.jsonl") if r["kind"] == "interference"]
    assert [(r["step"], r["phase"], r["before"], r["now"]) for r in found] == [(5, 4, 0.5, 0.44), (9, 7, 0.4, 0.3)]
    printed = capsys.readouterr().out
    assert "warning: the largest sub-network fell from AP 0.500 to 0.440 since the phase of epoch 4" in printed
    assert "(width_choice [6, 4])" in printed and printed.count("warning") == 2


def test_no_warning_within_the_tolerance_nor_before_the_first_opening(tmp_path):
    panel = make_log(tmp_path, [0.9, 0.5, 0.46, 0.8], every=1)
    for epoch in (2, 3, 4, 5):
        panel.score(epoch)
    assert not [r for r in read_log(tmp_path / "log.jsonl") if r["kind"] == "interference"]


def test_an_opening_is_described_in_the_configurations_words():
    schedule = ScheduleConfig()
    schedule.depth_choice.boundary[1] = 161
    assert describe_opening(schedule, 161) == "width_choice [6, 4], depth_choice [4, 3]"
