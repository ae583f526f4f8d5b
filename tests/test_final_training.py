"""A detector's training step, its teacher, and what a training leaves."""

from __future__ import annotations

import pytest
import torch

from lib.config import DistillConfig, LossConfig
from lib.datasets import Batch
from lib.final_training import detection_losses
from lib.losses import DetectionLoss, adaptive_distillation


@pytest.fixture
def batch():
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([0.2, 0.2, 0.7, 0.8]).expand(4, 1, 4)
    return Batch(images, boxes, torch.ones(4, 1, dtype=torch.int64), torch.arange(4))


@pytest.fixture
def networks(tiny_detector):
    """A student and a teacher of other weights; the list fills with the teacher's calls."""
    detector, calls = tiny_detector(), []
    student, teacher = detector.extract(detector.space.smallest()), detector.extract(detector.space.largest())
    for net in teacher.predictors.classes:
        net[-1].bias.data.add_(3.0)  # surer than its student
    teacher.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    return student, teacher, calls


def gradient(losses, student):
    biases = [net[-1].bias for net in student.predictors.classes]
    return torch.cat(torch.autograd.grad(sum(losses.values()), biases, retain_graph=True))


def test_without_a_weight_the_teacher_never_runs(networks, batch):
    student, teacher, calls = networks
    (losses,) = detection_losses(student, DetectionLoss(LossConfig()), batch, DistillConfig(), 0.0, teacher)
    (plain,) = detection_losses(student, DetectionLoss(LossConfig()), batch)
    assert calls == [] and losses == plain and losses.keys() == {"cls", "loc"}


@pytest.mark.parametrize("priors", ["positive", "all"])
def test_the_teacher_has_its_weight_in_the_losses_and_the_gradient(networks, batch, priors):
    student, teacher, calls = networks
    loss, distill = DetectionLoss(LossConfig()), DistillConfig(priors=priors, temperature=3.0)
    (losses,) = detection_losses(student, loss, batch, distill, 0.25, teacher)
    assert calls == [False] and losses.keys() == {"cls", "loc", "distill"}
    labels = loss.match(batch.boxes, batch.labels, student.priors).prior_labels
    mask = labels > 0 if priors == "positive" else labels >= 0
    alone = adaptive_distillation(student(batch.images)[0], teacher(batch.images)[0], mask, distill)
    torch.testing.assert_close(losses["distill"], 0.25 * alone)
    (plain,) = detection_losses(student, loss, batch)
    expected = gradient(plain, student) + 0.25 * gradient({"distill": alone}, student)
    torch.testing.assert_close(gradient(losses, student), expected)
    assert (expected - gradient(plain, student)).norm() > 0.01 * expected.norm()
