"""What both trainings share: optimizer, learning-rate schedule, moving average, training step and epoch loop."""

from __future__ import annotations

import bisect
import math
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from lib import checkpoint, distributed
from lib.config import Config, TrainConfig
from lib.datasets import Batch
from lib.errors import UserError
from lib.log import RunLog, progress, read_log
from lib.losses import DetectionLoss
from lib.runtime import StopRequest

Losses = dict[str, Tensor]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_optimizer(model: nn.Module, config: TrainConfig, backbone_lr: float | None = None) -> torch.optim.Optimizer:
    """SGD or AdamW; `backbone_lr` gives the parameters below `backbone.` a learning rate of their own."""
    if backbone_lr is None:
        backbone_lr = config.backbone_learning_rate or config.learning_rate
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        lr = backbone_lr if name.startswith("backbone.") else config.learning_rate
        decay = config.weight_decay if config.decay_norm_and_bias or parameter.ndim > 1 else 0.0
        groups.setdefault((lr, decay), []).append(parameter)
    params = [{"params": p, "lr": lr, "weight_decay": decay} for (lr, decay), p in groups.items()]
    if config.optimizer == "sgd":
        return torch.optim.SGD(params, lr=config.learning_rate, momentum=config.momentum)
    return torch.optim.AdamW(params, lr=config.learning_rate)


def build_scheduler(
    optimizer: torch.optim.Optimizer, config: TrainConfig, steps_per_epoch: int, restarts: Sequence[int]
) -> torch.optim.lr_scheduler.LambdaLR:
    """A schedule that changes with every step; `restarts` are the epochs (from 1) at which `T_0: auto` restarts."""

    def factor(step: int, floor: float) -> float:
        warm_up = min(1.0, (step + 1) / (config.lr_schedule.warmup_steps + 1))
        return warm_up * _decay(config, restarts, step / steps_per_epoch, floor)

    # eta_min is a learning rate and LambdaLR multiplies, so each group needs its own floor.
    floors = [config.lr_schedule.eta_min / group["lr"] if group["lr"] else 0.0 for group in optimizer.param_groups]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, [partial(factor, floor=floor) for floor in floors])


def _decay(config: TrainConfig, restarts: Sequence[int], epoch: float, floor: float) -> float:
    """The factor on the learning rate after `epoch` (fractional) epochs; a cosine falls from 1 to `floor`."""
    # Restarting cosines are SGDR (Loshchilov and Hutter, ICLR 2017, eq. 5), with equal periods or one per phase.
    schedule = config.lr_schedule
    if schedule.type == "constant":
        return 1.0
    if schedule.type == "multistep":
        return schedule.gamma ** sum(milestone <= epoch for milestone in schedule.milestones)
    period = config.epochs if schedule.type == "cosine" else schedule.T_0
    starts = [first - 1 for first in restarts] if period == "auto" else range(0, config.epochs, period)
    i = bisect.bisect_right(starts, epoch) - 1
    if period == "auto":
        period = (*starts, config.epochs)[i + 1] - starts[i]
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min((epoch - starts[i]) / period, 1)))


def build_ema(model: nn.Module, decay: float) -> AveragedModel:
    """Moving average of weights and buffers. Early on the decay is (1 + n) / (10 + n), to forget the start."""

    @torch.no_grad()
    def update(averages: Sequence[Tensor], values: Sequence[Tensor], n: Tensor | int) -> None:
        keep = min(decay, (1 + int(n)) / (10 + int(n)))
        if torch.is_floating_point(averages[0]):
            torch._foreach_lerp_(list(averages), list(values), 1 - keep)
        else:
            torch._foreach_copy_(list(averages), list(values))

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)


def detection_loss(config: Config) -> DetectionLoss:
    """The configured loss; when several processes share a batch, normalised by the whole batch."""
    return DetectionLoss(config.loss, variances=tuple(config.head.variances), normalizer=distributed.normalizer)


