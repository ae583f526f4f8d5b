"""Stage 3's training of one detector: what it starts from, who teaches it, its losses, and its evaluation."""

import gc
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lib import UserError, checkpoint, distributed
from lib.analysis import best_f1, score_curves
from lib.annotations import Annotations
from lib.cli import supernet_checkpoint
from lib.config import Config, FinalConfig
from lib.config_io import to_dict, validate_network
from lib.datasets import Batch, eval_loader, train_loader
from lib.detector import SSD, ElasticSSD, Supernet, detect, load_supernet, recalibrate
from lib.elastic import to_device
from lib.genotype import Genotype
from lib.latency import time_parts
from lib.log import finite, plot_training, progress, say
from lib.losses import DetectionLoss, Targets
from lib.metrics import Evaluation, to_pixels
from lib.postprocess import Detections
from lib.pretrained import as_table, load_pretrained
from lib.scoring import calibration_rows, whole_batches
from lib.training import PRECISIONS, Losses
from lib.training_run import Training


def find_start(
    origin: str, config: Config, classes: Sequence[str], path: Path | None
) -> tuple[ElasticSSD, Genotype | None]:
    """The network that a sub-network is cut from, and the genotype that holds a pretrained one.

    Its weights are from `origin`: supernet (the checkpoint `path`), pretrained or scratch.
    """
    if path:
        supernet = load_supernet_of(path, classes)
        validate_network(config, supernet.config, ("search_space", "backbone", "head"), path)
        return supernet.detector, None
    network = ElasticSSD(config, len(classes))
    if origin == "scratch":
        return network, None
    if not config.backbone.pretrained_path:
        raise UserError("--from-pretrained: backbone.pretrained_path is empty; set it in the YAML or with --set")
    embedding = load_pretrained(network, config, classes)
    print("\n".join(as_table(embedding.rows)))
    return network, embedding.genotype


def supernet_path(config: Config, source: dict, load: Path | None) -> Path:
    """The checkpoint in `load`, else the one in the configuration, else the one that the genotype file names."""
    searched = source.get("supernet", {})
    named = load or config.final.supernet_state_dict or searched.get("path")
    if not named:
        raise UserError("the genotype file names no supernet: --load DIR names the run of one")
    path = supernet_checkpoint(Path(named))
    if "sha256" in searched and checkpoint.sha256(path) != searched["sha256"]:
        say(f"note: {path} is not the supernet that was searched, or has changed since")
    return path


def load_supernet_of(path: Path, classes: Sequence[str]) -> Supernet:
    """The supernet of a checkpoint. Raises UserError unless it was trained on `classes`."""
    supernet = load_supernet(path)
    if supernet.classes != tuple(classes):
        raise UserError(f"{path}: was trained on {', '.join(supernet.classes)}, the data has {', '.join(classes)}")
    return supernet


def final_loader(annotations: Annotations, image_size: int, config: Config, device: torch.device) -> DataLoader:
    """Augmented batches of all of the training data."""
    return train_loader(annotations, range(len(annotations)), image_size, config.final.batch_size, config, device)


def some_images(annotations: Annotations, image_size: int, config: Config) -> Iterator[torch.Tensor]:
    """Batches of unaugmented training images, to re-estimate BatchNorm or to calibrate quantisation."""
    chosen = calibration_rows(range(len(annotations)), config)
    size = max(config.search.batch_size, 2)  # BatchNorm takes no single image
    loader = eval_loader(annotations, chosen, image_size, size, replace(config.data, workers=0))
    return whole_batches(batch.images for batch in loader)


def detection_losses(network: Callable, loss: DetectionLoss, batch: Batch, targets: Targets) -> Iterator[Losses]:
    """The losses of one batch. `network` is an SSD, or what `launched` makes of it."""
    yield loss(*network(batch.images), targets)


def evaluate(model: SSD, annotations: Annotations, config: Config, device: torch.device) -> dict:
    """Metrics of a detector on all of `annotations`. The processes of a job share the images; all get the metrics."""
    return measure(detect_all(model, annotations, config, device), annotations)


