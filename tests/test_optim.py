"""Learning rates against torch's schedulers, parameter groups, the moving average against a slow loop."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, CosineAnnealingWarmRestarts, MultiStepLR

from lib.config import LRScheduleConfig, TrainConfig
from lib.training import build_ema, build_optimizer, build_scheduler

STEPS = 4  # per epoch


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(x))


def train_config(epochs: int = 12, learning_rate: float = 0.4, **schedule) -> TrainConfig:
    return TrainConfig(epochs=epochs, learning_rate=learning_rate, lr_schedule=LRScheduleConfig(**schedule))


def rates(config: TrainConfig, restarts=(1,), backbone_lr: float | None = None, group: int = 0) -> list[float]:
    """The learning rate of every step of a training."""
    optimizer = build_optimizer(Net(), config, backbone_lr)
    scheduler = build_scheduler(optimizer, config, STEPS, restarts)
    seen = []
    for _ in range(config.epochs * STEPS):
        seen.append(optimizer.param_groups[group]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def oracle(make, steps: int, lr: float = 0.4, fractions: bool = False) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = make(optimizer)
    seen = []
    for step in range(steps):
        if fractions:
            scheduler.step(step / STEPS)
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if not fractions:
            scheduler.step()
    return seen


@pytest.mark.parametrize("eta_min", [0.0, 0.1])
def test_cosine(eta_min):
    expected = oracle(lambda o: CosineAnnealingLR(o, 12 * STEPS, eta_min), 12 * STEPS)
    assert rates(train_config(type="cosine", eta_min=eta_min)) == pytest.approx(expected)


@pytest.mark.parametrize("eta_min", [0.0, 0.1])
@pytest.mark.parametrize("period", [3, 5, 12, 20])
def test_cosine_restarts(period, eta_min):
    """A period that does not divide the epochs, or is longer than them, is cut off, not stretched."""
    make = lambda o: CosineAnnealingWarmRestarts(o, period, eta_min=eta_min)  # noqa: E731
    expected = oracle(make, 12 * STEPS, fractions=True)
    assert rates(train_config(type="cosine_restarts", T_0=period, eta_min=eta_min)) == pytest.approx(expected)


@pytest.mark.parametrize("milestones", [[], [2, 5], [5, 2], [0, 11]])
def test_multistep(milestones):
    make = lambda o: MultiStepLR(o, [m * STEPS for m in milestones], gamma=0.5)  # noqa: E731
    expected = oracle(make, 12 * STEPS)
    assert rates(train_config(type="multistep", milestones=milestones, gamma=0.5)) == pytest.approx(expected)


def test_constant():
    assert rates(train_config(type="constant")) == [0.4] * 12 * STEPS


def test_automatic_restarts_at_the_phases():
    """Full rate at the first step of epochs 1, 5 and 9; just before each, and at the end, next to eta_min."""
    seen = rates(train_config(type="cosine_restarts", T_0="auto", eta_min=0.01), restarts=[1, 5, 9])
    for epoch in (1, 5, 9):
        assert seen[(epoch - 1) * STEPS] == pytest.approx(0.4)
    for epoch in (5, 9, 13):
        assert 0.01 < seen[(epoch - 1) * STEPS - 1] < 0.02
    falling = [a > b for a, b in itertools.pairwise(seen)]
    assert [i + 1 for i, down in enumerate(falling) if not down] == [4 * STEPS, 8 * STEPS]


def test_automatic_restarts_of_unequal_phases_equal_a_cosine_of_each():
    seen = rates(train_config(type="cosine_restarts", T_0="auto"), restarts=[1, 3, 12])
    parts = [oracle(lambda o, n=n: CosineAnnealingLR(o, n * STEPS), n * STEPS) for n in (2, 9, 1)]
    assert seen == pytest.approx([rate for part in parts for rate in part])


def test_warm_up_rises_to_the_schedule():
    seen = rates(train_config(type="constant", warmup_steps=7))
    assert seen[:8] == pytest.approx([0.4 * (i + 1) / 8 for i in range(8)])
    assert seen[8:] == [0.4] * (12 * STEPS - 8)
    plain, warm = rates(train_config(type="cosine")), rates(train_config(type="cosine", warmup_steps=7))
    assert warm[7:] == pytest.approx(plain[7:])
    assert warm[3] == pytest.approx(plain[3] / 2)


def test_the_backbone_has_a_rate_of_its_own_with_the_same_floor():
    config = train_config(type="cosine", eta_min=0.02)
    optimizer = build_optimizer(Net(), config, backbone_lr=0.1)
    assert [(g["lr"], len(g["params"])) for g in optimizer.param_groups] == [(0.1, 4), (0.4, 2)]
    for group, lr in ((0, 0.1), (1, 0.4)):
        expected = oracle(lambda o: CosineAnnealingLR(o, 12 * STEPS, 0.02), 12 * STEPS, lr)
        assert rates(config, backbone_lr=0.1, group=group) == pytest.approx(expected)


def test_norms_and_biases_without_decay():
    config = train_config()
    config.decay_norm_and_bias = False
    model = Net()
    groups = {g["weight_decay"]: g["params"] for g in build_optimizer(model, config).param_groups}
    assert set(groups) == {1e-4, 0.0}
    assert {id(p) for p in groups[1e-4]} == {id(model.backbone[0].weight), id(model.head.weight)}
    assert len(groups[0.0]) == 4


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_every_parameter_is_optimised_once(name, kind):
    config, model = train_config(), Net()
    config.optimizer = name
    optimizer = build_optimizer(model, config, backbone_lr=0.1)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert type(optimizer) is kind
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    assert all(group["weight_decay"] == 1e-4 for group in optimizer.param_groups)
    assert name == "adamw" or optimizer.param_groups[0]["momentum"] == 0.9


def test_moving_average_equals_a_slow_loop():
    """Weights and floating statistics. The first update copies; the decay is (1 + n) / (10 + n) up to 0.6."""
    torch.manual_seed(0)
    model = Net()
    ema, slow = build_ema(model, 0.6), None
    for n in range(25):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        model(torch.randn(4, 3, 2, 2))
        ema.update_parameters(model)
        state = copy.deepcopy(model.state_dict())
        if slow is None:
            slow = state
            continue
        keep = min(0.6, (1 + n) / (10 + n))
        for name, value in state.items():
            slow[name] = keep * slow[name] + (1 - keep) * value if value.is_floating_point() else value
    averaged = ema.module.state_dict()
    assert averaged.keys() == slow.keys()
    for name, value in slow.items():
        assert torch.allclose(averaged[name], value, atol=1e-5), name
    assert averaged["backbone.1.num_batches_tracked"] == 25
    assert not torch.allclose(averaged["head.weight"], model.head.weight)


def test_the_average_is_no_alias_of_the_model():
    model = Net()
    ema = build_ema(model, 0.9)
    ema.update_parameters(model)
    before = ema.module.head.weight.clone()
    nn.init.zeros_(model.head.weight)
    assert torch.equal(ema.module.head.weight, before)
