"""Stage 3: train the chosen sub-network on all of the training data, evaluate it on the test set, use it.

    python final_train.py                                     # the last search's best.json
    python final_train.py --genotype runs/bccd/search/best.json
    python final_train.py --genotype pareto.json --index 2 --set final.epochs=50
    torchrun --nproc_per_node=4 final_train.py                # the same training on four GPUs
    python final_train.py --eval-only                         # the last detector on the test set again
    python final_train.py --eval-only --pycocotools           # with pycocotools' own numbers
    python final_train.py --predict 'photos/*.jpg' --out drawn
    python final_train.py --export onnx --int8                # detector.onnx, detector_int8.onnx, export.json

Writes best.pt (the detector), last.pt, metrics.json, log.jsonl and curves.png to runs/NAME/final.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from lib import checkpoint, cli, distributed, inference, parity, plan
from lib.config import Config, to_dict
from lib.datasets import Batch, configured_train_loader, eval_loader, load_records
from lib.detector import SSD, ElasticSSD
from lib.engine import Losses, Trainer, detect, measure, recalibrate, train_epoch
from lib.errors import UserError
from lib.export import export_graph
from lib.genotype import Genotype
from lib.genotype_file import is_genotype_string, parse_genotype_string, read_genotype_file
from lib.inference import draw_pictures
from lib.losses import DetectionLoss
from lib.models import load_detector, load_supernet
from lib.pictures import find_pictures
from lib.preflight import preflight
from lib.pretrained import as_table, load_pretrained
from lib.quantize import quantize
from lib.records import Records
from lib.report import plot_training
from lib.runlog import RunLog, finite, progress, say
from lib.runs import find_genotype, last_run, remember, supernet_checkpoint
from lib.runtime import StopRequest, pick_device, run, seed_everything


def detection_losses(model: SSD, loss: DetectionLoss, batch: Batch) -> Iterator[Losses]:
    logits, offsets = model(batch.images)
    yield loss(logits, offsets, loss.match(batch.boxes, batch.labels, model.priors))


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


def initial_model(args: argparse.Namespace, config: Config, source: dict, classes: Sequence[str]) -> ElasticSSD:
    """The network to cut the genotype from: the supernet's weights, or fresh or pretrained ones if a flag says so."""
    if args.from_scratch or args.from_pretrained:
        network = ElasticSSD(config, len(classes))
        if args.from_pretrained:
            if not config.backbone.pretrained_path:
                raise UserError("--from-pretrained: backbone.pretrained_path names nothing; --set it, or the YAML may")
            print("\n".join(as_table(load_pretrained(network, config).rows)))
        return network
    named = source.get("supernet", {}).get("path") or config.final.supernet_state_dict
    if not args.load and not named:
        raise UserError("the genotype names no supernet: name its run with --load DIR, or use --from-scratch")
    path = supernet_checkpoint(args.load or Path(named))
    if not args.load and checkpoint.sha256(path) != source.get("supernet", {}).get("sha256", checkpoint.sha256(path)):
        say(f"note: {path} has changed since the search")
    supernet = load_supernet(path)
    if supernet.classes != tuple(classes):
        raise UserError(f"{path}: was trained on {', '.join(supernet.classes)}, the data has {', '.join(classes)}")
    return supernet.detector


def freeze_norms(module: nn.Module) -> None:
    """BatchNorm keeps its statistics and uses them, as in evaluation."""
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.eval()


