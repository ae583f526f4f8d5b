"""Learning rates against torch's schedulers, the moving average and the step against slow loops."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, CosineAnnealingWarmRestarts, MultiStepLR

from lib.config import LRScheduleConfig, TrainConfig
from lib.training import MOST_OVERFLOWS, Diverged, MovingAverage, Trainer, build_optimizer, build_scheduler

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
    ema, slow = MovingAverage(model, 0.6), None
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
        assert torch.allclose(averaged[name], value, atol=1e-5) or not value.is_floating_point(), name
    assert not torch.allclose(averaged["head.weight"], model.head.weight)


def test_the_average_is_no_alias_of_the_model():
    model = Net()
    ema = MovingAverage(model, 0.9)
    ema.update_parameters(model)
    before = ema.module.head.weight.clone()
    nn.init.zeros_(model.head.weight)
    assert torch.equal(ema.module.head.weight, before)


# The step

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


def test_an_update_equals_one_backward_on_the_sum():
    model, other = network(), network()
    t = trainer(model, momentum=0.9, weight_decay=1e-3)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    for step in range(2):
        seeds = [10 * step, 10 * step + 1, 10 * step + 2]
        (reported,) = t.update(losses_of(model, *seeds))
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
    with pytest.raises(Diverged, match=r"epoch 1, step 0: the loss 'loc' is -?(nan|inf).*learning_rate"):
        t.update(iter([{"cls": model[4].weight.sum(), "loc": model[4].weight.sum() * value}]))
    assert t.step == 0 and states_equal(before, model.state_dict())


def test_losses_that_are_read_later_are_the_same_and_one_that_is_not_finite_is_named():
    """As a GPU's are."""
    models = network(), network()
    now, later = map(trainer, models)
    later._read_every = 3
    read = [
        [t.update(losses_of(model, seed)) for seed in range(4)] for t, model in zip((now, later), models, strict=True)
    ]
    assert list(map(len, read[1])) == [0, 0, 3, 0]
    assert [*itertools.chain(*read[0])] == [*itertools.chain(*read[1]), *later.read_losses()]
    later.update(iter([{"loc": models[1][4].weight.sum() * math.nan}]))
    later.update(losses_of(models[1], 0))
    with pytest.raises(Diverged, match=r"epoch 2, step 4: the loss 'loc' is nan"):
        later.read_losses()


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


def overflowing(model, seed):
    """A forward pass in which an activation overflows, before BatchNorm."""
    yield {"a": model(inputs(seed) * 1e30).square().mean()}


@pytest.mark.filterwarnings("error:Detected call of")
def test_a_forward_pass_that_overflows_in_fp16_skips_the_step_and_leaves_no_trace():
    """Neither in the weights nor in BatchNorm's statistics, which would be infinite for good."""
    model = network()
    t = trainer(model, precision="fp16")
    t.update(losses_of(model, 0))
    before, scale = copy.deepcopy(model.state_dict()), t.scaler.get_scale()
    assert t.update(overflowing(model, 1)) == []
    assert states_equal(model.state_dict(), before) and (t.step, t.batch) == (2, 2)
    assert t.scaler.get_scale() == scale / 2
    assert t.update(losses_of(model, 2)) and not torch.equal(model[4].weight, before["4.weight"])


def test_one_of_several_accumulated_batches_that_overflows_skips_their_step():
    model = network()
    t = trainer(model, precision="fp16", accumulate=2)
    before = copy.deepcopy(model.state_dict())
    t.update(losses_of(model, 0))
    t.update(iter([{"a": model[4].weight.sum() * 0 + float("inf")}]))  # a loss of infinity with a finite gradient
    assert states_equal(model.state_dict(), before) and t.step == 1 and t.scaler.get_scale() == 32768


def test_many_overflows_in_a_row_end_the_training_and_any_good_batch_starts_the_count_again():
    model = network()
    t = trainer(model, precision="fp16")
    for _ in range(MOST_OVERFLOWS):
        t.update(overflowing(model, 0))
    t.update(losses_of(model, 0))
    for _ in range(MOST_OVERFLOWS):
        t.update(overflowing(model, 0))
    with pytest.raises(Diverged, match=rf"the loss 'a' is (nan|inf) for the {MOST_OVERFLOWS + 1}th time in a row"):
        t.update(overflowing(model, 0))


