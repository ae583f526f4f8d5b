"""The supernet's training step: which sub-networks it draws, who teaches whom, and what is not computed."""

from __future__ import annotations

import pytest
import torch

import supernet_train
from lib.config import DistillConfig, LossConfig, SupernetConfig
from lib.datasets import Batch
from lib.losses import DetectionLoss


def test_the_genotypes_of_a_step_are_a_function_of_seed_and_step(tiny_detector):
    space = tiny_detector(search_space__image_size_choice=[64, 96]).space
    config = SupernetConfig(samples=2)
    draws = [supernet_train.step_genotypes(space, config, 0, step) for step in range(20)]
    assert draws == [supernet_train.step_genotypes(space, config, 0, step) for step in range(20)]
    assert draws != [supernet_train.step_genotypes(space, config, 1, step) for step in range(20)]
    assert len({tuple(draw) for draw in draws}) == 20 and all(len(draw) == 2 for draw in draws)
    assert {g.image_size for draw in draws for g in draw} == {64, 96}
    for draw in draws:
        assert len({g.image_size for g in draw}) == 1
        for genotype in draw:
            space.check(genotype)


def test_a_sub_network_that_is_drawn_twice_is_trained_once(tiny_detector):
    """Before any choice opens, all three are the same."""
    space = tiny_detector(search_space__schedule_cfg__depth_choice="{boundary: [1], value: [[2]]}").space
    closed = type(space)(space.backbone_type, space.image_size, (), space.head)
    assert len(supernet_train.step_genotypes(closed, SupernetConfig(samples=3), 0, 1)) == 1


def step_losses(detector, weight, genotypes, objects=1, loss_type="focal"):
    """The losses of one step, and which sub-networks ran for them."""
    ran = []
    hook = detector.register_forward_pre_hook(lambda _module, inputs: ran.append((inputs[1], torch.is_grad_enabled())))
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8, generator=generator)
    boxes = torch.tensor([0.2, 0.2, 0.7, 0.8]).expand(4, objects, 4)
    batch = Batch(images, boxes, torch.ones(4, objects, dtype=torch.int64), torch.arange(4))
    loss = DetectionLoss(LossConfig(type=loss_type))
    settings = DistillConfig()
    losses = list(supernet_train.supernet_losses(detector, loss, batch, genotypes, settings, weight))
    hook.remove()
    return losses, ran


def test_a_teacher_without_weight_is_never_run(tiny_detector):
    detector = tiny_detector().train()
    small, large = detector.space.smallest(), detector.space.largest()
    losses, ran = step_losses(detector, 0.0, [small, small])
    assert ran == [(small, True)] * 2 and all(item.keys() == {"cls", "loc"} for item in losses)
    losses, ran = step_losses(detector, 0.5, [small, small])
    assert ran == [(large, False), (small, True), (small, True)]
    assert all(item.keys() == {"cls", "loc", "distill"} and item["distill"] > 0 for item in losses)
    losses, ran = step_losses(detector, 0.5, [large, small])  # the largest runs once, and is not taught
    assert ran == [(large, True), (small, True)]
    assert [set(item) for item in losses] == [{"cls", "loc"}, {"cls", "loc", "distill"}]


def test_the_weight_scales_the_distillation_and_nothing_else(tiny_detector):
    once, twice = (
        step_losses(tiny_detector().train(), weight, [tiny_detector().space.smallest()])[0][0] for weight in (0.1, 0.2)
    )
    torch.testing.assert_close(twice["distill"], 2 * once["distill"])
    assert twice["cls"] == once["cls"] and twice["loc"] == once["loc"]


def test_the_losses_of_a_step_are_averaged_over_its_networks(tiny_detector):
    small = tiny_detector().space.smallest()
    (alone,), _ = step_losses(tiny_detector().train(), 0.0, [small])
    (half, _), _ = step_losses(tiny_detector().train(), 0.0, [small, small])
    torch.testing.assert_close(2 * half["cls"], alone["cls"])


@pytest.mark.parametrize("loss_type", ["focal", "multibox"])
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_a_batch_without_objects_has_finite_losses_and_a_gradient(tiny_detector, loss_type, weight):
    detector = tiny_detector().train()
    genotypes = [detector.space.largest(), detector.space.smallest()]
    losses, _ = step_losses(detector, weight, genotypes, objects=0, loss_type=loss_type)
    total = sum(value for item in losses for value in item.values())
    total.backward()
    gradient = detector.predictors.classes[0][-1].weight.grad
    assert total.isfinite() and gradient.isfinite().all() and gradient.abs().sum() > 0
