"""The detectors: extraction equals the elastic network, costs against a slow count, BatchNorm folding, reading back."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import (
    MobileNet_V2_Weights,
    MobileNet_V3_Large_Weights,
    mobilenet_v2,
    mobilenet_v3_large,
)

from lib import UserError, checkpoint
from lib.config import Config
from lib.config_io import to_dict
from lib.detector import (
    Cost,
    ElasticSSD,
    Normalize,
    detect,
    detector_checkpoint,
    fuse,
    load_detector,
    load_supernet,
    load_weights,
    module_cost,
    recalibrate,
)
from lib.elastic import SamePadConv2d
from lib.losses import DetectionLoss
from lib.metrics import detection_metrics, to_pixels
from lib.priors import priors_per_cell
from lib.training import Trainer

CPU = torch.device("cpu")

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
    "taps in expansions": {
        "backbone__feature_taps": "expansion",
        "head__extra_activation": True,
        "head__clip": "sizes",
    },
    "elastic head": {"search_space__head_width_choice": [0.25, 0.5], "search_space__head_kernel_choice": [3, 5]},
}
variants = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())


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
    with pytest.raises(UserError, match="backbone type is 'mbv2_backbone'"):
        tiny_detector().extract(other)


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


def slow_cost(model: nn.Module, x: torch.Tensor) -> Cost:
    """torch's own counter, by running the model on data; it counts a multiplication and an addition as two."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(x)
    return Cost(counter.get_total_flops() // 2, sum(p.numel() for p in model.parameters()))


@variants
def test_cost_is_that_of_the_extract(tiny_detector, changes):
    detector = tiny_detector(**changes, search_space__image_size_choice=[64, 96])
    genotypes = some_genotypes(detector.space, 1)
    costs = [detector.cost(genotype) for genotype in genotypes]
    for genotype, cost in zip(genotypes, costs, strict=True):
        x = torch.zeros(1, 3, genotype.image_size, genotype.image_size)
        assert cost == slow_cost(detector.extract(genotype), x)
        assert detector.cost(genotype) == cost  # looked up, not added up
    smallest, largest, other = costs
    assert smallest.flops < other.flops < largest.flops
    assert smallest.params < other.params < largest.params


def test_cost_grows_with_the_image(tiny_detector):
    detector = tiny_detector(search_space__image_size_choice=[64, 128])
    genotype = detector.space.largest()
    small, large = (detector.cost(replace(genotype, image_size=size)) for size in (64, 128))
    assert small.params == large.params and 3 < large.flops / small.flops < 4.1


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
    for net in detector.predictors.classes:
        nn.init.zeros_(net[-1].bias)
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


def test_recalibration_is_the_average_over_batches_whatever_was_there():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3)
    norm.running_mean.fill_(7.0)
    batches = [3 * torch.randn(5, 3, 4, 4) + 2, torch.randn(5, 3, 4, 4), torch.rand(5, 3, 4, 4)]
    recalibrate(norm, batches, CPU)
    mean = torch.stack([b.mean((0, 2, 3)) for b in batches]).mean(0)
    variance = torch.stack([b.transpose(0, 1).flatten(1).var(1) for b in batches]).mean(0)  # unbiased
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, variance)
    assert norm.momentum == 0.1  # as it was, for training that may follow


def test_recalibration_changes_no_weight(tiny_detector):
    detector = tiny_detector()
    model = detector.extract(detector.space.largest())
    before = copy.deepcopy(dict(model.named_parameters()))
    recalibrate(model, [torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)], CPU)
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
    found = detect(model, images.split(2), tiny_config(), CPU)
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


