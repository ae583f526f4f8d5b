"""What both trainings share: optimizer, learning-rate schedule, moving average and training step."""

import bisect
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lib import UserError, checkpoint, distributed
from lib.config import TrainConfig

Losses = dict[str, Tensor]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
READ_EVERY = 10  # batches whose losses are read from a GPU in one go
MOST_OVERFLOWS = 25  # forward passes in a row that overflow in fp16; GradScaler halves the scale each time


def build_optimizer(model: nn.Module, config: TrainConfig, backbone_lr: float | None = None) -> torch.optim.Optimizer:
    """SGD or AdamW; `backbone_lr` gives the parameters below `backbone.` a learning rate of their own."""
    if backbone_lr is None:
        backbone_lr = config.backbone_learning_rate or None
    # By role and not by value, so that a resumed run has the same groups whatever its rates are now.
    groups: dict[tuple[bool, bool], dict] = {}
    for name, parameter in model.named_parameters():
        own_rate = backbone_lr is not None and name.startswith("backbone.")
        decays = config.decay_norm_and_bias or parameter.ndim > 1
        lr = backbone_lr if own_rate else config.learning_rate
        group = {"params": [], "lr": lr, "weight_decay": config.weight_decay if decays else 0.0}
        groups.setdefault((own_rate, decays), group)["params"].append(parameter)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups.values(), lr=config.learning_rate, momentum=config.momentum)
    return torch.optim.AdamW(groups.values(), lr=config.learning_rate)


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


class MovingAverage(AveragedModel):
    """Moving average of weights and floating buffers. Early on the decay is (1 + n) / (10 + n), to forget the start."""

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        # torch's own waits for a GPU to read n, which is a tensor of the CPU here.
        n = int(self.n_averaged)
        keep = min(self.decay, (1 + n) / (10 + n)) if n else 0.0
        averages, values = map(distributed.floating_tensors, (self.module, model))
        torch._foreach_lerp_(averages, values, 1 - keep)
        self.n_averaged += 1


