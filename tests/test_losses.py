"""Matching against a slow loop; losses against torchvision and formulas as they stand in the papers."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.ssd import SSD
from torchvision.ops import box_convert, box_iou, sigmoid_focal_loss

from lib.config import DistillConfig, LossConfig
from lib.losses import DetectionLoss, Rows, adaptive_distillation, focal_loss, focal_prior_bias, match, multibox_loss
from lib.priors import decode, prior_boxes

PRIORS = prior_boxes([(3, 3), (1, 1)], [0.3, 0.7, 0.9], [[2], []])  # (38, 4)
CLASSES = 3


def focal(logits, prior_labels, alpha=0.25, gamma=2.0):
    """Divided by the number of positive priors, as the papers' losses and `DetectionLoss` are."""
    positive = prior_labels > 0
    return focal_loss(logits, prior_labels, Rows(positive), alpha, gamma) / positive.sum().clamp(min=1)


def multibox(logits, prior_labels, ratio=3):
    positive = prior_labels > 0
    return multibox_loss(logits, prior_labels, Rows(positive), ratio) / positive.sum().clamp(min=1)


def distillation(student, teacher, mask, config, kind):
    return adaptive_distillation(student, teacher, Rows(mask), config, kind) / mask.sum().clamp(min=1)


def random_batch(seed, images=3, objects=4, crowded=False):
    """Boxes (B, M, 4), labels (B, M); some objects are padding, crowded ones lie on top of one another."""
    generator = torch.Generator().manual_seed(seed)
    spread = 0.1 if crowded else 1.0
    size = 0.1 + 0.5 * torch.rand(images, objects, 2, generator=generator)
    corner = spread * torch.rand(images, objects, 2, generator=generator) * (1 - size)
    labels = torch.randint(0, CLASSES + 1, (images, objects), generator=generator)
    return torch.cat([corner, corner + size], -1) * (labels > 0)[..., None], labels


def slow_match(boxes, labels, priors, matched, unmatched):
    """One image, one prior and one object at a time."""
    prior_labels = torch.zeros(len(boxes), len(priors), dtype=torch.int64)
    owners = torch.full_like(prior_labels, -1)
    for b in range(len(boxes)):
        objects = [m for m in range(boxes.shape[1]) if labels[b, m] > 0]
        iou = box_iou(boxes[b], box_convert(priors, "cxcywh", "xyxy")).tolist()
        for p in range(len(priors)):
            best = max(objects, key=lambda m: iou[m][p], default=None)
            if best is not None and iou[best][p] >= matched:
                prior_labels[b, p], owners[b, p] = labels[b, best], best
            elif best is not None and iou[best][p] >= unmatched:
                prior_labels[b, p] = -1
        pairs = sorted((-iou[m][p], m, p) for m in objects for p in range(len(priors)))
        done, taken = set(), set()
        for _, m, p in pairs:
            if m not in done and p not in taken:
                prior_labels[b, p], owners[b, p] = labels[b, m], m
                done.add(m)
                taken.add(p)
    return prior_labels, owners


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**31),
    objects=st.integers(1, 6),
    num_priors=st.integers(1, len(PRIORS)),
    crowded=st.booleans(),
    matched=st.sampled_from([0.3, 0.5, 0.7]),
)
def test_match_equals_the_slow_loop(seed, objects, num_priors, crowded, matched):
    boxes, labels = random_batch(seed, objects=objects, crowded=crowded)
    priors = PRIORS[torch.randperm(len(PRIORS), generator=torch.Generator().manual_seed(seed))[:num_priors]]
    prior_labels, object_index = match(
        boxes, labels, priors, LossConfig(matched_threshold=matched, unmatched_threshold=0.25)
    )
    expected_labels, owners = slow_match(boxes, labels, priors, matched, 0.25)
    assert torch.equal(prior_labels, expected_labels)
    assert torch.equal(object_index[prior_labels > 0], owners[prior_labels > 0])


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), objects=st.integers(1, 12))
def test_every_object_has_a_prior_and_padding_has_none(seed, objects):
    boxes, labels = random_batch(seed, objects=objects, crowded=True)
    prior_labels, object_index = match(boxes, labels, PRIORS, LossConfig())
    for b in range(len(boxes)):
        owned = set(object_index[b, prior_labels[b] > 0].tolist())
        assert owned == set(labels[b].nonzero().flatten().tolist())