class FinalTraining:
    """The epochs of one detector: train, evaluate, keep the best."""

    def __init__(
        self,
        args: argparse.Namespace,
        config: Config,
        folder: Path,
        model: SSD,
        genotype: Genotype,
        cost: dict,
        loader: DataLoader,
        test: Records,
        device: torch.device,
    ):
        self.config, self.folder, self.genotype, self.cost = config, folder, genotype, cost
        self.loader, self.test, self.device = loader, test, device
        backbone_lr = config.final.base_net_lr if config.final.freeze_base_net else None
        steps = loader.batch_sampler.batches_per_epoch
        self.trainer = Trainer(model, config.final, device, steps, backbone_lr=backbone_lr)
        self.best: dict = {}
        last = folder / "last.pt"
        if args.resume and (payload := checkpoint.load_if_any(last)):
            if Genotype.from_dict(payload["genotype"]) != genotype:
                raise UserError(f"{last}: holds another genotype; choose another folder with --train-dir")
            self.trainer.load_state_dict(payload)
            self.best = payload["best"]
            print(f"resumed {last} at epoch {self.trainer.epoch}, step {self.trainer.step}")
        self.log = RunLog(folder / "log.jsonl", args.tensorboard)

    def run(self) -> bool:
        """Train to the last epoch; whether it was reached."""
        trainer, settings = self.trainer, self.config.final
        variances = tuple(self.config.head.variances)
        loss = DetectionLoss(**vars(self.config.loss), variances=variances, normalizers=distributed.normalizers)
        with StopRequest() as stop:
            while trainer.epoch <= settings.epochs and not stop.requested:
                epoch = trainer.epoch
                self.loader.batch_sampler.set_epoch(epoch, trainer.batch)
                trainer.model.train()
                if settings.freeze_base_net:
                    freeze_norms(trainer.model.backbone)
                losses = train_epoch(trainer, self.loader, lambda b: detection_losses(trainer.model, loss, b), stop)
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
            write_metrics(self.folder, self.best, self.identity(), self.test)

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


def write_metrics(folder: Path, metrics: dict, identity: dict, test: Records) -> None:
    content = {**metrics, "genotype": identity["genotype"], "test_images": len(test), "data": test.fingerprint()}
    checkpoint.write_text(
        folder / "metrics.json", json.dumps({**content, "config": identity["config"]}, indent=1) + "\n"
    )


def train(args: argparse.Namespace, device: torch.device) -> None:
    """The whole of stage 3, from a genotype to a detector."""
    configured = cli.read_config(args, "final").final.genotypes if args.cfg else ""
    name = args.genotype or configured or "best.json"
    source = {} if is_genotype_string(name) else read_genotype_file(find_genotype(name), args.index)
    config = cli.read_config(args, "final", source.get("config"))
    folder = cli.run_folder(args, config, "final")
    seed_everything(config.seed)
    records = load_records(config.data, "train", config.seed)
    config.data.classes = list(records.classes)
    test = load_records(config.data, "test", config.seed)
    if bool(test.ignore.all()):
        raise UserError(f"{config.data.root}: none of the {len(test)} test images has an object to find")
    network = initial_model(args, config, source, records.classes)
    genotype = Genotype.from_dict(source) if source else parse_genotype_string(name, network.space)
    model, cost = network.extract(genotype), network.cost(genotype)
    everything, batch_size = range(len(records)), config.final.batch_size
    loader = configured_train_loader(records, everything, genotype.image_size, batch_size, config, device)
    for line in (
        *preflight(records, range(len(records)), model.priors, config.loss.matched_threshold),
        f"test set: {len(test)} images",
        f"genotype: {genotype}",
        f"  {cost.flops / 1e6:.1f} M multiply-adds, {cost.params / 1e6:.3f} M parameters",
        *plan.describe_priors(network, config),
        plan.describe_training("final", config.final, len(records), loader.batch_sampler.batches_per_epoch),
    ):
        print(line)
    if args.dry_run:
        return
    cli.refuse_to_overwrite(folder / "last.pt", args.resume)
    cli.save_config(config, folder)
    remember("final", folder)
    if not args.from_scratch:  # a pretrained backbone too has statistics of another training
        recalibrate(model.to(device), _some_images(records, genotype.image_size, config), device)
    training = FinalTraining(args, config, folder, model, genotype, cost._asdict(), loader, test, device)
    if not training.run():
        print(f"stopped; everything is in {folder / 'last.pt'}, the same command with --resume goes on")
        return
    print(f"best: epoch {training.best['epoch']}, AP {training.best['AP']:.4f}, AP50 {training.best['AP50']:.4f}")
    print(f"wrote {folder / 'best.pt'}, {folder / 'metrics.json'}, {folder / 'curves.png'}")
    print(f"next: python final_train.py --predict PICTURES --load {folder} --out drawn")


def _some_images(records: Records, image_size: int, config: Config) -> Iterator[torch.Tensor]:
    """Batches of unaugmented training images, to re-estimate BatchNorm on."""
    chosen = range(min(config.search.bn_images, len(records)))
    loader = eval_loader(records, chosen, image_size, config.search.batch_size, on_error=config.data.on_error)
    return (batch.images for batch in loader if len(batch) == config.search.batch_size or len(chosen) == len(batch))


