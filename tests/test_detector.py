from __future__ import annotations

import copy
import random
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lib.config import Config
from lib.detector import ElasticSSD, Normalize, detect, module_cost, recalibrate
from lib.errors import UserError
from lib.losses import DetectionLoss
from lib.metrics import detection_metrics, to_pixels
from lib.postprocess import Detections
from lib.priors import priors_per_cell

MBV2 = {
    "search_space__num_cell_groups": [1, 2, 2, 2, 2, 2, 1],
    "search_space__expansions": [1, 6, 6, 6, 6, 6, 6],
    "backbone__backbone_type": "mbv2_backbone",
}
VARIANTS = {
    "mbv3, ssdlite": {},
    "mbv3, plain": {"head__predictor": "plain"},
    "mbv2, ssdlite": MBV2,
    "mbv2, plain": {**MBV2, "head__predictor": "plain"},
    "elastic head": {"search_space__head_width_choice": [0.25, 0.5], "search_space__head_kernel_choice": [3, 5]},
}
variants = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
CPU = torch.device("cpu")


def pictures(count=2, size=64, seed=0):
    return torch.randint(
        0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def some_genotypes(space, count=4):
    rng = random.Random(1)
    return [space.smallest(), space.largest(), *(space.sample(rng) for _ in range(count))]


def assert_same(outputs, others, tolerance=1e-5):
    for a, b in zip(outputs, others, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------------------ extract


@variants
@torch.no_grad()
def test_extract_equals_the_elastic_detector(tiny_detector, changes):
    detector = tiny_detector(**changes)
    outputs = []
    for genotype in some_genotypes(detector.space):
        plain = detector.extract(genotype)
        assert_same(plain(pictures()), detector(pictures(), genotype))
        assert torch.equal(plain.priors, detector.priors(64))
        outputs.append(plain(pictures())[0])
    distinct = [not torch.allclose(outputs[0], other) for other in outputs[1:]]
    assert all(distinct), "different genotypes must be different networks"


@variants
def test_extract_trains_as_the_elastic_detector(tiny_detector, changes):
    """Batch statistics, the gradient on the input, and the running statistics that a training step leaves behind."""
    for genotype in some_genotypes(tiny_detector(**changes).space, 1):
        detector = tiny_detector(**changes).train()
        plain, x = detector.extract(genotype), pictures(4).float()
        gradients = []
        for network in (partial(detector, genotype=genotype), plain):
            images = x.clone().requires_grad_()
            logits, offsets = network(images)
            (logits.square().mean() + offsets.square().mean()).backward()
            gradients.append((logits.detach(), images.grad))
        assert_same(*gradients, tolerance=1e-4)
        with torch.no_grad():
            assert_same(plain.eval()(x), detector.eval()(x, genotype), tolerance=1e-4)


def test_an_extract_is_plain_and_on_its_own(tiny_detector):
    detector = tiny_detector()
    genotype = detector.space.largest()
    plain = detector.extract(genotype)
    kinds = {type(m).__name__ for m in plain.modules()}
    assert not [kind for kind in kinds if "Elastic" in kind]
    before = {name: t.clone() for name, t in detector.state_dict().items()}
    recalibrate(plain, [pictures(4)], CPU)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.fill_(0)
    assert all(torch.equal(t, before[name]) for name, t in detector.state_dict().items())


def test_an_extract_draws_no_random_numbers(tiny_detector):
    detector = tiny_detector()
    before = torch.get_rng_state()
    for _ in range(2):
        detector.extract(detector.space.sample(random.Random(3)))
    assert torch.equal(torch.get_rng_state(), before)  # else an evaluation would change the training that follows


@torch.no_grad()
def test_an_extract_has_the_detectors_mode(tiny_detector):
    """Or else the parts that were copied and the parts that were cut would be in different modes."""
    for training in (True, False):
        plain = tiny_detector().train(training).extract(tiny_detector().space.largest())
        assert {m.training for m in plain.modules()} == {training}


@torch.no_grad()
def test_recalibration_makes_a_training_pass_and_an_evaluation_agree(tiny_detector):
    """On the one batch that the statistics come from, up to the unbiased variance; mixed statistics are far off."""
    detector = tiny_detector()
    plain, images = detector.extract(detector.space.smallest()), pictures(32)
    stale = plain.eval()(images)[0]
    recalibrate(plain, [images], CPU)
    fresh, of_batch = plain.eval()(images)[0], plain.train()(images)[0]
    error = (fresh - of_batch).abs().mean()
    assert error < 0.1 * (stale - of_batch).abs().mean()


def test_extract_refuses_a_genotype_of_another_space(tiny_detector):
    other = tiny_detector(**MBV2).space.largest()
    with pytest.raises(UserError, match="backbone type is mbv2_backbone"):
        tiny_detector().extract(other)


# ------------------------------------------------------------------------------------------------- priors, resolution


@pytest.mark.parametrize("size", [64, 96, 100, 127, 160])
@pytest.mark.parametrize("changes", [{}, MBV2], ids=["mbv3", "mbv2"])
@torch.no_grad()
def test_as_many_predictions_as_priors(tiny_detector, changes, size):
    detector = tiny_detector(**changes, search_space__image_size_choice=[size])
    genotype = detector.space.smallest()
    logits, offsets = detector(pictures(1), genotype)
    count = len(detector.priors(size))
    assert logits.shape == (1, count, 4) and offsets.shape == (1, count, 4)
    shapes = []
    for module in detector.predictors.boxes:
        module.register_forward_hook(lambda _m, inputs, _o: shapes.append(tuple(inputs[0].shape[-2:])))
    detector(pictures(1), genotype)
    assert shapes == detector.feature_sizes(size)


@torch.no_grad()
def test_the_reference_configuration_has_2268_priors():
    config = Config()
    config.backbone.mult_ratio = 0.125  # channels do not matter here
    detector = ElasticSSD(config, 20).eval()
    assert detector.feature_sizes(300) == [(n, n) for n in (19, 10, 5, 3, 2, 1)]
    assert priors_per_cell(config.head.aspect_ratios) == [4, 6, 6, 6, 4, 4]
    logits, offsets = detector(pictures(1, 300), detector.space.smallest())
    assert len(detector.priors(300)) == logits.shape[1] == offsets.shape[1] == 2268


@torch.no_grad()
def test_predictions_are_in_the_order_of_the_priors(tiny_detector):
    """A class net whose bias numbers its outputs shows which output ends up at which prior."""
    detector = tiny_detector(head__predictor="plain")
    for level, net in enumerate(detector.predictors.classes):
        net[-1].weight.zero_()
        net[-1].bias.copy_(100 * level + torch.arange(len(net[-1].bias)))
    logits, _ = detector(pictures(1), detector.space.largest())
    start = 0
    for level, ((h, w), anchors) in enumerate(zip(detector.feature_sizes(64), [4, 4, 4], strict=True)):
        cell = 100 * level + torch.arange(anchors * 4).view(anchors, 4)  # a prior's classes lie side by side
        assert torch.equal(
            logits[0, start : start + h * w * anchors].view(h * w, anchors, 4), cell.expand(h * w, -1, -1)
        )
        start += h * w * anchors


@torch.no_grad()
def test_a_genotypes_image_size_resizes_the_batch(tiny_detector):
    detector = tiny_detector(search_space__image_size_choice=[64, 96])
    x = pictures(2, 96).float()
    small = F.interpolate(x, (64, 64), mode="bilinear", align_corners=False)
    by_size = {g.image_size: g for g in (detector.space.smallest(), detector.space.largest())}
    assert sorted(by_size) == [64, 96]
    assert_same(detector(x, by_size[64]), detector(small, by_size[64]))
    assert_same(detector.extract(by_size[64])(x), detector(x, by_size[64]))
    assert detector(x, by_size[96])[0].shape[1] == len(detector.priors(96)) > len(detector.priors(64))


@torch.no_grad()
def test_bytes_and_floats_give_the_same(tiny_detector):
    detector = tiny_detector()
    genotype = detector.space.largest()
    assert_same(detector(pictures(), genotype), detector(pictures().float(), genotype), tolerance=0)
    x = torch.full((1, 3, 64, 64), 192, dtype=torch.uint8)
    assert torch.equal(detector.normalize(x, 64), torch.full((1, 3, 64, 64), 0.5))  # 192 / 128 - 1


@torch.no_grad()
def test_nothing_is_remembered_between_calls(tiny_detector):
    detector = tiny_detector()
    small, large = detector.space.smallest(), detector.space.largest()
    first = detector(pictures(), large)
    state = {name: t.clone() for name, t in detector.state_dict().items()}
    attributes = [set(vars(m)) for m in detector.modules()]
    detector(pictures(), small)
    detector.extract(small)
    detector.cost(small)
    assert_same(first, detector(pictures(), large), tolerance=0)
    assert all(torch.equal(t, state[name]) for name, t in detector.state_dict().items())
    assert attributes == [set(vars(m)) for m in detector.modules()]


# --------------------------------------------------------------------------------------------------------------- cost


def count_by_hooks(model, size):
    """Multiply-adds of every convolution as its forward shows them: outputs times inputs that each of them sees."""
    total = []

    def hook(conv, _inputs, output):
        total.append(output[0].numel() * conv.in_channels // conv.groups * conv.kernel_size[0] * conv.kernel_size[1])

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(hook)
    with torch.no_grad():
        model.eval()(pictures(2, size))
    return sum(total)


@variants
def test_cost_is_that_of_the_extract(tiny_detector, changes):
    detector = tiny_detector(**changes)
    for genotype in some_genotypes(detector.space):
        plain = detector.extract(genotype)
        cost, _ = module_cost(plain, (1, 3, 64, 64))
        assert detector.cost(genotype) == cost == detector.cost(genotype)  # the second time from its memory
        assert cost.params == sum(p.numel() for p in plain.parameters())
        assert cost.flops == count_by_hooks(plain, 64)


def test_cost_grows_with_the_image(tiny_detector):
    detector = tiny_detector(search_space__image_size_choice=[64, 128])
    genotype = detector.space.largest()
    small, large = (detector.cost(replace(genotype, image_size=size)) for size in (64, 128))
    assert small.params == large.params and 3 < large.flops / small.flops < 4.1


# -------------------------------------------------------------------------------------------------------- predictors


@pytest.mark.parametrize("kind", ["ssdlite", "plain"])
def test_logits_and_offsets_come_straight_from_a_convolution(tiny_detector, kind):
    detector = tiny_detector(head__predictor=kind)
    for net in (*detector.predictors.classes, *detector.predictors.boxes):
        assert type(net[-1]) is nn.Conv2d and net[-1].bias is not None
        assert sum(isinstance(m, nn.BatchNorm2d) for m in net) == (kind == "ssdlite")


def test_the_first_loss_is_near_its_steady_size(tiny_config):
    """Without the focal prior's bias the background alone costs a hundred per positive."""
    config = tiny_config(search_space__image_size_choice=[160])
    torch.manual_seed(0)
    detector = ElasticSSD(config, 20).train()
    loss = DetectionLoss(config.loss)
    boxes = torch.tensor([[[0.3, 0.3, 0.5, 0.6]], [[0.1, 0.2, 0.7, 0.9]]])
    targets = loss.match(boxes, torch.tensor([[1], [2]]), detector.priors(160))
    genotype, x = detector.space.largest(), pictures(2, 160)
    first = loss(*detector(x, genotype), targets)
    assert sum(first.values()) < 3 + first["loc"] and first["cls"] < 3
    detector.predictors.set_class_bias(0.0)
    assert loss(*detector(x, genotype), targets)["cls"] > 20 * first["cls"]


def test_multibox_logits_start_without_a_bias(tiny_detector, tiny_config):
    detector = ElasticSSD(tiny_config(loss__type="multibox"), 3)
    assert all(net[-1].bias.abs().max() == 0 for net in detector.predictors.classes)


def test_whole_numbers_in_the_configuration_do_not_make_pictures_integers():
    """`pixel_mean: [127, 127, 127]` in YAML: pictures must be resized, and must keep their fractions."""
    images = 255 * torch.rand(1, 3, 6, 8)
    whole, same = Normalize([127] * 3, [128] * 3), Normalize([127.0] * 3, [128.0] * 3)
    for size in (4, 6):
        torch.testing.assert_close(whole(images, size), same(images, size), rtol=0, atol=0)


# Recalibration and detection


def test_recalibration_is_the_average_over_batches_whatever_was_there():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3)
    norm.running_mean.fill_(7.0)
    batches = [3 * torch.randn(5, 3, 4, 4) + 2, torch.randn(5, 3, 4, 4), torch.rand(5, 3, 4, 4)]
    recalibrate(norm, batches, torch.device("cpu"))
    mean = torch.stack([b.mean((0, 2, 3)) for b in batches]).mean(0)
    variance = torch.stack([b.transpose(0, 1).flatten(1).var(1) for b in batches]).mean(0)  # unbiased
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, variance)
    assert norm.momentum == 0.1  # as it was, for training that may follow


def test_recalibration_changes_no_weight(tiny_detector):
    detector = tiny_detector()
    model = detector.extract(detector.space.largest())
    before = copy.deepcopy(dict(model.named_parameters()))
    recalibrate(model, [torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)], torch.device("cpu"))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


