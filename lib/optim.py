"""Optimizer, learning-rate schedule and moving average of the weights, from a configuration."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lib.config import LRScheduleConfig, TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig, backbone_lr: float | None = None) -> torch.optim.Optimizer:
    """SGD or AdamW; `backbone_lr` gives the parameters below `backbone.` a learning rate of their own."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        lr = config.learning_rate if backbone_lr is None or not name.startswith("backbone.") else backbone_lr
        decay = config.weight_decay if config.decay_norm_and_bias or parameter.ndim > 1 else 0.0
        groups.setdefault((lr, decay), []).append(parameter)
    params = [{"params": p, "lr": lr, "weight_decay": decay} for (lr, decay), p in groups.items()]
    if config.optimizer == "sgd":
        return torch.optim.SGD(params, lr=config.learning_rate, momentum=config.momentum)
    return torch.optim.AdamW(params, lr=config.learning_rate)


def build_scheduler(
    optimizer: torch.optim.Optimizer, config: TrainConfig, steps_per_epoch: int, restarts: Sequence[int]
) -> torch.optim.lr_scheduler.LambdaLR:
    """A schedule that moves with every step; `restarts` are the epochs (from 1) at which `T_0: auto` begins anew."""
    make = {"constant": _constant, "cosine": _cosine, "cosine_restarts": _cosine_restarts, "multistep": _multistep}
    shape = make[config.lr_schedule.type](config.lr_schedule, config.epochs, restarts)
    warmup = config.lr_schedule.warmup_steps

    def factor(base: float) -> Callable[[int], float]:
        floor = config.lr_schedule.eta_min / base if base else 0.0

        def at(step: int) -> float:
            decayed = shape(step / steps_per_epoch)
            if config.lr_schedule.type.startswith("cosine"):
                decayed = floor + (1 - floor) * decayed
            return decayed * min(1.0, (step + 1) / (warmup + 1))

        return at

    return torch.optim.lr_scheduler.LambdaLR(optimizer, [factor(group["lr"]) for group in optimizer.param_groups])


def _constant(_config: LRScheduleConfig, _epochs: int, _restarts: Sequence[int]) -> Callable[[float], float]:
    return lambda epoch: 1.0


def _cosine(_config: LRScheduleConfig, epochs: int, _restarts: Sequence[int]) -> Callable[[float], float]:
    return lambda epoch: 0.5 * (1 + math.cos(math.pi * min(epoch / epochs, 1)))


def _cosine_restarts(config: LRScheduleConfig, epochs: int, restarts: Sequence[int]) -> Callable[[float], float]:
    """SGDR (Loshchilov and Hutter, ICLR 2017, eq. 5) with equal periods, or from one restart to the next."""
    starts = [e - 1 for e in restarts] if config.T_0 == "auto" else list(range(0, epochs, config.T_0))
    ends = [*starts[1:], epochs if config.T_0 == "auto" else starts[-1] + config.T_0]

    def at(epoch: float) -> float:
        i = bisect.bisect_right(starts, epoch) - 1
        return 0.5 * (1 + math.cos(math.pi * min((epoch - starts[i]) / (ends[i] - starts[i]), 1)))

    return at


def _multistep(config: LRScheduleConfig, _epochs: int, _restarts: Sequence[int]) -> Callable[[float], float]:
    milestones = sorted(config.milestones)
    return lambda epoch: config.gamma ** bisect.bisect_right(milestones, epoch)


def build_ema(model: nn.Module, decay: float) -> AveragedModel:
    """Moving average of weights and buffers; early on the decay is (1 + n) / (10 + n), to forget the start."""

    @torch.no_grad()
    def update(averages: Sequence[Tensor], values: Sequence[Tensor], n: Tensor | int) -> None:
        keep = min(decay, (1 + int(n)) / (10 + int(n)))
        if torch.is_floating_point(averages[0]):
            torch._foreach_lerp_(list(averages), list(values), 1 - keep)
        else:
            for average, value in zip(averages, values, strict=True):
                average.copy_(value)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)
