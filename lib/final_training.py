"""The training of one detector: its losses, evaluation on the test set, and what is kept of it.

Where the training of a detector starts: a supernet's slice, pretrained or random weights; and who teaches it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader

from lib import checkpoint, distributed
from lib.annotations import Annotations
from lib.checkpoint import code_revision
from lib.cli import supernet_checkpoint
from lib.config import Config, DistillConfig
from lib.config_io import to_dict, validate_network
from lib.datasets import Batch, eval_loader
from lib.detector import SSD, ElasticSSD, Supernet, detect, load_supernet, load_teacher, recalibrate
from lib.errors import UserError
from lib.genotype import Genotype
from lib.latency import time_parts
from lib.log import RunLog, finite, plot_training, progress, say
from lib.losses import DetectionLoss
from lib.metrics import detection_metrics
from lib.pretrained import as_table, load_pretrained
from lib.runtime import StopRequest
from lib.shrinking import value_at
from lib.training import Losses, Trainer, detection_loss, train_epoch


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


def evaluate(
    model: SSD, annotations: Annotations, config: Config, device: torch.device, by_pycocotools: bool = False
) -> dict:
    """Metrics of a detector on all images of `annotations`. Processes share the batches, and all get the metrics."""
    everything = range(len(annotations))
    options = {"workers": config.data.workers, "on_error": config.data.on_error, "device": device, "shared": True}
    loader = eval_loader(annotations, everything, model.image_size, config.final.batch_size, **options)
    found = [detect(model, [batch.images], config, device) for batch in progress(loader, "evaluate")]
    found = [image for batch in distributed.collect(found) for image in batch]
    metrics = {}
    if distributed.world().main:
        truth, sizes = annotations.ground_truth(everything), annotations.sizes.tolist()
        metrics = detection_metrics(found, truth, sizes, annotations.classes, reference=by_pycocotools)
    return distributed.from_main(metrics)


def some_images(annotations: Annotations, image_size: int, config: Config) -> Iterator[torch.Tensor]:
    """Batches of unaugmented training images, to re-estimate BatchNorm or to calibrate on."""
    chosen = range(min(config.search.bn_images, len(annotations)))
    loader = eval_loader(annotations, chosen, image_size, config.search.batch_size, on_error=config.data.on_error)
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
        test: Annotations,
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
        if resume and (payload := checkpoint.read_if_any(last)):
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


class Start(NamedTuple):
    """`network` is what the genotype is cut from, with random weights unless it is `trained`."""

    network: ElasticSSD
    trained: bool
    supernet: Supernet | None  # of the genotype, where it is known


def find_start(
    origin: Literal["supernet", "scratch", "pretrained"],
    config: Config,
    source: dict,
    classes: Sequence[str],
    load: Path | None,
) -> Start:
    """The network to start from. `source` is the genotype file's content, `load` the supernet's run instead of its."""
    if origin == "supernet":
        path = supernet_path(config, source, load)
        supernet = load_supernet_of(path, classes)
        validate_network(config, supernet.config, ("search_space", "backbone", "head"), path)
        return Start(supernet.detector, True, supernet)
    network = ElasticSSD(config, len(classes))
    if origin == "pretrained":
        if not config.backbone.pretrained_path:
            raise UserError("--from-pretrained: backbone.pretrained_path names nothing; --set it, or the YAML may")
        print("\n".join(as_table(load_pretrained(network, config, classes).rows)))
    return Start(network, origin == "pretrained", None)


def supernet_path(config: Config, source: dict, load: Path | None) -> Path:
    """The checkpoint in `load`, else the configuration's, else that which the genotype file names."""
    searched = source.get("supernet", {})
    if named := load or config.final.supernet_state_dict:
        return supernet_checkpoint(Path(named))
    if not searched.get("path"):
        raise UserError("the genotype names no supernet: name its run with --load DIR, or use --from-scratch")
    path = supernet_checkpoint(Path(searched["path"]))
    if "sha256" in searched and checkpoint.sha256(path) != searched["sha256"]:
        say(f"note: {path} has changed since the search")
    return path


def load_supernet_of(path: Path, classes: Sequence[str]) -> Supernet:
    """The supernet of a checkpoint. Raises UserError unless it was trained on `classes`."""
    supernet = load_supernet(path)
    if supernet.classes != tuple(classes):
        raise UserError(f"{path}: was trained on {', '.join(supernet.classes)}, the data has {', '.join(classes)}")
    return supernet


def find_teacher(start: Start, config: Config, genotype: Genotype, classes: Sequence[str]) -> SSD | None:
    """Who teaches the detector by `final.distill`: a detector, or the supernet's largest sub-network at its image size.

    The latter's BatchNorm is still to be re-estimated. None, and no work at all, where distillation never has weight.
    """
    distill = config.final.distill
    if distill.teacher or not distill.active():
        size = genotype.image_size
        return load_teacher(distill, "final.distill.teacher", classes, {size: start.network.priors(size)})
    if start.supernet is None:
        raise UserError(
            'final.distill.teacher: "" is the largest sub-network of the supernet, and this training starts from none; '
            "name a detector's best.pt"
        )
    largest = replace(start.supernet.space.largest(), image_size=genotype.image_size)
    return start.supernet.detector.extract(largest).eval().requires_grad_(False)


def make_training(
    config: Config,
    folder: Path,
    start: Start,
    genotype: Genotype,
    teacher: SSD | None,
    loader: DataLoader,
    test: Annotations,
    device: torch.device,
    **options: bool,
) -> FinalTraining:
    """The training of one genotype. BatchNorm is re-estimated wherever the weights are those of another training."""
    model, cost = start.network.extract(genotype), start.network.cost(genotype)
    shared = [model] if start.trained else []
    if teacher is not None:
        teacher.to(device, memory_format=torch.channels_last)
        shared += [] if config.final.distill.teacher else [teacher]
    for net in shared:
        recalibrate(net.to(device), some_images(loader.dataset.annotations, net.image_size, config), device)
    made_of = config, folder, model, genotype, cost._asdict(), loader, test, device
    return FinalTraining(*made_of, teacher=teacher, **options)
