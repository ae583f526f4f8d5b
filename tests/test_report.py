from __future__ import annotations

import json

import pytest
from torchvision.io import decode_image, read_file

from lib import plan
from lib.detector import module_cost
from lib.log import plot_training
from lib.report import plot_front, plot_search
from lib.search import best_of_random


def write_log(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def train(epoch, **losses):
    return {"kind": "train", "step": epoch, "losses": losses}


def evaluation(epoch, **networks):
    return {"kind": "eval", "step": epoch, "networks": networks}


def pixels(path):
    return decode_image(read_file(str(path)))


# ------------------------------------------------------------------------------------------------------------- report


@pytest.mark.parametrize(
    "records",
    [
        [],
        [train(1, cls=2.0, loc=1.0)],
        [train(1, cls=2.0), train(2, cls=1.5, distill=0.1), evaluation(2, smallest={"AP": 0.1}, largest={"AP": None})],
        [train(1, cls=None), evaluation(1, detector={"AP": 0.2})],
    ],
    ids=["empty", "losses only", "a loss that comes later", "not a number"],
)
def test_curves_are_drawn_from_any_log(tmp_path, records):
    write_log(tmp_path / "log.jsonl", *records)
    plot_training(tmp_path / "log.jsonl", tmp_path / "curves.png", "AP", phases=[1, 2])
    assert pixels(tmp_path / "curves.png").float().std() > 1


def test_a_resumed_epoch_replaces_the_one_before(tmp_path):
    once, twice = tmp_path / "once", tmp_path / "twice"
    write_log(once, train(1, cls=2.0), train(2, cls=1.0))
    write_log(twice, train(1, cls=2.0), train(2, cls=9.0), train(2, cls=1.0))
    for log in (once, twice):
        plot_training(log, log.with_suffix(".png"), "AP")
    assert pixels(once.with_suffix(".png")).equal(pixels(twice.with_suffix(".png")))


def test_a_loss_that_comes_later_is_drawn(tmp_path):
    """Distillation starts when its schedule says so, not at epoch 1."""
    first, both = tmp_path / "first", tmp_path / "both"
    write_log(first, train(1, cls=2.0), train(2, cls=1.0), train(3, cls=1.0))
    write_log(both, train(1, cls=2.0), train(2, cls=1.0, distill=1.5), train(3, cls=1.0, distill=1.4))
    for log in (first, both):
        plot_training(log, log.with_suffix(".png"), "AP")
    assert not pixels(first.with_suffix(".png")).equal(pixels(both.with_suffix(".png")))


@pytest.mark.parametrize("cost", ["flops", "params", "latency_ms"])
def test_the_front_is_drawn(tmp_path, cost):
    found = [{"AP": 0.1 * i, cost: 1e6 * (5 - i)} for i in range(4)]
    plot_front(found, found[-1:], cost, "AP", tmp_path / "front.png")
    assert pixels(tmp_path / "front.png").float().std() > 1


@pytest.mark.parametrize("costs", [["flops"], ["flops", "params"]])
def test_a_search_is_drawn_with_and_without_its_control(tmp_path, costs):
    found = [{"AP": 0.1 * i, "flops": 1e6 * (5 - i), "params": 1e6} for i in range(4)]
    history = [m["AP"] for m in found]
    with_control, without = tmp_path / "with.png", tmp_path / "without.png"
    plot_search(found, found[-1:], history, best_of_random(history, 4), costs, "AP", with_control)
    plot_search(found, found[-1:], history, [], costs, "AP", without)
    assert not pixels(with_control).equal(pixels(without))
    assert pixels(without).shape[2] == 770 * (len(costs) + 1)  # a panel per cost, one for the history


# --------------------------------------------------------------------------------------------------------------- plan


def test_the_plan_says_sizes_costs_and_priors(tiny_detector, tiny_config):
    detector = tiny_detector()
    assert plan.describe_split(10, range(7), range(3)) == ("split: 10 images, 7 train the supernet, 3 score candidates")
    first, smallest, largest = plan.describe_space(detector, detector.space)
    # five stages of one or two blocks, each of 2 widths and 2 kernels
    assert first == f"search space: {float((4 + 16) ** 5):.4g} sub-networks of mbv3_backbone"
    for line, genotype in ((smallest, detector.space.smallest()), (largest, detector.space.largest())):
        cost, _ = module_cost(detector.extract(genotype), (1, 3, 64, 64))
        assert f"{cost.flops / 1e6:.1f} M multiply-adds, {cost.params / 1e6:.3f} M parameters" in line
    assert plan.describe_priors(detector, tiny_config()) == ["priors at 64 px: 84 = 4x4x4, 2x2x4, 1x1x4"]
    assert len(detector.priors(64)) == 84


def test_the_plan_says_how_long_training_is(tiny_config):
    line = plan.describe_training("final", tiny_config().final, 24, 6)
    assert line == "final: 2 epochs of 6 steps, batches of 4, 24 images, sgd, learning rate 0.01 (cosine)"
