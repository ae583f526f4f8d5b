from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lib import final_training
from lib.config import TrainConfig
from lib.detector import detect, recalibrate
from lib.errors import UserError
from lib.losses import DetectionLoss
from lib.metrics import detection_metrics, to_pixels
from lib.postprocess import Detections
from lib.training import Trainer, train_epoch

CPU = torch.device("cpu")


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))


def trainer(model, **options):
    return Trainer(model, TrainConfig(**{"epochs": 3, "learning_rate": 0.1, **options}), CPU, batches_per_epoch=4)


def inputs(seed=0, count=4):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def losses_of(model, *seeds):
    for seed in seeds:
        out = model(inputs(seed))
        yield {"a": out.square().mean(), "b": (out - 1).abs().mean()}


def states_equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(states_equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(states_equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# ------------------------------------------------------------------------------------------------------------- update


def test_an_update_equals_one_backward_on_the_sum():
    model, other = network(), network()
    t = trainer(model, momentum=0.9, weight_decay=1e-3)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    for step in range(2):
        seeds = [10 * step, 10 * step + 1, 10 * step + 2]
        reported = t.update(losses_of(model, *seeds))
        items = list(losses_of(other, *seeds))
        optimizer.param_groups[0]["lr"] = 0.1 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / 12))).item()
        optimizer.zero_grad()
        sum(sum(item.values()) for item in items).backward()
        optimizer.step()
        assert reported["a"] == pytest.approx(sum(item["a"].item() for item in items))
        assert reported.keys() == {"a", "b"}
    assert t.step == 2
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_each_loss_is_back_propagated_before_the_next_is_computed():
    """So that one graph at a time is in memory."""
    model = network()
    t, seen = trainer(model), []

    def losses():
        for seed in range(3):
            seen.append(model[0].weight.grad is not None)
            yield {"a": model(inputs(seed)).square().mean()}

    t.update(losses())
    assert seen == [False, True, True]


@pytest.mark.parametrize("options", [{}, {"optimizer": "adamw", "clip_grad_norm": 1.0}])
def test_accumulated_batches_are_one_step_on_their_mean(options):
    """Four batches an epoch in threes: one step on three batches, one on the last, again in the next epoch."""
    model, other = network(), network()
    for net in (model, other):
        net[1].eval()
    gathering, plain = trainer(model, accumulate=3, **options), trainer(other, **options)
    plain.scheduler = gathering.scheduler = torch.optim.lr_scheduler.LambdaLR(plain.optimizer, lambda step: 1.0)
    for epoch in range(2):
        for group in ([0, 1, 2], [3]):
            for seed in group:
                before = [p.clone() for p in model.parameters()]
                gathering.update(losses_of(model, 10 * epoch + seed))
                moved = not all(map(torch.equal, before, model.parameters()))
                assert moved == (seed == group[-1])
            whole = [item for seed in group for item in losses_of(other, 10 * epoch + seed)]
            plain.batch = 0
            plain.update(iter([{"sum": sum(sum(item.values()) for item in whole) / len(group)}]))
            torch.testing.assert_close(list(model.parameters()), list(other.parameters()))
    assert (gathering.step, gathering.epoch, gathering.batch) == (4, 3, 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_named_and_changes_no_weight(value):
    model = network()
    t, before = trainer(model), copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=r"epoch 1, step 0: the loss 'loc' is -?(nan|inf).*learning_rate"):
        t.update(iter([{"cls": model[4].weight.sum(), "loc": model[4].weight.sum() * value}]))
    assert t.step == 0 and states_equal(before, model.state_dict())


def test_clipping_bounds_the_norm_of_the_gradient():
    norms = []
    for limit in (0.0, 1.0):
        model = network()
        t = trainer(model, clip_grad_norm=limit, momentum=0.0, weight_decay=0.0)
        before = [p.detach().clone() for p in model.parameters()]
        t.update({"a": 100 * item["a"]} for item in losses_of(model, 0))
        change = [(b - p).flatten() / 0.1 for b, p in zip(before, model.parameters(), strict=True)]
        norms.append(torch.cat(change).norm().item())
    assert norms[0] > 10 and norms[1] == pytest.approx(1, rel=1e-3)


def test_bf16_computes_in_bf16_and_keeps_the_weights_in_fp32():
    model, dtypes = network(), []
    model[0].register_forward_hook(lambda _m, _i, output: dtypes.append(output.dtype))
    t = trainer(model, precision="bf16")
    before = model[0].weight.detach().clone()
    t.update(losses_of(model, 0, 1))
    assert dtypes == [torch.bfloat16] * 2 and model[0].weight.dtype == torch.float32
    assert not torch.equal(before, model[0].weight) and not t.scaler.is_enabled()


def test_fp16_scales_the_loss_and_clips_the_true_gradient():
    """The scaled gradient is 256 times larger: clipped before it is unscaled, the step would be nothing."""
    half, single = network(), network()
    for model, precision in ((half, "fp16"), (single, "fp32")):
        t = trainer(model, precision=precision, clip_grad_norm=0.1)
        t.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=precision == "fp16")
        for seed in range(3):
            t.update(losses_of(model, seed))
    start = network()
    for a, b, before in zip(half.parameters(), single.parameters(), start.parameters(), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a - before, b - before, rtol=0.05, atol=2e-4)
    assert (single[4].weight - start[4].weight).abs().max() > 2e-3


