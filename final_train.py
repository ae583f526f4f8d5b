"""Stage 3: train the chosen sub-network on all of the training data, evaluate it on the test set, use it.

    python final_train.py                                     # the last search's best.json
    python final_train.py --genotype runs/bccd/search/best.json
    python final_train.py --genotype pareto.json --index 2 --set final.epochs=50
    python final_train.py --load runs/bccd/final --data DIR   # that detector on new data, of its or other classes
    torchrun --nproc_per_node=4 final_train.py                # the same training on four GPUs
    python final_train.py --compare                           # does the search pay? others by the same short recipe
    python final_train.py --eval-only                         # the last detector on the test set again
    python final_train.py --eval-only --pycocotools           # with pycocotools' own numbers
    python final_train.py --predict 'photos/*.jpg' --out drawn
    python final_train.py --export onnx --int8                # detector.onnx, detector_int8.onnx, export.json

Writes best.pt (the detector), last.pt, metrics.json, log.jsonl and curves.png to runs/NAME/final; where it starts from
a detector to runs/NAME/finetuned.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from lib import cli, distributed, export, inference, plan
from lib.annotations import Annotations
from lib.cli import find_genotype, last_run, remember
from lib.config import Config
from lib.config_io import from_dict, to_dict, with_overrides
from lib.datasets import configured_train_loader, load_annotations
from lib.detector import SSD, detector_checkpoint, load_detector
from lib.errors import UserError
from lib.export import export_graph, quantize
from lib.final_training import (
    evaluate,
    find_start,
    find_teacher,
    load_supernet_of,
    make_training,
    some_images,
    supernet_path,
)
from lib.genotype import Genotype, is_genotype_string, parse_genotype_string, read_genotype_file
from lib.images import find_pictures
from lib.latency import describe_parts
from lib.log import duration
from lib.plan import preflight
from lib.runtime import pick_device, run, seed_everything
from lib.trials import Contest, contestants, shortened


def load_data(config: Config) -> tuple[Annotations, Annotations]:
    """The training and the test data, of the same classes."""
    annotations = load_annotations(config.data, "train")
    config.data.classes = list(annotations.classes)
    test = load_annotations(config.data, "test")
    if bool(test.ignore.all()):
        raise UserError(f"{config.data.root}: none of the {len(test)} test images has an object to find")
    return annotations, test


def starting_point(args: argparse.Namespace) -> tuple[str, Path | None]:
    """Where the weights come from: "scratch", "pretrained" or "supernet"; and the detector of --load, if it is one."""
    other = detector_checkpoint(args.load) if args.load else None
    if other and (args.from_scratch or args.from_pretrained):
        raise UserError(f"--load {args.load}: a detector to start from, which --from-scratch, --from-pretrained deny")
    return "scratch" if args.from_scratch else "pretrained" if args.from_pretrained or other else "supernet", other


def chosen_genotype(args: argparse.Namespace, other: Path | None) -> tuple[str, dict]:
    """The genotype's name, and the content of its file (of a string only the configuration, if any).

    It is that of --genotype, else the configuration's, else that of `other`, a detector, else best.json.
    """
    name = args.genotype or cli.said_config(args, "final").final.genotypes
    source = {}
    if not is_genotype_string(name) and (name or not other):
        source = read_genotype_file(find_genotype(name or "best.json"), args.index)
    if other:
        detector = load_detector(other)
        settings = to_dict(detector.config)
        changed = from_dict(with_overrides(settings, cli.overrides(args, "final")))
        if args.data or changed.data.root != settings["data"]["root"]:
            settings["data"] |= {"classes": [], "num_classes": 0}  # those of the new data
        source = {**(source or detector.genotype.to_dict()), "config": settings}
    return name, source


def train(args: argparse.Namespace, device: torch.device) -> None:
    """The whole of stage 3, from a genotype to a detector."""
    origin, other = starting_point(args)
    name, source = chosen_genotype(args, other)
    kind = "finetuned" if other else "final"
    config = cli.read_config(args, "final", source.get("config"), kind)
    if other:
        config.backbone.pretrained_path = str(other)  # which config.yaml then says too
    folder = cli.run_folder(args, config, kind)
    if other and other.parent.resolve() == folder.resolve():
        raise UserError(f"{folder}: holds the detector to start from; --train-dir DIR writes elsewhere")
    seed_everything(config.seed)
    annotations, test = load_data(config)
    start = find_start(origin, config, source, annotations.classes, args.load)
    network = start.network
    as_text = is_genotype_string(name)
    genotype = parse_genotype_string(name, network.space) if as_text else Genotype.from_dict(source)
    network.space.check(genotype)
    teacher, cost = find_teacher(start, config, genotype, annotations.classes), network.cost(genotype)
    everything, batch_size = range(len(annotations)), config.final.batch_size
    loader = configured_train_loader(annotations, everything, genotype.image_size, batch_size, config, device)
    for line in (
        *preflight(annotations, everything, network.priors(genotype.image_size), config.loss.matched_threshold),
        f"test set: {len(test)} images",
        f"genotype: {genotype}",
        f"  {cost.flops / 1e6:.1f} M multiply-adds, {cost.params / 1e6:.3f} M parameters",
        *plan.describe_priors(network, config),
        plan.describe_training("final", config.final, len(annotations), loader.batch_sampler.batches_per_epoch),
    ):
        print(line)
    cli.refuse_to_overwrite(folder / "last.pt", args)
    if args.dry_run:
        model = network.extract(genotype)
        training, scoring = estimate_seconds(config, model, loader, teacher, test, device)
        print(f"time on {device}: about {duration(training + scoring)}, of which {duration(scoring)} to evaluate")
        return
    cli.save_config(config, folder)
    remember("final", folder)
    options = {"resume": args.resume, "tensorboard": args.tensorboard}
    training = make_training(config, folder, start, genotype, teacher, loader, test, device, **options)
    if not training.run():
        print(f"stopped; everything is in {folder / 'last.pt'}, the same command with --resume goes on")
        return
    if distributed.world().main:
        print(describe_parts(training.measure_latency()))
    print(f"best: epoch {training.best['epoch']}, AP {training.best['AP']:.4f}, AP50 {training.best['AP50']:.4f}")
    print(f"wrote {folder / 'best.pt'}, {folder / 'metrics.json'}, {folder / 'curves.png'}")
    print(f"next: python final_train.py --predict PICTURES --load {folder} --out drawn")


def estimate_seconds(
    config: Config, model: SSD, loader: DataLoader, teacher: SSD | None, test: Annotations, device: torch.device
) -> tuple[float, float]:
    """Seconds of a training on this device, and of its evaluations, from some seconds of each kind of work."""
    settings = config.final
    if teacher is not None:
        teacher.to(device, memory_format=torch.channels_last)
    training = plan.final_seconds(model, config, device, loader, teacher)
    evaluations = -(-settings.epochs // settings.eval_every)
    return training, evaluations * plan.detecting_seconds(model, test, config, device)


def compare(args: argparse.Namespace, device: torch.device) -> None:
    """--compare: the found genotype and others, scored with inherited weights, fine-tuned and trained from scratch."""
    name, source = chosen_genotype(args, None)
    if is_genotype_string(name):
        raise UserError("--compare: takes a genotype from a file, such as best.json, which names its supernet")
    whole = cli.read_config(args, "final", source.get("config"), "compare")
    folder, config = cli.run_folder(args, whole, "compare"), shortened(whole, args.compare_epochs)
    annotations, test = load_data(config)
    path = supernet_path(config, source, args.load)
    supernet = load_supernet_of(path, annotations.classes)
    written = path.parent / "pretrained_genotype.json"
    pretrained = Genotype.from_dict(read_genotype_file(written)) if written.exists() else None
    found, flops = Genotype.from_dict(source), (lambda genotype: supernet.detector.cost(genotype).flops)
    chosen = contestants(supernet.space, flops, found, pretrained, args.compare_random, config.seed)
    print(f"compare: {len(chosen)} networks, each trained twice for {config.final.epochs} epochs")
    for contestant, genotype in chosen.items():
        print(f"  {contestant}: {flops(genotype) / 1e6:.1f} M multiply-adds")
    cli.refuse_to_overwrite(folder / "plan.json", args)
    if args.dry_run:
        print_compare_estimate(config, supernet.detector.extract(found), len(chosen), annotations, test, device)
        return
    contest = Contest(config, folder, supernet, path, chosen, annotations, test, device)
    cli.save_config(whole, folder)
    if not contest.run():
        print(f"stopped; everything is in {folder}, the same command with --resume goes on")
        return
    print(contest.write())
    print(f"wrote {folder / 'compare.json'}, {folder / 'compare.md'}, {folder / 'compare.png'}")
    print(f"next: python final_train.py --genotype {name or 'best.json'}")


def print_compare_estimate(
    config: Config, found: SSD, count: int, annotations: Annotations, test: Annotations, device: torch.device
) -> None:
    """How long --compare will take, if each of its trainings takes as long as that of the network that was found."""
    data = annotations, range(len(annotations)), found.image_size, config.final.batch_size
    loader = configured_train_loader(*data, config, device)
    seconds = sum(estimate_seconds(config, found, loader, None, test, device))
    print(
        f"time on {device}: about {duration(2 * count * seconds)}, {2 * count} trainings of about {duration(seconds)} "
        "(the found network's; a teacher, if there is one, apart)"
    )


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
    test = load_annotations(config.data, "test")
    model = detector.model.to(device, memory_format=torch.channels_last)
    metrics = evaluate(model, test, config, device, args.pycocotools)
    for name, value in metrics.items():
        if name != "per_class":
            print(f"{name:11} {value:.6f}")
    for name, values in metrics["per_class"].items():
        print(f"  {name}: " + ", ".join(f"{metric} {value:.4f}" for metric, value in values.items()))
    print(f"detector: {path}, epoch {detector.epoch}, {len(test)} test images")


def export_detector(args: argparse.Namespace) -> None:
    """--export: detector.onnx beside the checkpoint, if it passes the gate of lib/export.py, and export.json."""
    path = detector_path(args)
    loaded = load_detector(path)
    config = cli.read_config(args, "final", to_dict(loaded.config))
    detector = loaded._replace(config=config)
    test = load_annotations(config.data, "test")
    graph, name = export_graph(detector, nms=not args.no_nms), "detector_raw" if args.no_nms else "detector"
    exact, small = (path.with_name(f"{name}{suffix}.onnx") for suffix in ("", "_int8"))
    reports = {exact.name: export.write_verified(graph, exact, detector, test)}
    if args.int8:
        annotations = load_annotations(config.data, "train")
        quantized = quantize(graph, some_images(annotations, detector.model.image_size, config))
        reports[small.name] = export.write_measured(quantized, small, detector, test, reports[exact.name]["AP"])
    export.update_report(reports, path.parent)
    for file, report in reports.items():
        print(f"wrote {path.with_name(file)}, {report['bytes'] / 1e6:.2f} MB: {export.describe(report)}")


def predict(args: argparse.Namespace) -> None:
    """--predict: pictures with what the detector finds in them, and detections.json."""
    path, pictures = detector_path(args), find_pictures(args.predict)
    detector = inference.load(path, args.device)
    if isinstance(detector, inference.TorchDetector):
        detector.config = cli.read_config(args, "final", to_dict(detector.config))
    elif args.cfg or args.set:
        raise UserError(f"{path}: has its rules inside, --cfg and --set change nothing; they go with best.pt")
    inference.draw_pictures(detector, pictures, args.out, args.threshold)


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(
        __doc__,
        "run to start from: a supernet, or a detector, also of other classes; with --eval-only, --export, --predict: "
        "the detector",
    )
    cli.add_tensorboard(parser)
    add = parser.add_argument
    add("--genotype", metavar="FILE", help="best.json, pareto.json with --index, or an aw_nas genotype string")
    add(
        "--index",
        metavar="K",
        type=int,
        help="which member of pareto.json (cheapest first) or top.json (best first), from 0",
    )
    add("--from-scratch", action="store_true", help="start from random weights instead of the supernet's")
    add("--from-pretrained", action="store_true", help="start from backbone.pretrained_path, not from the supernet")
    add("--compare", action="store_true", help="train the genotype and others in short, to see what the search gave")
    add("--compare-random", metavar="N", type=int, default=2, help="random ones of similar multiply-adds (default: 2)")
    add("--compare-epochs", metavar="N", type=int, help="of each short training (default: a quarter of final.epochs)")
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
    if args.dry_run and (args.predict or args.export or args.eval_only):
        raise UserError("--dry-run: goes with training and with --compare")
    if args.pycocotools and not args.eval_only:
        raise UserError("--pycocotools: goes with --eval-only")
    if (args.no_nms or args.int8) and not args.export:
        raise UserError("--no-nms and --int8 go with --export onnx")
    device = pick_device(args.device)
    distributed.join(device)
    if args.predict:
        cli.refuse_torchrun("--predict")
        predict(args)
    elif args.export:
        cli.refuse_torchrun("--export")
        export_detector(args)
    elif args.compare:
        cli.refuse_torchrun("--compare")
        compare(args, device)
    elif args.eval_only:
        evaluate_again(args, device)
    else:
        train(args, device)


if __name__ == "__main__":
    run(main)