def detect_all(model: SSD, annotations: Annotations, config: Config, device: torch.device) -> list[Detections]:
    """What a detector finds in all images. The processes of a job share them; the main one gets the detections."""
    everything, batch = range(len(annotations)), config.final.batch_size
    loader = eval_loader(annotations, everything, model.image_size, batch, config.data, device, shared=True)
    found = [detect(model, [batch.images], config, device) for batch in progress(loader, "evaluate")]
    return [image for batch in distributed.collect(found) for image in batch]


def measure(found: Sequence[Detections], annotations: Annotations, by_pycocotools: bool = False) -> dict:
    """Metrics of the main process's detections in all images, best F1 and its threshold included, in every process."""
    metrics = {}
    if distributed.world().main:
        in_pixels = [to_pixels(image, *size) for image, size in zip(found, annotations.sizes.tolist(), strict=True)]
        truth = annotations.ground_truth(range(len(annotations)))
        evaluation = Evaluation(len(annotations.classes), truth, in_pixels)
        metrics = evaluation.summary(annotations.classes, by_pycocotools)
        for scores, curve in zip((metrics, *metrics["per_class"].values()), score_curves(evaluation), strict=True):
            scores |= best_f1(curve)
    return distributed.from_main(metrics)


def freeze_norms(module: nn.Module) -> None:
    """Make every BatchNorm use and keep its running statistics, as in evaluation."""
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.eval()


