"""The epoch loop of both trainings, and how a detector is evaluated and its BatchNorm re-estimated."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader

from lib import checkpoint, distributed
from lib.config import Config, TrainConfig
from lib.datasets import Batch
from lib.detector import SSD
from lib.errors import UserError
from lib.losses import DetectionLoss
from lib.metrics import Evaluation
from lib.optim import build_ema, build_optimizer, build_scheduler
from lib.postprocess import Detections, postprocess
from lib.runlog import progress
from lib.runtime import StopRequest
from lib.sync_norm import synchronise_norms

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


def recalibrate(model: nn.Module, images: Iterable[Tensor], device: torch.device) -> None:
    """Reset the BatchNorm statistics and re-estimate them as the cumulative average over batches of images."""
    update_bn(images, model, device)


@torch.inference_mode()
def detect(model: SSD, images: Iterable[Tensor], config: Config, device: torch.device) -> list[Detections]:
    """Detections of every image of the batches (B, 3, H, W), in order, on the CPU."""
    model.eval()
    found: list[Detections] = []
    for batch in images:
        logits, offsets = model(batch.to(device, non_blocking=True))
        options = config.postprocess, config.loss.type, config.head.variances
        found += (Detections(*(t.cpu() for t in d)) for d in postprocess(logits, offsets, model.priors, *options))
    return found


def to_pixels(detections: Detections, width: int, height: int) -> dict[str, Tensor]:
    """Detections of one picture with boxes in its pixels, as the metrics take them."""
    scale = torch.tensor([width, height, width, height], dtype=torch.float32)
    return {
        "boxes": detections.boxes * scale,
        "scores": detections.scores,
        "labels": detections.labels,
    }


def measure(
    detections: Sequence[Detections],
    truth: Sequence[dict],
    sizes: Sequence[tuple[int, int]],
    classes: Sequence[str],
    reference: bool = False,
) -> dict:
    """COCO's twelve numbers, VOC's mAP over all points and over VOC 2007's 11, both APs per class.

    `truth` and `sizes` (width, height) are per picture. With `reference` COCO's numbers are found by pycocotools.
    """
    evaluation = Evaluation(len(classes))
    evaluation.add(truth, [to_pixels(d, *size) for d, size in zip(detections, sizes, strict=True)])
    return summarise(evaluation, classes, reference)


def summarise(evaluation: Evaluation, classes: Sequence[str], reference: bool = False) -> dict:
    """What `measure` gives, of images that were evaluated already."""
    coco, voc = evaluation.coco(reference), evaluation.voc()
    pairs = zip(classes, coco.pop("per_class"), voc["per_class"], strict=True)
    per_class = {name: {"AP": coco_ap, "mAP": voc_ap} for name, coco_ap, voc_ap in pairs}
    return {**coco, "mAP": voc["mAP"], "mAP_11point": voc["mAP_11point"], "per_class": per_class}
