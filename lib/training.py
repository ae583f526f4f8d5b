"""Optimizer, learning-rate schedule and moving average of the weights, from a configuration.

The epoch loop of both trainings, and how a detector is evaluated and its BatchNorm re-estimated.
"""

from __future__ import annotations

import bisect
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from lib import checkpoint, distributed
from lib.config import Config, LRScheduleConfig, TrainConfig
from lib.datasets import Batch
from lib.distributed import synchronise_norms
from lib.errors import UserError
from lib.log import progress
from lib.losses import DetectionLoss
from lib.runtime import StopRequest


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


Losses = dict[str, Tensor]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Trainer:
    """Optimisation of one model: optimizer, schedule, precision, clipping, moving average, and where it stands.

    `epoch` and `batch` are the next ones to do (epochs from 1, batches from 0), `step` counts optimizer steps.
    In a job of several processes the weights and all that belongs to them stay the same in each; running statistics
    differ, unless BatchNorm is synchronised, and the main process's are saved.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        device: torch.device,
        batches_per_epoch: int,
        restarts: Sequence[int] = (1,),
        backbone_lr: float | None = None,
    ):
        self.model = model.to(device, memory_format=torch.channels_last)
        distributed.copy_from_main(model)
        if config.sync_batch_norm and distributed.world().size > 1:
            synchronise_norms(model)
        self.config, self.device = config, device
        self.batches_per_epoch = batches_per_epoch
        if backbone_lr is None and config.backbone_learning_rate:
            backbone_lr = config.backbone_learning_rate
        self.optimizer = build_optimizer(model, config, backbone_lr)
        steps_per_epoch = -(-batches_per_epoch // config.accumulate)
        self.scheduler = build_scheduler(self.optimizer, config, steps_per_epoch, restarts)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.ema = build_ema(model, config.ema_decay) if config.ema_decay else None
        self.epoch, self.batch, self.step = 1, 0, 0

    @property
    def averaged(self) -> nn.Module:
        """The weights to evaluate and ship: the moving average, or the model itself where there is none."""
        return self.ema.module if self.ema is not None else self.model

    @property
    def between_steps(self) -> bool:
        """Whether no batch is waiting for others to share an optimizer step with."""
        return self.batch % self.config.accumulate == 0

    def update(self, losses: Iterator[Losses]) -> dict[str, float]:
        """Back-propagate one batch: the sum of `losses`, each item before the next is computed.

        The optimizer steps after every `accumulate` batches, and after the last one of an epoch, on their mean.
        """
        if self.between_steps:
            self.optimizer.zero_grad(set_to_none=True)
        first = self.batch - self.batch % self.config.accumulate
        shared = min(self.config.accumulate, self.batches_per_epoch - first)  # batches of this optimizer step
        sums: dict[str, float] = defaultdict(float)
        dtype = PRECISIONS[self.config.precision]
        while True:
            with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
                item = next(losses, None)
            if item is None:
                break
            total = sum(item.values()) / shared
            self.scaler.scale(total).backward()
            for name, value in item.items():
                sums[name] += value.item()
        sums = distributed.mean_of(sums)
        self._check_finite(sums)
        self.batch += 1
        if self.batch == first + shared:
            self._step()
        if self.batch == self.batches_per_epoch:
            self.epoch, self.batch = self.epoch + 1, 0
        return sums

    def _step(self) -> None:
        """One optimizer step on the gradients that have gathered."""
        distributed.average_gradients(self.model.parameters())
        if self.config.clip_grad_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with warnings.catch_warnings():  # a step that overflowed in fp16 was left out; the schedule counts it
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)
            self.scheduler.step()
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        self.step += 1

    def _check_finite(self, sums: dict[str, float]) -> None:
        bad = [name for name, value in sums.items() if not math.isfinite(value)]
        if bad:
            raise UserError(
                f"epoch {self.epoch}, step {self.step}: the loss '{bad[0]}' is {sums[bad[0]]}; "
                "a lower learning_rate, warm-up (lr_schedule.warmup_steps) or clip_grad_norm may help"
            )

    def state_dict(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {"last_epoch": self.scheduler.last_epoch},
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "batch": self.batch,
            "step": self.step,
            "random": checkpoint.random_states(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.batch, self.step = state["epoch"], state["batch"], state["step"]
        self.scheduler.last_epoch = state["scheduler"]["last_epoch"]
        for group, factor in zip(self.optimizer.param_groups, self.scheduler.lr_lambdas, strict=True):
            group["lr"] = group["initial_lr"] * factor(self.scheduler.last_epoch)
        checkpoint.restore_random_states(state["random"])


def detection_loss(config: Config) -> DetectionLoss:
    """The configured loss; where several processes share a batch, by the whole batch's divisors."""
    variances = tuple(config.head.variances)
    return DetectionLoss(**vars(config.loss), variances=variances, normalizers=distributed.normalizers)


def train_epoch(
    trainer: Trainer, loader: DataLoader, forward: Callable[[Batch], Iterator[Losses]], stop: StopRequest
) -> dict[str, float]:
    """Train until the epoch ends or `stop` is requested; the mean of each loss. `loader` gives the batches left."""
    sums: dict[str, float] = defaultdict(float)
    done = 0
    bar = progress(loader, f"epoch {trainer.epoch}/{trainer.config.epochs}")
    for batch in bar:
        losses = trainer.update(forward(batch.to(trainer.device)))
        stop.agree()
        done += 1
        for name, value in losses.items():
            sums[name] += value
        bar.set_postfix({name: f"{value / done:.3f}" for name, value in sums.items()}, refresh=False)
        if stop.requested and trainer.between_steps:
            bar.close()
            break
    return {name: value / max(done, 1) for name, value in sums.items()}