class Oracle(nn.Module):
    """Sees class 1 + i % 2 at prior i of image i: pixel 0 holds i."""

    def __init__(self):
        super().__init__()
        self.priors = torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.75, 0.75, 0.5, 0.5]])
        self.modes = []

    def forward(self, images):
        self.modes.append(self.training)
        logits = torch.full((len(images), 2, 3), -20.0)
        for row, i in enumerate(images[:, 0, 0, 0].long().tolist()):
            logits[row, i % 2, 1 + i % 2] = 5.0
        return logits, torch.zeros(len(images), 2, 4)


def test_detect_and_measure_a_model_that_is_always_right(tiny_config):
    images = torch.arange(5).view(5, 1, 1, 1).expand(5, 3, 4, 4).contiguous()
    model = Oracle()
    found = detect(model, images.split(2), tiny_config(), torch.device("cpu"))
    assert model.modes == [False] * 3 and [d.labels.tolist() for d in found] == [[1], [2], [1], [2], [1]]
    torch.testing.assert_close(found[1].boxes, torch.tensor([[0.5, 0.5, 1.0, 1.0]]))
    sizes = [(40, 20), (60, 80), (40, 40), (100, 50), (30, 30)]
    truth = [
        {"boxes": to_pixels(d, *size)["boxes"], "labels": d.labels, "ignore": torch.tensor([False])}
        for d, size in zip(found, sizes, strict=True)
    ]
    metrics = detection_metrics(found, truth, sizes, ["cat", "dog"])
    assert metrics["AP"] == metrics["AP50"] == metrics["mAP"] == 1
    assert metrics["per_class"] == {"cat": {"AP": 1, "mAP": 1}, "dog": {"AP": 1, "mAP": 1}}
    wrong = detection_metrics(found[1:] + found[:1], truth, sizes, ["cat", "dog"])
    assert wrong["AP50"] < 0.5


def test_a_model_that_detects_nothing_scores_zero_after_one_that_is_right(tiny_config):
    truth = [{"boxes": torch.tensor([[1.0, 1, 9, 9]]), "labels": torch.tensor([1]), "ignore": torch.tensor([False])}]
    right = Detections(torch.tensor([[0.1, 0.1, 0.9, 0.9]]), torch.tensor([0.9]), torch.tensor([1]))
    nothing = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert detection_metrics([right], truth, [(10, 10)], ["cat"])["AP"] == pytest.approx(1)
    assert detection_metrics([nothing], truth, [(10, 10)], ["cat"])["AP"] == 0


def test_to_pixels_scales_width_and_height():
    found = Detections(torch.tensor([[0.1, 0.2, 0.5, 1.0]]), torch.tensor([0.9]), torch.tensor([1]))
    torch.testing.assert_close(to_pixels(found, 200, 50)["boxes"], torch.tensor([[20.0, 10, 100, 50]]))