def detector_path(args: argparse.Namespace) -> Path:
    """The detector of --load (a file or a run's folder), else of --train-dir, else of the last run."""
    where = args.load or args.train_dir or last_run("final")
    if where is None:
        raise UserError("no detector found: train one with final_train.py, or name its best.pt with --load")
    return where / "best.pt" if where.is_dir() else where


def evaluate_again(args: argparse.Namespace, device: torch.device) -> None:
    """--eval-only: the detector on the test set, as metrics.json has it."""
    path = detector_path(args)
    detector = load_detector(path)
    config = cli.read_config(args, "final", to_dict(detector.config))
    test = load_records(config.data, "test", config.seed)
    model = detector.model.to(device, memory_format=torch.channels_last)
    metrics = evaluate(model, test, config, device, args.pycocotools)
    for name, value in metrics.items():
        if name != "per_class":
            print(f"{name:11} {value:.6f}")
    for name, values in metrics["per_class"].items():
        print(f"  {name}: " + ", ".join(f"{metric} {value:.4f}" for metric, value in values.items()))
    print(f"detector: {path}, epoch {detector.epoch}, {len(test)} test images")


def export_detector(args: argparse.Namespace) -> None:
    """--export: detector.onnx beside the checkpoint, if it passes the gate of lib/parity.py, and export.json."""
    path = detector_path(args)
    loaded = load_detector(path)
    config = cli.read_config(args, "final", to_dict(loaded.config))
    detector = loaded._replace(config=config)
    test = load_records(config.data, "test", config.seed)
    graph, name = export_graph(detector, nms=not args.no_nms), "detector_raw" if args.no_nms else "detector"
    exact, small = (path.with_name(f"{name}{suffix}.onnx") for suffix in ("", "_int8"))
    reports = {exact.name: parity.write_verified(graph, exact, detector, test)}
    if args.int8:
        records = load_records(config.data, "train", config.seed)
        quantized = quantize(graph, _some_images(records, detector.model.image_size, config))
        reports[small.name] = parity.write_measured(quantized, small, detector, test, reports[exact.name]["AP"])
    parity.record(reports, path.parent)
    for file, report in reports.items():
        print(f"wrote {path.with_name(file)}, {report['bytes'] / 1e6:.2f} MB: {parity.describe(report)}")


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(
        __doc__, "supernet run to inherit from; with --eval-only, --export, --predict: the detector"
    )
    cli.add_tensorboard(parser)
    add = parser.add_argument
    add("--genotype", metavar="FILE", help="best.json, pareto.json with --index, or an aw_nas genotype string")
    add("--index", metavar="K", type=int, help="which member of a front, cheapest first, from 0")
    add("--from-scratch", action="store_true", help="start from random weights instead of the supernet's")
    add("--from-pretrained", action="store_true", help="start from backbone.pretrained_path, not from the supernet")
    add("--eval-only", action="store_true", help="evaluate a trained detector on the test set and stop")
    add(
        "--pycocotools",
        action="store_true",
        help="with --eval-only: have pycocotools find COCO's numbers",
    )
    add("--predict", metavar="PATH", nargs="+", help="detect on these pictures, folders or globs and stop")
    add(
        "--export",
        choices=["onnx"],
        help="write a trained detector as detector.onnx, checked on the test set, and stop",
    )
    add("--no-nms", action="store_true", help="with --export: scores and boxes of all priors, as detector_raw.onnx")
    add("--int8", action="store_true", help="with --export: a quantised file as well, with its AP")
    add("--out", metavar="DIR", type=Path, default=Path("drawn"), help="where --predict writes (default: drawn)")
    add("--threshold", type=float, default=0.4, help="lowest score that --predict draws (default: 0.4)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    if args.pycocotools and not args.eval_only:
        raise UserError("--pycocotools: goes with --eval-only")
    if (args.no_nms or args.int8) and not args.export:
        raise UserError("--no-nms and --int8 go with --export onnx")
    device = pick_device(args.device)
    distributed.join(device)
    if args.predict:
        cli.refuse_torchrun("--predict")
        pictures = find_pictures(args.predict)
        draw_pictures(inference.load(detector_path(args), args.device), pictures, args.out, args.threshold)
    elif args.export:
        cli.refuse_torchrun("--export")
        export_detector(args)
    elif args.eval_only:
        evaluate_again(args, device)
    else:
        train(args, device)


if __name__ == "__main__":
    run(main)