@pytest.mark.filterwarnings("error:Detected call of")
def test_an_overflow_in_fp16_skips_the_step_and_halves_the_scale():
    model = network()
    t, before = trainer(model, precision="fp16"), copy.deepcopy(model.state_dict())
    t.update(iter([{"a": model[4].weight.sum() * 1e37}]))
    assert torch.equal(model[4].weight, before["4.weight"]) and t.scaler.get_scale() == 32768 and t.step == 1
    t.update(losses_of(model, 0))
    assert not torch.equal(model[4].weight, before["4.weight"])


def test_the_moving_average_follows_the_weights():
    model = network()
    t = trainer(model, ema_decay=0.5)
    assert t.averaged is not model and trainer(network()).averaged is not None
    for seed in range(4):
        t.update(losses_of(model, seed))
    distance = (t.averaged[4].weight - model[4].weight).abs().max()
    assert 0 < distance < (network()[4].weight - model[4].weight).abs().max()


@pytest.mark.parametrize("options", [{}, {"optimizer": "adamw"}, {"ema_decay": 0.9}, {"clip_grad_norm": 1.0}])
def test_a_restored_trainer_goes_on_bit_by_bit(options):
    model = network()
    whole = trainer(model, **options)
    for seed in range(3):
        whole.update(losses_of(model, seed))
    state = copy.deepcopy(whole.state_dict())
    other = network(seed=1)
    resumed = trainer(other, **options)
    resumed.load_state_dict(state)
    for t, m in ((whole, model), (resumed, other)):
        for seed in (3, 4):
            t.update(losses_of(m, seed))
    assert (resumed.epoch, resumed.batch, resumed.step) == (2, 1, 5)
    a, b = whole.state_dict(), resumed.state_dict()
    del a["random"], b["random"]  # making `other` drew numbers
    assert states_equal(a, b)


# -------------------------------------------------------------------------------------------------------- train_epoch


class Loader(list):
    """Four batches of which each knows `to`."""

    def __init__(self, start=0):
        super().__init__(SimpleNamespace(to=lambda _device, i=i: i) for i in range(start, 4))


def test_an_epoch_counts_its_batches_and_averages_its_losses():
    model = network()
    t, stop = trainer(model), SimpleNamespace(requested=False, agree=lambda: None)
    means = train_epoch(t, Loader(), lambda i: iter([{"a": model[4].weight.sum() * 0 + float(i)}]), stop)
    assert means == {"a": 1.5} and (t.epoch, t.batch, t.step) == (2, 0, 4)


@pytest.mark.parametrize(("stop_after", "position"), [(0, (1, 1)), (2, (1, 3)), (3, (2, 0))])
def test_a_stop_ends_the_epoch_after_its_step(stop_after, position):
    """On the last batch nothing is left to stop: the epoch is over."""
    model = network()
    t, stop = trainer(model), SimpleNamespace(requested=False, agree=lambda: None)

    def forward(i):
        stop.requested = i == stop_after
        return losses_of(model, i)

    train_epoch(t, Loader(), forward, stop)
    assert (t.epoch, t.batch) == position


def test_a_stop_waits_for_the_batches_that_share_a_step():
    model = network()
    t, stop = trainer(model, accumulate=2), SimpleNamespace(requested=True, agree=lambda: None)
    train_epoch(t, Loader(), lambda batch: losses_of(model, 0), stop)
    assert (t.epoch, t.batch, t.step) == (1, 2, 1)


# -------------------------------------------------------------------------------------------------------- recalibrate


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


# --------------------------------------------------------------------------------------------------- detect, measure


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


def test_a_model_that_detects_nothing_scores_zero_after_one_that_is_right(tiny_config):
    truth = [{"boxes": torch.tensor([[1.0, 1, 9, 9]]), "labels": torch.tensor([1]), "ignore": torch.tensor([False])}]
    right = Detections(torch.tensor([[0.1, 0.1, 0.9, 0.9]]), torch.tensor([0.9]), torch.tensor([1]))
    nothing = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert detection_metrics([right], truth, [(10, 10)], ["cat"])["AP"] == pytest.approx(1)
    assert detection_metrics([nothing], truth, [(10, 10)], ["cat"])["AP"] == 0


def test_to_pixels_scales_width_and_height():
    found = Detections(torch.tensor([[0.1, 0.2, 0.5, 1.0]]), torch.tensor([0.9]), torch.tensor([1]))
    torch.testing.assert_close(to_pixels(found, 200, 50)["boxes"], torch.tensor([[20.0, 10, 100, 50]]))


# ------------------------------------------------------------------------------------------------------------- freeze


def test_a_frozen_base_net_keeps_its_statistics_and_has_its_own_learning_rate(tiny_detector, tiny_config):
    config = tiny_config(final__freeze_base_net=True, final__weight_decay=0)
    detector = tiny_detector().train()
    model = detector.extract(detector.space.smallest())
    t = Trainer(model, config.final, CPU, 4, backbone_lr=0.0)
    model.train()
    final_training.freeze_norms(model.backbone)
    before = copy.deepcopy(model.state_dict())
    loss = DetectionLoss(config.loss)
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    targets = loss.match(torch.rand(4, 1, 4).sort(-1).values, torch.ones(4, 1, dtype=torch.int64), model.priors)
    t.update(iter([loss(*model(images), targets)]))
    changed = {
        name.split(".")[0] for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert changed == {"extras", "predictors"}