class Diverged(UserError):
    """A loss or a weight is not finite."""


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
        self.model = model.to(device)
        distributed.copy_from_main(model)
        if config.sync_batch_norm and distributed.world().size > 1:
            distributed.synchronise_norms(model)
        self.config = config
        self.device = device
        self.batches_per_epoch = batches_per_epoch
        self.optimizer = build_optimizer(model, config, backbone_lr)
        self.steps_per_epoch = math.ceil(batches_per_epoch / config.accumulate)
        self.scheduler = build_scheduler(self.optimizer, config, self.steps_per_epoch, restarts)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.ema = MovingAverage(model, config.ema_decay) if config.ema_decay else None
        self.averaged = self.ema.module if self.ema else self.model  # the weights to evaluate and ship
        self.epoch, self.batch, self.step = 1, 0, 0
        self.unfinished = False  # whether an optimizer step has begun
        self.stepping = False  # whether it is changing weights
        self.unread: list[tuple[str, list[Losses]]] = []  # place and losses of batches that `read_losses` will return
        # Reading the losses makes the host wait for a GPU; fp16 has to know whether they overflowed.
        self._read_every = 1 if device.type == "cpu" or self.scaler.is_enabled() else READ_EVERY
        self._overflows = 0  # batches in a row whose forward pass overflowed
        self._skips = False  # whether one of this step did
        self._statistics = [b for m in model.modules() if isinstance(m, nn.BatchNorm2d) for b in m.buffers()]
        self._statistics_before = [b.clone() for b in self._statistics]  # as they were before this optimizer step

    @property
    def batches_in_step(self) -> int:
        """How many batches the current optimizer step takes: `accumulate`, at an epoch's end maybe fewer."""
        first = self.batch - self.batch % self.config.accumulate
        return min(self.config.accumulate, self.batches_per_epoch - first)

    def update(self, losses: Iterator[Losses]) -> list[dict[str, float]]:
        """Back-propagate the sum of `losses` of one batch; each item before the next one is computed.

        The optimizer steps after every `accumulate` batches and after an epoch's last batch, on their mean gradient.
        Returns what `read_losses` does: on a CPU at each batch, on a GPU at every tenth, since the host has to wait.
        """
        in_step, batches_in_step = self.batch % self.config.accumulate, self.batches_in_step
        if in_step == 0:
            self.unfinished, self._skips = True, False
            self.optimizer.zero_grad(set_to_none=True)
            torch._foreach_copy_(self._statistics_before, self._statistics)
        items = []
        dtype = PRECISIONS[self.config.precision]
        while True:
            # The iterator runs the forward pass, which is all that autocast is for.
            with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
                item = next(losses, None)
            if item is None:
                break
            self.scaler.scale(sum(item.values()) / batches_in_step).backward()
            items.append({name: value.detach() for name, value in item.items()})
        self.unread.append((f"epoch {self.epoch}, step {self.step}", items))
        read = self.read_losses() if len(self.unread) >= self._read_every else []
        self.batch += 1
        if in_step + 1 == batches_in_step:
            self._step()
        if self.batch == self.batches_per_epoch:
            self.epoch, self.batch = self.epoch + 1, 0
        return read

    def read_losses(self, alone: bool = False) -> list[dict[str, float]]:
        """The losses of each batch since the last call, without batches that overflowed in fp16; waits for a GPU.

        They are means over the processes of the job; `alone` asks no other one. Raises Diverged at one that is not
        finite, so before anything is saved.
        """
        unread, self.unread = self.unread, []
        numbers = [value for _, items in unread for item in items for value in item.values()]
        values = iter(torch.stack(numbers).tolist() if numbers else [])
        found = []
        for place, items in unread:
            sums: dict[str, float] = Counter()
            for name in chain.from_iterable(items):
                sums[name] += next(values)
            sums = sums if alone else distributed.mean_of(sums)
            wrong = next((name for name, value in sums.items() if not math.isfinite(value)), None)
            self._overflows = self._overflows + 1 if wrong else 0
            if wrong:
                self._overflow(place, f"the loss '{wrong}' is {sums[wrong]}")
            else:
                found.append(sums)
        return found

    def _overflow(self, place: str, problem: str) -> None:
        """Have GradScaler leave this step out, as after an overflow of the gradients. Raises Diverged if it cannot."""
        fp16 = self.scaler.is_enabled()
        if not fp16 or self._overflows > MOST_OVERFLOWS:
            again = f" for the {self._overflows}th time in a row" if fp16 else ""
            remedy = "a lower learning_rate, warm-up (lr_schedule.warmup_steps) or clip_grad_norm may help"
            raise Diverged(f"{place}: {problem}{again}; {remedy}")
        self._skips = True
        # A loss that is not finite may yet have a finite gradient.
        next(p.grad for p in self.model.parameters() if p.grad is not None).fill_(math.nan)

    def _step(self) -> None:
        distributed.average_gradients(self.model.parameters())
        if self.config.clip_grad_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad_norm)
        self.stepping = True
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self._skips:
            torch._foreach_copy_(self._statistics, self._statistics_before)
        with warnings.catch_warnings():  # fp16 skips a step that overflowed, the schedule counts it all the same
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)
            self.scheduler.step()
        if self.ema:
            self.ema.update_parameters(self.model)
        self.step += 1
        self.unfinished = self.stepping = False

    def rewind(self) -> bool:
        """Back to before the optimizer step in which something failed; whether that was before it changed weights."""
        if self.unfinished:
            torch._foreach_copy_(self._statistics, self._statistics_before)
            self.batch -= self.batch % self.config.accumulate
        return not self.stepping

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

    def load_state_dict(self, state: dict, batch_size: int | None = None) -> None:
        """Go on from `state`, of a run in batches of `batch_size` (None: of the same size as now).

        Rates, their schedule, weight decay and momentum are those of this trainer, at the place in the epoch where that
        run was.
        """
        self.model.load_state_dict(state["model"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step = state["epoch"], int(state["step"])
        # As many pictures of the epoch are done, to the last whole optimizer step.
        batch = state["batch"] * (batch_size or self.config.batch_size) // self.config.batch_size
        batch = min(batch, self.batches_per_epoch - 1)
        self.batch = batch - batch % self.config.accumulate
        self.scheduler.last_epoch = (self.epoch - 1) * self.steps_per_epoch + self.batch // self.config.accumulate
        schedule = zip(
            self.optimizer.param_groups, settings, self.scheduler.base_lrs, self.scheduler.lr_lambdas, strict=True
        )
        for group, own, base, factor in schedule:
            group.update({**own, "lr": base * factor(self.scheduler.last_epoch)})
        checkpoint.restore_random_states(state["random"])