class Trainer:
    """The optimisation of one model: optimizer, schedule, precision, clipping, moving average and position.

    `epoch` and `batch` are the next ones to do (epochs from 1, batches from 0); `step` counts optimizer steps.
    In a job of several processes, weights and optimizer state are equal in all of them. BatchNorm's running statistics
    differ unless they are synchronised; the main process's are saved.
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
            distributed.synchronise_norms(model)
        self.config = config
        self.device = device
        self.batches_per_epoch = batches_per_epoch
        self.optimizer = build_optimizer(model, config, backbone_lr)
        steps_per_epoch = math.ceil(batches_per_epoch / config.accumulate)
        self.scheduler = build_scheduler(self.optimizer, config, steps_per_epoch, restarts)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.ema = build_ema(model, config.ema_decay) if config.ema_decay else None
        self.averaged = self.ema.module if self.ema else self.model  # the weights to evaluate and ship
        self.epoch, self.batch, self.step = 1, 0, 0

    @property
    def between_steps(self) -> bool:
        """Whether no gradient of an unfinished optimizer step is held."""
        return self.batch % self.config.accumulate == 0

    def update(self, losses: Iterator[Losses]) -> dict[str, float]:
        """Back-propagate the sum of `losses` of one batch; each item before the next one is computed.

        The optimizer steps after every `accumulate` batches and after an epoch's last batch, on their mean gradient.
        """
        if self.between_steps:
            self.optimizer.zero_grad(set_to_none=True)
        first = self.batch - self.batch % self.config.accumulate
        batches_in_step = min(self.config.accumulate, self.batches_per_epoch - first)
        sums: dict[str, float] = defaultdict(float)
        dtype = PRECISIONS[self.config.precision]
        while True:
            # The iterator runs the forward pass, which is all that autocast is for.
            with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
                item = next(losses, None)
            if item is None:
                break
            self.scaler.scale(sum(item.values()) / batches_in_step).backward()
            for name, value in item.items():
                sums[name] += value.item()
        sums = distributed.mean_of(sums)
        for name, value in sums.items():
            if not math.isfinite(value):
                raise UserError(
                    f"epoch {self.epoch}, step {self.step}: the loss '{name}' is {value}; "
                    "a lower learning_rate, warm-up (lr_schedule.warmup_steps) or clip_grad_norm may help"
                )
        self.batch += 1
        if self.batch == first + batches_in_step:
            self._step()
        if self.batch == self.batches_per_epoch:
            self.epoch, self.batch = self.epoch + 1, 0
        return sums

    def _step(self) -> None:
        """One optimizer step with the accumulated gradients."""
        distributed.average_gradients(self.model.parameters())
        if self.config.clip_grad_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with warnings.catch_warnings():  # fp16 skips a step that overflowed, the schedule counts it all the same
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)
            self.scheduler.step()
        if self.ema:
            self.ema.update_parameters(self.model)
        self.step += 1

    def state_dict(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
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
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.batch, self.step = state["epoch"], state["batch"], state["step"]
        self.scheduler.last_epoch = state["scheduler"]["last_epoch"]
        # The optimizer's state holds the rates of the earlier run, which may have been changed since.
        schedule = zip(self.optimizer.param_groups, self.scheduler.base_lrs, self.scheduler.lr_lambdas, strict=True)
        for group, base, factor in schedule:
            group["lr"] = base * factor(self.scheduler.last_epoch)
        checkpoint.restore_random_states(state["random"])


class Training:
    """The epochs of one stage: train, save last.pt, log, and score after each of the epochs in `due`.

    A subclass says what the losses of a batch are, how to score, and what its checkpoints hold besides the trainer's
    state. With `resume` it continues from last.pt in `folder`, if there is one.
    """

    def __init__(
        self, trainer: Trainer, loader: DataLoader, folder: Path, due: set[int], *, resume: bool, tensorboard: bool
    ):
        self.trainer = trainer
        self.loader = loader
        self.folder = folder
        self.due = due
        last = folder / "last.pt"
        reads = resume and distributed.world().main and last.exists()
        if payload := distributed.from_main(checkpoint.read(last) if reads else None):
            self.restore(payload)
            print(f"resumed {last} at epoch {trainer.epoch}, step {trainer.step}")
        # restore() may refuse the folder, so nothing is written before this point
        self.log = RunLog(folder / "log.jsonl", tensorboard)

    def begin_epoch(self, epoch: int) -> None:
        """Prepare the model for `epoch`, or for the rest of it after an interruption."""
        self.trainer.model.train()

    def losses(self, batch: Batch) -> Iterator[Losses]:
        raise NotImplementedError

    def score(self, epoch: int) -> None:
        """Score the model after `epoch` and log the result as "eval"."""
        raise NotImplementedError

    def state(self) -> dict:
        """The content of last.pt."""
        return self.trainer.state_dict()

    def restore(self, payload: dict) -> None:
        self.trainer.load_state_dict(payload)

    def save(self, name: str) -> None:
        checkpoint.save(self.folder / name, self.state())

    def run(self) -> bool:
        """Train until the last epoch ends or a signal asks to stop; whether the last epoch ended."""
        trainer = self.trainer
        every = trainer.config.save_every
        with StopRequest() as stop:
            # An earlier run may have been killed while it scored the epoch that it had just trained.
            ended = trainer.epoch - 1
            if trainer.batch == 0 and ended in self.due:
                scored = any(r["kind"] == "eval" and r["step"] == ended for r in read_log(self.log.path))
                if not distributed.from_main(scored):
                    self.score(ended)
            while trainer.epoch <= trainer.config.epochs and not stop.requested:
                epoch = trainer.epoch
                self.begin_epoch(epoch)
                self.loader.batch_sampler.set_epoch(epoch, trainer.batch)
                losses = self._train_epoch(stop)
                self.save("last.pt")
                if trainer.batch:  # stopped within the epoch
                    break
                self.log.write("train", epoch, losses=losses, lr=trainer.scheduler.get_last_lr()[0])
                if every and epoch % every == 0:
                    self.save(f"epoch_{epoch:04d}.pt")
                if epoch in self.due:
                    self.score(epoch)
        self.log.close()
        return trainer.epoch > trainer.config.epochs

    def _train_epoch(self, stop: StopRequest) -> dict[str, float]:
        """Train on the batches that are left of this epoch, or until `stop` is requested; the mean of each loss."""
        trainer = self.trainer
        sums: dict[str, float] = defaultdict(float)
        with progress(self.loader, f"epoch {trainer.epoch}/{trainer.config.epochs}") as bar:
            for done, batch in enumerate(bar, start=1):
                for name, value in trainer.update(self.losses(batch.to(trainer.device))).items():
                    sums[name] += value
                means = {name: value / done for name, value in sums.items()}
                bar.set_postfix({name: f"{mean:.3f}" for name, mean in means.items()}, refresh=False)
                stop.agree()
                if stop.requested and trainer.between_steps:
                    break
        return means
