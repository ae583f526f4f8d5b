"""The supernet's training step: which sub-networks it draws, who teaches whom, and what is not computed."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import supernet_train
from lib.config import DistillConfig, SupernetConfig
from lib.datasets import Batch
from lib.losses import DetectionLoss
from supernet_train import panel, step_genotypes, supernet_losses


def make_batch(objects: int = 2) -> Batch:
    boxes = torch.tensor([[0.1, 0.1, 0.5, 0.5], [0.4, 0.3, 0.9, 0.8]])[:objects].expand(2, objects, 4)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    return Batch(images, boxes, torch.ones(2, objects, dtype=torch.int64), torch.arange(2))


class Counting:
    """A detector that counts its forward passes."""

    def __init__(self, detector):
        self.detector, self.calls = detector, []

    def __call__(self, images, genotype):
        self.calls.append((genotype, torch.is_grad_enabled()))
        return self.detector(images, genotype)

    def __getattr__(self, name):
        return getattr(self.detector, name)


def test_genotypes_are_a_function_of_seed_and_step(tiny_detector) -> None:
    space, config = tiny_detector().space, SupernetConfig(samples=3)
    drawn = [step_genotypes(space, config, 1, step) for step in range(20)]
    assert drawn == [step_genotypes(space, config, 1, step) for step in range(20)]
    assert len({genotype for step in drawn for genotype in step}) > 30
    assert step_genotypes(space, config, 2, 0) != drawn[0]


def test_the_sandwich_holds_largest_and_smallest_at_one_image_size(tiny_detector) -> None:
    space = tiny_detector(search_space__image_size_choice=[64, 96]).space
    config = SupernetConfig(sampling="sandwich", samples=2)
    sizes = set()
    for step in range(10):
        largest, smallest, *rest = step_genotypes(space, config, 0, step)
        assert largest.stages == space.largest().stages and smallest.stages == space.smallest().stages
        assert len(rest) == 2 and len({g.image_size for g in (largest, smallest, *rest)}) == 1
        sizes.add(largest.image_size)
    assert sizes == {64, 96}


@pytest.mark.parametrize("weight, forwards", [(0.0, 1), (0.1, 2)])
def test_no_teacher_runs_while_its_weight_is_zero(tiny_detector, weight: float, forwards: int) -> None:
    detector = Counting(tiny_detector().train())
    smallest = detector.space.smallest()
    losses = list(supernet_losses(detector, DetectionLoss(), make_batch(), [smallest], DistillConfig(), weight))
    assert len(detector.calls) == forwards
    assert ("distill" in losses[0]) == bool(weight)
    assert [gradient for _, gradient in detector.calls] == [False, True][-forwards:]


def test_the_largest_of_a_sandwich_teaches_without_another_forward(tiny_detector) -> None:
    detector = Counting(tiny_detector().train())
    genotypes = [detector.space.largest(), detector.space.smallest()]
    losses = list(supernet_losses(detector, DetectionLoss(), make_batch(), genotypes, DistillConfig(), 0.1))
    assert [genotype for genotype, _ in detector.calls] == genotypes
    assert "distill" not in losses[0] and losses[1]["distill"] > 0


def test_distillation_scales_with_its_weight(tiny_detector) -> None:
    detector, batch = tiny_detector().eval(), make_batch()
    arguments = (detector, DetectionLoss(), batch, [detector.space.smallest()], DistillConfig())
    one, two = (next(supernet_losses(*arguments, weight))["distill"] for weight in (0.1, 0.2))
    torch.testing.assert_close(two, 2 * one)


@pytest.mark.parametrize("kind", ["focal", "multibox"])
def test_a_batch_without_objects_has_a_finite_loss_and_a_gradient(tiny_detector, kind: str) -> None:
    detector = tiny_detector().train()
    genotypes, loss = [detector.space.largest(), detector.space.smallest()], DetectionLoss(type=kind)
    for losses in supernet_losses(detector, loss, make_batch(0), genotypes, DistillConfig(), 0.1):
        total = sum(losses.values())
        assert torch.isfinite(total)
        total.backward()
    assert detector.predictors.classes[0][-1].weight.grad.abs().sum() > 0


def test_the_panel_is_fixed_and_spans_the_space(tiny_detector) -> None:
    space = tiny_detector().space
    networks = panel(space, 2, seed=0)
    assert networks == panel(space, 2, seed=0)
    assert list(networks) == ["smallest", "random 1", "random 2", "largest"]


def test_importing_runs_nothing() -> None:
    assert callable(supernet_train.main)
    assert dataclasses.is_dataclass(SupernetConfig)