@pytest.mark.parametrize(
    ("make", "weights"),
    [
        (mobilenet_v2, MobileNet_V2_Weights.IMAGENET1K_V1),
        (mobilenet_v3_large, MobileNet_V3_Large_Weights.IMAGENET1K_V1),
    ],
    ids=["mobilenet_v2", "mobilenet_v3_large"],
)
def test_published_numbers(make, weights):
    model = make()
    cost, output = module_cost(model, (1, 3, 224, 224))
    assert cost.params == weights.meta["num_params"]
    assert cost.flops / 1e9 == pytest.approx(weights.meta["_ops"], abs=6e-4)  # given in three digits
    assert output.shape == (1, 1000)
    assert cost == slow_cost(model, torch.zeros(1, 3, 224, 224))


@pytest.mark.parametrize("groups", [1, 4])
def test_one_convolution_by_hand(groups):
    cost, output = module_cost(nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=groups), (1, 8, 9, 9))
    assert output.shape == (1, 12, 5, 5)
    assert cost == Cost(12 * 5 * 5 * 9 * 8 // groups, 12 * 9 * 8 // groups + 12)


def test_counting_leaves_the_module_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    module_cost(model, (1, 3, 4, 4))
    assert model.training
    assert model[0].weight.device.type == "cpu"
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("changes", [{}, {"backbone__padding": "tf_same", "head__predictor": "plain"}])
def test_a_fused_detector_computes_the_same(tiny_detector, changes):
    detector = tiny_detector(**changes)
    images = torch.randint(0, 256, (2, 3, 80, 100), dtype=torch.uint8)
    for genotype in (detector.space.smallest(), detector.space.largest()):
        plain = detector.extract(genotype)
        fused = fuse(plain)
        assert any(isinstance(m, nn.BatchNorm2d) for m in plain.modules())
        assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
        with torch.no_grad():
            for found, expected in zip(fused(images), plain(images), strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_padding_convolution_stays_one():
    """TensorFlow's padding is asymmetric: folded into an ordinary convolution, it would shift the picture."""
    model = nn.Sequential(SamePadConv2d(3, 4, 3, 2, bias=False), nn.BatchNorm2d(4)).eval()
    fused = fuse(model)
    x = torch.rand(1, 3, 8, 8)
    assert len(fused) == 1 and isinstance(fused[0], SamePadConv2d)
    torch.testing.assert_close(fused(x), model(x))


def test_only_a_convolution_right_before_is_folded():
    norm_first = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4))
    for module in norm_first.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(0.1, 1)
    fused = fuse(norm_first)
    assert len(fused) == 4 and norm_first.training and not fused.training
    x = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(fused(x), norm_first.eval()(x))


def test_in_place_gives_what_the_copy_gives():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model[1].running_mean.uniform_(0.1, 1)
    copied = fuse(model)
    assert fuse(model, inplace=True) is model and len(model) == 2 and not model.training
    x = torch.rand(2, 3, 6, 6)
    assert torch.equal(model(x), copied(x))


CLASSES = ["cat", "dog", "eel"]


@pytest.fixture
def supernet(tiny_detector, tiny_config, tmp_path):
    """A detector and its checkpoint, written as supernet_train.py writes it, two epochs done."""
    config, detector = tiny_config(), tiny_detector()
    trainer = Trainer(detector, config.supernet, CPU, 4)
    trainer.epoch, trainer.step = 3, 8
    path = tmp_path / "last.pt"
    checkpoint.save(path, {**trainer.state_dict(), "config": to_dict(config), "classes": CLASSES})
    return detector, path


def change(path, **values):
    payload = checkpoint.read(path)
    checkpoint.save(path, {**payload, **values})


@pytest.mark.parametrize("mmap", [False, True])
def test_a_supernet_comes_back(supernet, tiny_config, mmap):
    detector, path = supernet
    loaded = load_supernet(path, mmap)
    assert loaded.classes == tuple(CLASSES) and loaded.epoch == 2 and loaded.config == tiny_config()
    state = loaded.detector.state_dict()
    assert all(torch.equal(t, state[name]) for name, t in detector.state_dict().items())


