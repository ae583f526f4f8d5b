"""The training of one detector: its losses, evaluation on the test set, and what is kept of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from lib import checkpoint, distributed
from lib.config import Config, DistillConfig, to_dict
from lib.datasets import Batch, eval_loader
from lib.detector import SSD
from lib.engine import Losses, Trainer, detect, detection_loss, measure, train_epoch
from lib.errors import UserError
from lib.genotype import Genotype
from lib.losses import DetectionLoss
from lib.records import Records
from lib.report import plot_training
from lib.revision import code_revision
from lib.runlog import RunLog, finite, progress, say
from lib.runtime import StopRequest
from lib.schedule import value_at
from lib.timing import time_parts


def detection_losses(
    model: SSD,
    loss: DetectionLoss,
    batch: Batch,
    distill: DistillConfig | None = None,
    weight: float = 0.0,
    teacher: SSD | None = None,
) -> Iterator[Losses]:
    """The losses of a batch, under a `weight` with those of `teacher`'s class scores; without one it never runs."""
    logits, offsets = model(batch.images)
    targets = loss.match(batch.boxes, batch.labels, model.priors)
    losses = loss(logits, offsets, targets)
    if weight:
        with torch.no_grad():
            teacher_logits, _ = teacher(batch.images)
        losses["distill"] = weight * loss.distillation(logits, teacher_logits, targets, **distill.rules())
    yield losses


def evaluate(model: SSD, records: Records, config: Config, device: torch.device, by_pycocotools: bool = False) -> dict:
    """Metrics of a detector on every image of `records`. The processes share the batches, and all get the metrics."""
    everything = range(len(records))
    options = {"workers": config.data.workers, "on_error": config.data.on_error, "device": device, "shared": True}
    loader = eval_loader(records, everything, model.image_size, config.final.batch_size, **options)
    found = [detect(model, [batch.images], config, device) for batch in progress(loader, "evaluate")]
    found = [image for batch in distributed.collect(found) for image in batch]
    metrics = {}
    if distributed.world().main:
        truth, sizes = records.ground_truth(everything), records.sizes.tolist()
        metrics = measure(found, truth, sizes, records.classes, reference=by_pycocotools)
    return distributed.from_main(metrics)


def some_images(records: Records, image_size: int, config: Config) -> Iterator[torch.Tensor]:
    """Batches of unaugmented training images, to re-estimate BatchNorm or to calibrate on."""
    chosen = range(min(config.search.bn_images, len(records)))
    loader = eval_loader(records, chosen, image_size, config.search.batch_size, on_error=config.data.on_error)
    return (batch.images for batch in loader if len(batch) == config.search.batch_size or len(chosen) == len(batch))


def freeze_norms(module: nn.Module) -> None:
    """BatchNorm keeps its statistics and uses them, as in evaluation."""
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.eval()


class FinalTraining:
    """The epochs of one detector: train, evaluate, keep the best.

    `resume` goes on from `folder`'s last.pt, if there is one. `teacher` is needed from the epoch on at which
    `final.distill.weight` is above 0. `best` has the metrics and the cost of the best evaluation so far.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        model: SSD,
        genotype: Genotype,
        cost: dict,
        loader: DataLoader,
        test: Records,
        device: torch.device,
        *,
        teacher: SSD | None = None,
        resume: bool = False,
        tensorboard: bool = False,
    ):
        self.config, self.folder, self.genotype, self.cost = config, folder, genotype, cost
        self.loader, self.test, self.device, self.teacher = loader, test, device, teacher
        backbone_lr = config.final.base_net_lr if config.final.freeze_base_net else None
        steps = loader.batch_sampler.batches_per_epoch
        self.trainer = Trainer(model, config.final, device, steps, backbone_lr=backbone_lr)
        self.best: dict = {}
        last = folder / "last.pt"
        if resume and (payload := checkpoint.load_if_any(last)):
            if Genotype.from_dict(payload["genotype"]) != genotype:
                raise UserError(
                    f"{last}: holds another genotype; name its own with --genotype, or another folder with --train-dir"
                )
            self.trainer.load_state_dict(payload)
            self.best = payload["best"]
            print(f"resumed {last} at epoch {self.trainer.epoch}, step {self.trainer.step}")
        self.log = RunLog(folder / "log.jsonl", tensorboard)

    def run(self) -> bool:
        """Train to the last epoch; whether it was reached."""
        trainer, settings = self.trainer, self.config.final
        loss = detection_loss(self.config)
        with StopRequest() as stop:
            while trainer.epoch <= settings.epochs and not stop.requested:
                epoch = trainer.epoch
                weight = value_at(settings.distill.weight, epoch)

                def forward(batch: Batch, weight: float = weight) -> Iterator[Losses]:
                    return detection_losses(trainer.model, loss, batch, settings.distill, weight, self.teacher)

                self.loader.batch_sampler.set_epoch(epoch, trainer.batch)
                trainer.model.train()
                if settings.freeze_base_net:
                    freeze_norms(trainer.model.backbone)
                losses = train_epoch(trainer, self.loader, forward, stop)
                if not trainer.batch:
                    self.log.write("train", epoch, losses=losses, lr=trainer.scheduler.get_last_lr()[0])
                    if epoch % settings.eval_every == 0 or epoch == settings.epochs:
                        self.score(epoch)
                    if settings.save_every and epoch % settings.save_every == 0:
                        self.save(self.folder / f"epoch_{epoch:04d}.pt")
                self.save(self.folder / "last.pt")
        self.log.close()
        return trainer.epoch > settings.epochs

    def score(self, epoch: int) -> None:
        """Evaluate on the test set; a new best is written to best.pt and metrics.json."""
        distributed.copy_from_main(self.trainer.averaged)  # BatchNorm's statistics, which it saves
        metrics = evaluate(self.trainer.averaged, self.test, self.config, self.device)
        self.log.write("eval", epoch, networks={"detector": metrics})
        scores = ", ".join(f"{name} {metrics[name]:.4f}" for name in ("AP", "AP50", "mAP"))
        say(f"epoch {epoch}: {scores} on the test set")
        if distributed.world().main:
            plot_training(self.log.path, self.folder / "curves.png", "AP")
        if metrics["AP"] > self.best.get("AP", -1.0):
            self.best = finite({**metrics, **self.cost, "epoch": epoch})
            checkpoint.save(self.folder / "best.pt", {**self.identity(), "model": self.trainer.averaged.state_dict()})
            self.write_metrics()

    def measure_latency(self) -> dict:
        """Milliseconds of the detector on this device, also put into metrics.json. For one process of a job."""
        latency = time_parts(self.trainer.averaged, self.config, self.device)
        self.write_metrics(latency=latency)
        return latency

    def identity(self) -> dict:
        """What makes weights a detector."""
        return {
            "genotype": self.genotype.to_dict(),
            "config": to_dict(self.config),
            "classes": list(self.test.classes),
            "category_ids": list(self.test.category_ids),
            "epoch": self.trainer.epoch - 1,
        }

    def save(self, path: Path) -> None:
        checkpoint.save(path, {**self.identity(), **self.trainer.state_dict(), "best": self.best})

    def write_metrics(self, **more: object) -> None:
        """metrics.json: the best evaluation, `more`, and what it was made with."""
        content = {
            **self.best,
            **more,
            "genotype": self.genotype.to_dict(),
            "test_images": len(self.test),
            "data": self.test.fingerprint(),
            "commit": code_revision(),
            "config": to_dict(self.config),
        }
        checkpoint.write_text(self.folder / "metrics.json", json.dumps(content, indent=1) + "\n")