def test_a_failed_step_is_taken_back(monkeypatch):
    """Its batches are done again, with BatchNorm's statistics as they were; a step that is over stays."""
    model = network()
    t = trainer(model, accumulate=2)
    for seed in (0, 1):
        t.update(losses_of(model, seed))
    done = copy.deepcopy(model.state_dict())
    assert t.rewind() and states_equal(model.state_dict(), done) and t.batch == 2
    t.update(losses_of(model, 2))
    assert t.batch == 3 and not states_equal(model.state_dict(), done)
    assert t.rewind() and states_equal(model.state_dict(), done) and t.batch == 2

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(t.optimizer, "step", fail)
    with pytest.raises(MemoryError):
        for seed in (2, 3):
            t.update(losses_of(model, seed))
    assert not t.rewind()  # some weights may have changed


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


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_rates_decay_and_momentum_changed_on_resume_hold_from_the_first_step(optimizer):
    """A step after them equals that of a trainer that had them all along, with the same momentum gathered so far."""
    model, other = network(), network()
    whole = trainer(model, optimizer=optimizer)
    whole.update(losses_of(model, 0))
    resumed = trainer(other, optimizer=optimizer, learning_rate=0.02, weight_decay=0.3, momentum=0.5)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    group = whole.optimizer.param_groups[0]
    group |= {"lr": group["lr"] * 0.2, "weight_decay": 0.3} | ({"momentum": 0.5} if optimizer == "sgd" else {})
    assert resumed.optimizer.param_groups[0]["lr"] == pytest.approx(group["lr"])
    for t, m in ((whole, model), (resumed, other)):
        t.update(losses_of(m, 1))
    torch.testing.assert_close(list(model.parameters()), list(other.parameters()))


@pytest.mark.parametrize("schedule", [{"type": "cosine"}, {"type": "multistep", "milestones": [5, 8]}])
@pytest.mark.parametrize(("batches", "accumulate", "batch_size"), [(2, 1, 4), (8, 1, 1), (4, 2, 2), (2, 2, 4)])
def test_the_schedule_goes_on_at_the_same_place_of_the_epoch(schedule, batches, accumulate, batch_size):
    """Half of epoch 6 of 10 is done, 2 batches of 2; then in batches of `batch_size`, `accumulate` to a step."""

    def make(batches_per_epoch, **options):
        config = train_config(epochs=10, **schedule)
        for name, value in options.items():
            setattr(config, name, value)
        return Trainer(network(), config, CPU, batches_per_epoch)

    state = make(4, batch_size=2).state_dict() | {"epoch": 6, "batch": 2, "step": 22}
    state["scheduler"] = {"last_epoch": 22}
    resumed = make(batches, accumulate=accumulate, batch_size=batch_size)
    resumed.load_state_dict(state, batch_size=2)
    assert resumed.epoch == 6 and resumed.batch * batch_size in (4, 0) and resumed.batch % accumulate == 0
    rate = resumed.optimizer.param_groups[0]["lr"]
    epoch = 5 + resumed.batch / batches
    cosine = 0.4 * 0.5 * (1 + math.cos(math.pi * epoch / 10))
    assert rate == pytest.approx(cosine if schedule["type"] == "cosine" else 0.4 * 0.1)
    for _ in range(5 * batches - resumed.batch):
        resumed.update(losses_of(resumed.model, 0))
    if schedule["type"] == "cosine":  # at the end, and not before, it has fallen to nothing
        assert resumed.optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


def test_the_groups_of_the_optimizer_depend_on_roles_and_not_on_rates():
    def sizes(**options):
        config = TrainConfig(decay_norm_and_bias=False, **options)
        return [len(group["params"]) for group in build_optimizer(Net(), config).param_groups]

    assert sizes(learning_rate=0.1, backbone_learning_rate=0.1) == sizes(backbone_learning_rate=0.2, weight_decay=0.0)
    assert len(sizes(backbone_learning_rate=0.2)) == 4 and len(sizes()) == 2