@pytest.mark.parametrize(("epoch", "batch", "trained", "widths"), [(2, 0, 1, (6,)), (2, 3, 2, (3, 6)), (1, 2, 1, (6,))])
def test_a_supernets_space_is_that_of_the_last_epoch_it_trained(supernet, epoch, batch, trained, widths):
    """Narrow blocks open at epoch 2: before, no search may use them."""
    _, path = supernet
    change(path, epoch=epoch, batch=batch)
    loaded = load_supernet(path)
    assert loaded.epoch == trained and loaded.space.stages[1].block.expand == widths
    assert loaded.detector.space.stages[1].block.expand == (3, 6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_supernet_that_diverged_is_refused(supernet, value):
    """By everything that reads one: a search, another supernet that starts from it, a final training."""
    detector, path = supernet
    with torch.no_grad():
        detector.predictors.boxes[0][-1].bias[2] = value
    change(path, model=detector.state_dict())
    with pytest.raises(UserError, match=r"last\.pt: predictors\.boxes.*bias is not finite: its training diverged"):
        load_supernet(path)


def test_the_moving_average_is_what_is_loaded(tiny_detector, tiny_config, tmp_path):
    config, detector = tiny_config(supernet__ema_decay=0.9), tiny_detector()
    trainer = Trainer(detector, config.supernet, CPU, 4)
    with torch.no_grad():
        trainer.averaged.predictors.boxes[0][-1].bias.fill_(42.0)
    path = tmp_path / "last.pt"
    checkpoint.save(path, {**trainer.state_dict(), "config": to_dict(config), "classes": CLASSES})
    assert (load_supernet(path).detector.predictors.boxes[0][-1].bias == 42).all()


def test_a_detector_comes_back_in_evaluation_mode(tiny_detector, tiny_config, tmp_path):
    detector = tiny_detector()
    genotype = detector.space.smallest()
    model, path = detector.extract(genotype).eval(), tmp_path / "best.pt"
    payload = {
        "model": model.state_dict(),
        "config": to_dict(tiny_config()),
        "genotype": genotype.to_dict(),
        "classes": CLASSES,
        "category_ids": [1, 7, 9],
        "epoch": 5,
    }
    checkpoint.save(path, payload)
    loaded = load_detector(path)
    assert (loaded.genotype, loaded.classes, loaded.category_ids) == (genotype, tuple(CLASSES), (1, 7, 9))
    assert loaded.epoch == 5 and not any(m.training for m in loaded.model.modules())
    x = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        assert all(map(torch.equal, loaded.model(x), model(x)))
    with pytest.raises(UserError, match=r"best\.pt: not a supernet's checkpoint; expected last\.pt of supernet_train"):
        load_supernet(path)


def test_what_is_a_detectors_checkpoint(supernet, tiny_checkpoint, tmp_path):
    assert detector_checkpoint(tiny_checkpoint) == detector_checkpoint(tiny_checkpoint.parent) == tiny_checkpoint
    assert [detector_checkpoint(path) for path in (supernet[1], tmp_path, tmp_path / "nowhere")] == [None] * 3


def test_a_supernet_is_no_detector(supernet):
    with pytest.raises(UserError, match=r"last\.pt: not a detector's checkpoint; expected best\.pt of final_train"):
        load_detector(supernet[1])


@pytest.mark.parametrize("content", [None, b"", b"not a checkpoint"], ids=["missing", "empty", "text"])
def test_a_file_that_is_no_checkpoint_is_named_in_one_line(tmp_path, content):
    path = tmp_path / "odd.pt"
    if content is not None:
        path.write_bytes(content)
    for load in (load_supernet, load_detector):
        with pytest.raises(UserError, match=r"odd\.pt: ") as caught:
            load(path)
        assert "\n" not in str(caught.value)


def test_weights_of_another_network_are_refused_in_one_line(supernet, tiny_detector):
    _, path = supernet
    other = tiny_detector(backbone__mult_ratio=0.25)
    with pytest.raises(UserError, match=r"last\.pt: does not fit the configured network: .*size mismatch") as caught:
        load_weights(other, checkpoint.read(path), path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