def test_identical_objects_do_not_erase_one_another():
    box = box_convert(PRIORS[4], "cxcywh", "xyxy")
    labels = torch.tensor([[1, 2, 3, 0]])
    prior_labels, object_index = match(
        box.expand(1, 4, 4), labels, PRIORS, LossConfig(matched_threshold=0.99, unmatched_threshold=0.98)
    )
    assert prior_labels[0, 4] == 1  # the first of equals keeps the best prior
    assert sorted(prior_labels[prior_labels > 0].tolist()) == [1, 2, 3]
    assert sorted(object_index[prior_labels > 0].tolist()) == [0, 1, 2]


def test_an_object_without_any_overlap_still_gets_a_prior():
    boxes = torch.tensor([[[0.9, 0.9, 0.95, 0.95]]])
    priors = torch.tensor([[0.2, 0.2, 0.1, 0.1], [0.4, 0.4, 0.1, 0.1]])
    prior_labels, _ = match(boxes, torch.tensor([[2]]), priors, LossConfig())
    assert sorted(prior_labels[0].tolist()) == [0, 2]


@pytest.mark.parametrize("objects", [0, 2])
def test_a_batch_of_padding_is_all_background(objects):
    loss = DetectionLoss(LossConfig())
    targets = loss.match(torch.zeros(2, objects, 4), torch.zeros(2, objects, dtype=torch.int64), PRIORS)
    assert torch.equal(targets.prior_labels, torch.zeros(2, len(PRIORS), dtype=torch.int64))