def launched(
    model: SSD, settings: FinalConfig, batch_size: int, device: torch.device
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """What runs `model` on batches of that many images: on a GPU its passes as CUDA graphs, launched in one go.

    To launch them kernel by kernel takes the host of a fast GPU longer than to run them takes the GPU. To be called
    before a loader begins: pinning memory meanwhile would spoil the recording. A batch overwrites the gradients of the
    one before, so they must not accumulate; and synchronised statistics wait for other processes within the pass.
    """
    waits = settings.sync_batch_norm and distributed.world().size > 1
    if not (settings.cuda_graph and device.type == "cuda" and settings.accumulate == 1 and not waits):
        return model
    whole = nn.Sequential(model)  # which gets another forward method; the model keeps its own
    images = model.priors.new_zeros(batch_size, 3, model.image_size, model.image_size, dtype=torch.uint8)
    before = [buffer.clone() for buffer in model.buffers()]  # BatchNorm's, which the calls that warm up change
    gc.collect()  # the graphs of an earlier network, whose end would spoil the recording too
    half = settings.precision != "fp32"
    with torch.autocast(device.type, PRECISIONS[settings.precision], enabled=half, cache_enabled=False):
        torch.cuda.make_graphed_callables(whole, (images,))
    for buffer, value in zip(model.buffers(), before, strict=True):
        buffer.copy_(value)
    return lambda batch: (whole if batch.shape == images.shape else model)(batch)


class FinalTraining(Training):
    """Trains one detector, evaluates it on the test set and keeps the best epoch's weights as best.pt.

    It is cut out of `network`, and `inherits` if those weights are of another training, whose BatchNorm statistics are
    not its own. `options` are those of `Training`. `best` has the metrics and the cost of the best evaluation
    so far, by the key search.objective. best.pt has the `recipe`, from which `config` was derived for these pictures.
    """

    stage = "final"

    def __init__(
        self,
        config: Config,
        network: ElasticSSD,
        genotype: Genotype,
        loader: DataLoader,
        test: Annotations,
        *,
        device: torch.device,
        inherits: bool,
        recipe: Config | None = None,
        **options: Any,
    ):
        self.recipe = recipe or config
        self.genotype = genotype
        self.cost = network.cost(genotype)._asdict()
        self.test = test
        self.best: dict = {}
        images, settings = loader.dataset.annotations, config.final
        model = to_device(network.extract(genotype), device, trains_in_half=settings.precision != "fp32")
        self.network: Callable | None = None
        if inherits:
            recalibrate(model, some_images(images, genotype.image_size, config), device)
        backbone_lr = settings.base_net_lr if settings.freeze_base_net else None
        data = {"training": images, "test": test}
        super().__init__(config, model, loader, data, device=device, backbone_lr=backbone_lr, **options)

    def begin_epoch(self, epoch: int) -> None:
        super().begin_epoch(epoch)
        if self.settings.freeze_base_net:
            freeze_norms(self.trainer.model.backbone)
        if self.network is None:
            trainer, batches = self.trainer, self.loader.batch_sampler
            size = min(batches.batch_size, batches.per_rank)
            self.network = launched(trainer.model, self.settings, size, trainer.device)

    def priors(self) -> Tensor:
        return self.trainer.model.priors

    def losses(self, batch: Batch, targets: Targets) -> Iterator[Losses]:
        return detection_losses(self.network, self.loss, batch, targets)

    def score(self, epoch: int) -> None:
        """Evaluate on the test set; a new best is written to best.pt and metrics.json."""
        # Without synchronised BatchNorm each process has statistics of its own; the main one's are saved.
        distributed.copy_from_main(self.trainer.averaged)
        metrics = evaluate(self.trainer.averaged, self.test, self.config, self.trainer.device)
        objective = self.config.search.objective
        # NaN, of a test set without a counted object, is no score.
        value, best = (finite(m.get(objective)) or 0.0 for m in (metrics, self.best))
        if value > best or not self.best:
            self.best = finite({**metrics, **self.cost, "epoch": epoch})
            thresholds = [scores["threshold"] for scores in (self.best, *self.best["per_class"].values())]
            model = self.trainer.averaged.state_dict()
            checkpoint.save(self.folder / "best.pt", {**self.identity(), "thresholds": thresholds, "model": model})
            self.write_metrics()
        # Logged last: an evaluation in the log is not repeated, so everything else must have been saved by then.
        self.save()
        self.log.write("eval", epoch, networks={"detector": metrics})
        scores = ", ".join(f"{name} {metrics[name]:.4f}" for name in ("AP", "AP50", "mAP"))
        kept = f"; the best {objective} so far, kept in best.pt" if self.best["epoch"] == epoch else ""
        say(f"epoch {epoch}: {scores} on the test set{kept}")
        plot_training(self.log.path, self.folder / "curves.png", objective)

    def identity(self) -> dict:
        """What a checkpoint needs besides the weights to be a detector."""
        return {
            "genotype": self.genotype.to_dict(),
            "config": to_dict(self.recipe),
            "classes": list(self.test.classes),
            "category_ids": list(self.test.category_ids),
            "epoch": self.trainer.epoch - 1,
        }

    def state(self) -> dict:
        return {**self.identity(), **super().state(), "best": self.best}

    def restore(self, payload: dict) -> None:
        if Genotype.from_dict(payload["genotype"]) != self.genotype:
            remedy = "name its own with --genotype, or another folder with --train-dir"
            raise UserError(f"{self.last}: holds another genotype; {remedy}")
        super().restore(payload)
        self.best = payload["best"]
        kept, problem = 0, ""  # the epoch of best.pt, or what is wrong with that file
        if self.best and distributed.world().main:
            try:
                kept = checkpoint.read(self.folder / "best.pt").get("epoch", 0)
            except UserError as error:
                problem = str(error)
        kept, problem = distributed.from_main((kept, problem))
        if problem and self.trainer.epoch > self.settings.epochs:
            ended = f"this run has ended, so it is not made again: {self.last} is the detector of the last epoch"
            raise UserError(f"{problem}; {ended}")
        # Gone, or of an epoch that is trained again from an earlier checkpoint: the best of what follows is kept.
        if problem or kept >= self.trainer.epoch:
            say(f"note: {problem or f'{self.folder}: best.pt is of epoch {kept}, which is trained again'}")
            self.best = {}

    def measure_latency(self) -> dict:
        """Milliseconds of the detector on this device, also added to metrics.json. For one process of a job."""
        latency = time_parts(self.trainer.averaged, self.config, self.trainer.device)
        self.write_metrics(latency=latency)
        return latency

    def write_metrics(self, **more: object) -> None:
        """metrics.json: the best evaluation, `more`, and what they were obtained with."""
        content = {
            **self.best,
            **more,
            "genotype": self.genotype.to_dict(),
            "test_images": len(self.test),
            "data": self.test.fingerprint(),
            "commit": checkpoint.code_revision(),
            "config": to_dict(self.config),
        }
        checkpoint.write_text(self.folder / "metrics.json", json.dumps(content, indent=1) + "\n")