def random_predictions(seed=0, images=3):
    """Logits, offsets, and labels of every kind."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(images, len(PRIORS), CLASSES + 1, generator=generator)
    offsets = torch.randn(images, len(PRIORS), 4, generator=generator)
    prior_labels = torch.randint(-1, CLASSES + 1, (images, len(PRIORS)), generator=generator)
    prior_labels[torch.rand(images, len(PRIORS), generator=generator) < 0.6] = 0
    return logits.requires_grad_(), offsets.requires_grad_(), prior_labels


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.6, 0.0), (0.5, 1.3)])
def test_focal_loss_and_gradient_are_torchvisions(alpha, gamma):
    logits, _, prior_labels = random_predictions()
    one_hot = F.one_hot(prior_labels.clamp(min=0), CLASSES + 1)[..., 1:].float()
    elementwise = sigmoid_focal_loss(logits[..., 1:], one_hot, alpha, gamma)
    expected = elementwise[prior_labels >= 0].sum() / (prior_labels > 0).sum()
    loss = focal(logits, prior_labels, alpha, gamma)
    torch.testing.assert_close(loss, expected)
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, expected_gradient)
    assert not gradient[..., 0].any()
    assert not gradient[prior_labels == -1].any()


@pytest.mark.parametrize("size", [30.0, 1e4])
def test_focal_loss_of_certain_logits(size):
    """Right and certain costs nothing; wrong and certain costs the logit itself, and has a gradient."""
    prior_labels = torch.tensor([[1, 0]])
    right = torch.tensor([[[0, size, -size], [0, -size, -size]]])
    assert focal(right, prior_labels) == 0
    wrong = (-right).requires_grad_()
    loss = focal(wrong, prior_labels)
    torch.testing.assert_close(loss.item(), size * (0.25 + 3 * 0.75), rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(loss, wrong)
    torch.testing.assert_close(gradient[0, :, 1:], torch.tensor([[-0.25, 0.75], [0.75, 0.75]]))


def slow_multibox(logits, prior_labels, ratio):
    total, positives = torch.zeros(()), 0
    for image, labels in zip(logits, prior_labels, strict=True):
        log_p = image.log_softmax(-1)
        positive = [p for p, label in enumerate(labels) if label > 0]
        negative = sorted((p for p, label in enumerate(labels) if label == 0), key=lambda p: log_p[p, 0].item())
        for p in positive:
            total = total - log_p[p, labels[p]]
        for p in negative[: ratio * max(1, len(positive))]:
            total = total - log_p[p, 0]
        positives += len(positive)
    return total / max(1, positives)


@pytest.mark.parametrize("ratio", [0, 1, 3, 50])
def test_multibox_loss_equals_the_slow_loop(ratio):
    logits, _, prior_labels = random_predictions()
    prior_labels[1] = prior_labels[1].clamp(max=0)  # an image without objects
    loss, expected = multibox(logits, prior_labels, ratio), slow_multibox(logits, prior_labels, ratio)
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(x, logits)[0] for x in (loss, expected)]
    torch.testing.assert_close(*gradients)
    assert not gradients[0][prior_labels == -1].any()


def test_multibox_loss_is_torchvisions():
    """Where the two rules coincide: nothing ignored, an object in every image."""
    logits, offsets, prior_labels = random_predictions()
    prior_labels = prior_labels.clamp(min=0)
    stub = SimpleNamespace(box_coder=BoxCoder((10.0, 10.0, 5.0, 5.0)), neg_to_pos_ratio=3)
    targets = [{"boxes": torch.tensor([[0.1, 0.1, 0.5, 0.5]] * CLASSES), "labels": torch.arange(1, CLASSES + 1)}] * 3
    corners = [box_convert(PRIORS, "cxcywh", "xyxy")] * 3
    outputs = {"cls_logits": logits, "bbox_regression": offsets}
    expected = SSD.compute_loss(stub, targets, outputs, corners, list(prior_labels - 1))
    torch.testing.assert_close(multibox(logits, prior_labels), expected["classification"])


@pytest.mark.parametrize("kind", ["focal", "multibox"])
def test_detection_loss_end_to_end(kind):
    boxes, labels = random_batch(1)
    logits, offsets, _ = random_predictions()
    loss = DetectionLoss(LossConfig(type=kind, loc_coef=2.0))
    targets = loss.match(boxes, labels, PRIORS)
    prior_labels, owners = slow_match(boxes, labels, PRIORS, 0.5, 0.4)
    assert torch.equal(targets.prior_labels, prior_labels)
    assert torch.equal(targets.rows.mask, prior_labels > 0)
    image, prior = targets.rows.mask.nonzero(as_tuple=True)
    torch.testing.assert_close(decode(targets.offsets, PRIORS[prior]), boxes[image, owners[image, prior]])
    losses = loss(logits, offsets, targets)
    difference = (offsets[targets.rows.mask] - targets.offsets).abs()
    smooth = torch.where(difference < 1 / 9, difference**2 / (2 / 9), difference - 1 / 18)
    torch.testing.assert_close(losses["loc"], 2 * smooth.sum() / len(prior))
    classify = focal if kind == "focal" else multibox
    torch.testing.assert_close(losses["cls"], classify(logits, prior_labels))


def test_the_loss_uses_every_one_of_its_numbers():
    boxes, labels = random_batch(1)
    logits, offsets, _ = random_predictions()

    def total(variances=(0.1, 0.2), **numbers):
        loss = DetectionLoss(LossConfig(**numbers), variances)
        return sum(loss(logits, offsets, loss.match(boxes, labels, PRIORS)).values()).item()

    focal = {"alpha": 0.4, "gamma": 1.0, "loc_coef": 3.0, "variances": (0.2, 0.2), "matched_threshold": 0.6}
    for change in ({key: value} for key, value in (focal | {"unmatched_threshold": 0.2}).items()):
        assert total(**change) != total(), change
    assert total(type="multibox", neg_pos_ratio=2) != total(type="multibox")


@pytest.mark.parametrize("kind", ["focal", "multibox"])
@pytest.mark.parametrize("objects", [0, 3])
def test_a_batch_without_objects_is_finite_and_has_a_gradient(kind, objects):
    logits, offsets, _ = random_predictions()
    loss = DetectionLoss(LossConfig(type=kind))
    targets = loss.match(torch.zeros(3, objects, 4), torch.zeros(3, objects, dtype=torch.int64), PRIORS)
    losses = loss(logits, offsets, targets)
    distilled = distillation(logits, logits.detach() + 1, targets.rows.mask, DistillConfig(), kind)
    assert losses["cls"] > 0
    assert losses["loc"] == 0
    assert distilled == 0
    (losses["cls"] + losses["loc"] + distilled).backward()
    assert logits.grad.isfinite().all()
    assert logits.grad.any(-1).any(-1).all()  # every image teaches something
    assert torch.equal(offsets.grad, torch.zeros_like(offsets))


@pytest.mark.parametrize("kind", ["focal", "multibox"])
def test_half_precision_predictions_are_scored_in_float32(kind):
    boxes, labels = random_batch(1)
    logits, offsets, _ = random_predictions()
    low, low_offsets = logits.detach().bfloat16().requires_grad_(), offsets.detach().bfloat16().requires_grad_()
    loss = DetectionLoss(LossConfig(type=kind))
    with torch.autocast("cpu", torch.bfloat16):
        targets = loss.match(boxes, labels, PRIORS)
        losses = loss(low, low_offsets, targets)
        losses["kd"] = distillation(low, low.detach() * 0.5, targets.rows.mask, DistillConfig(), kind)
    expected = loss(low.detach().float(), low_offsets.detach().float(), targets)
    assert all(x.dtype == torch.float32 for x in losses.values())
    torch.testing.assert_close([losses["cls"], losses["loc"]], list(expected.values()))
    sum(losses.values()).backward()
    assert low.grad.isfinite().all()
    assert low.grad.any()


def entropy(p):
    return -sum(x * math.log(x) for x in p)


def slow_distillation(student, teacher, mask, kind, beta, gamma, temperature):
    """Tang et al. 2019, equations 3 to 5, one distribution at a time."""
    total = 0.0
    for s, t in zip(student[mask].tolist(), teacher[mask].tolist(), strict=True):
        if kind == "focal":
            pairs = [[[1 - x, x] for x in (1 / (1 + math.exp(-z / temperature)) for z in row[1:])] for row in (s, t)]
            pairs = list(zip(*pairs, strict=True))
        else:
            softmax = [[math.exp(z / temperature) for z in row] for row in (s, t)]
            pairs = [tuple([x / sum(row) for x in row] for row in softmax)]
        for p, q in pairs:
            kl = sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
            total += (1 - math.exp(-(kl + beta * entropy(q)))) ** gamma * kl * temperature**2
    return total / max(1, int(mask.sum()))


@pytest.mark.parametrize("kind", ["focal", "multibox"])
@pytest.mark.parametrize(("beta", "gamma", "temperature"), [(1.5, 1.0, 2.0), (0.5, 1.7, 1.0), (0.0, 0.0, 3.0)])
def test_distillation_equals_the_formula(kind, beta, gamma, temperature):
    student, _, prior_labels = random_predictions(0)
    teacher, _, _ = random_predictions(1)
    mask = prior_labels > 0
    config = DistillConfig(beta=beta, gamma=gamma, temperature=temperature)
    loss = distillation(student, teacher, mask, config, kind)
    expected = slow_distillation(student, teacher, mask, kind, beta, gamma, temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["focal", "multibox"])
def test_distillation_gradient_is_that_of_the_divergence_times_a_constant(kind):
    """With one prior, the gradient is weight * T * (p - q) (Hinton et al. 2015): neither weight nor teacher move."""
    student = torch.tensor([[[0.0, 1.0]]], requires_grad=True)
    teacher = torch.tensor([[[0.0, -2.0]]], requires_grad=True)
    loss = distillation(student, teacher, torch.ones(1, 1, dtype=torch.bool), DistillConfig(), kind)
    loss.backward()
    # Two classes of softmax with logits (0, x) are the sigmoid of x.
    p, q = (torch.sigmoid(x[0, 0, 1].detach() / 2) for x in (student, teacher))
    kl = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    weight = 1 - torch.exp(-(kl + 1.5 * entropy([q, 1 - q])))
    torch.testing.assert_close(loss.detach(), 4 * weight * kl)
    torch.testing.assert_close(student.grad[0, 0, 1], 2 * weight * (p - q))
    assert teacher.grad is None


@pytest.mark.parametrize("kind", ["focal", "multibox"])
@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_distillation_of_extreme_logits_is_finite(kind, gamma):
    extreme = torch.tensor([[[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [60.0, -60.0, 90.0]]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    for teacher in (extreme, -extreme):
        student = extreme.clone().requires_grad_()
        loss = distillation(student, teacher, mask, DistillConfig(gamma=gamma), kind)
        loss.backward()
        assert loss.isfinite()
        assert student.grad.isfinite().all()
        assert (loss > 1) == (teacher is not extreme)


def test_the_prior_bias_keeps_the_first_loss_small():
    bias = focal_prior_bias(0.01)
    assert torch.sigmoid(torch.tensor(bias)).item() == pytest.approx(0.01)
    boxes, labels = random_batch(1)
    prior_labels, _ = match(boxes, labels, PRIORS, LossConfig())
    logits = torch.zeros(3, len(PRIORS), CLASSES + 1)
    assert focal(logits + bias, prior_labels) < 1.5
    assert focal(logits, prior_labels) > 1.5


def test_targets_serve_any_number_of_networks():
    boxes, labels = random_batch(1)
    loss = DetectionLoss(LossConfig())
    targets = loss.match(boxes, labels, PRIORS)
    before = copy.deepcopy(targets)
    first, second = (loss(*random_predictions(seed)[:2], targets) for seed in (0, 1))
    assert first["cls"] != second["cls"]
    assert torch.equal(before.rows.mask, targets.rows.mask)
    for name in ("prior_labels", "offsets", "normalizer"):
        assert torch.equal(getattr(before, name), getattr(targets, name))


@pytest.mark.parametrize("loss_type", ["focal", "multibox"])
def test_batches_that_share_a_step_weigh_their_objects_as_one_batch_does(loss_type):
    """The mean of their losses, and its gradient; one has no object at all, the last one is smaller."""
    loss = DetectionLoss(LossConfig(type=loss_type))
    boxes, labels = random_batch(3, images=7)
    labels[2:4] = 0
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(7, len(PRIORS), CLASSES + 1, generator=generator).requires_grad_()
    offsets = torch.randn(7, len(PRIORS), 4, generator=generator).requires_grad_()
    config = DistillConfig()

    def all_losses(rows, targets):
        found = loss(logits[rows], offsets[rows], targets)
        return {**found, "distill": loss.distillation(logits[rows], logits[rows].flip(0), targets, config)}

    parts = [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 7)]
    together = loss.match_together([(boxes[part], labels[part]) for part in parts], PRIORS)
    several = [all_losses(part, targets) for part, targets in zip(parts, together, strict=True)]
    mean = {name: sum(item[name] for item in several) / len(several) for name in ("cls", "loc")}
    whole = all_losses(slice(0, 7), loss.match(boxes, labels, PRIORS))
    gradients = []
    for losses in (mean, whole):
        gradients.append(torch.autograd.grad(losses["cls"] + losses["loc"], (logits, offsets), retain_graph=True))
        torch.testing.assert_close(losses["cls"], whole["cls"])
        torch.testing.assert_close(losses["loc"], whole["loc"])
    torch.testing.assert_close(*gradients)
    alone = [loss(logits[part], offsets[part], loss.match(boxes[part], labels[part], PRIORS)) for part in parts]
    assert (sum(item["loc"] for item in alone) / 4 - whole["loc"]).abs() > 0.01  # each by itself weighs otherwise
