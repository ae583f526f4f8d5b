"""Stage 3: train the chosen sub-network on all of the training data, evaluate it on the test set, use it.

    python final_train.py                                     # the last search's best.json
    python final_train.py --genotype runs/bccd/search/best.json
    python final_train.py --genotype pareto.json --index 2 --set final.epochs=50
    python final_train.py --load runs/bccd/final --data DIR   # that detector on new data, of its or other classes
    torchrun --nproc_per_node=4 final_train.py                # the same training on four GPUs
    python final_train.py --compare                           # does the search pay? others by the same short recipe
    python final_train.py --eval-only                         # the last detector on the test set again
    python final_train.py --eval-only --pycocotools           # with pycocotools' own numbers
    python final_train.py --predict 'photos/*.jpg' --out drawn --tiles 2x2
    python final_train.py --export onnx --int8 --int8-loss 0.01    # detector.onnx, detector_int8.onnx, export.json

Writes best.pt (the detector), last.pt, metrics.json, log.jsonl and curves.png to runs/NAME/final; where it starts from
a detector to runs/NAME/finetuned.
"""

import argparse
import contextlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from torch.utils.data import DataLoader

from lib import UserError, analysis, checkpoint, cli, converters, distributed, export, inference, naming, plan
from lib.annotations import Annotations, without_objects
from lib.config import Config
from lib.config_io import limited, to_dict
from lib.datasets import load_annotations, refuse_seen
from lib.detector import EXPORTED, SSD, Detector, detector_checkpoint, load_detector
from lib.elastic import to_device
from lib.final_training import (
    FinalTraining,
    detect_all,
    final_loader,
    find_start,
    load_supernet_of,
    measure,
    some_images,
    supernet_path,
)
from lib.genotype import Genotype, is_genotype_string, parse_genotype_string, read_genotype_file
from lib.images import find_pictures
from lib.labels import Faults
from lib.latency import describe_parts
from lib.log import duration, say
from lib.metrics import to_pixels
from lib.plain import Bounds, check, read_json
from lib.runtime import pick_device, run, seed_everything
from lib.training_run import read_previous
from lib.trials import Recipe, Trials, contestants, shortened, write_comparison

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
EXPORTS = {  # by value of --export: the packages that it needs, what writes the file, and its suffix
    "onnx": (ONNX_PACKAGES, converters.save_onnx, "onnx"),
    "openvino": ((*ONNX_PACKAGES, "openvino"), converters.save_openvino, "xml"),
    "litert": (("litert_torch", "ai_edge_litert"), converters.save_litert, "tflite"),
}


class Choice(NamedTuple):
    """The genotype that a command was given: its name, and the content of its file (empty for a genotype string)."""

    name: str
    content: dict

    def genotype(self, space) -> Genotype:
        """The genotype itself, which `space` must hold."""
        with naming(self.name[:60]):
            found = Genotype.from_dict(self.content) if self.content else parse_genotype_string(self.name, space)
            space.check(found)
        return found


def chosen_genotype(command: cli.CommandLine, default: str = "best.json") -> Choice:
    """The genotype of --genotype, else of the key final.genotypes, else `default`."""
    name = command.args.genotype or command.given("final.genotypes") or default
    if is_genotype_string(name):
        if command.args.index is not None:
            raise UserError("--index: goes with a file of genotypes")
        return Choice(name, {})
    return Choice(name, read_genotype_file(cli.find_genotype(name), command.args.index))


def load_data(config: Config) -> tuple[Annotations, Annotations]:
    """The training and the test data, of the same classes."""
    annotations = load_annotations(config.data, "train")
    config.data.classes = list(annotations.classes)
    test = load_annotations(config.data, "test")
    if bool(test.truth.ignore.all()):
        raise UserError(f"{config.data.root}: none of the {len(test)} test images has an object to find")
    paths = ({a.paths[i] for i in range(len(a))} for a in (annotations, test))
    if both := set.intersection(*paths):
        say(f"warning: {len(both)} of {len(test)} test pictures train as well, such as {min(both)}")
    return annotations, test


def train(args: argparse.Namespace, device: torch.device) -> None:
    """Train a genotype from the supernet's weights, or with --from-scratch, --from-pretrained from others."""
    command = cli.CommandLine(args, "final")
    origin = "scratch" if args.from_scratch else "pretrained" if args.from_pretrained else "supernet"
    if origin == "pretrained" and args.cfg and not (args.genotype or command.given("final.genotypes")):
        train_from(command.resolve(), None, origin, args, device)  # the pretrained network itself
        return
    choice = chosen_genotype(command)
    this_run = command.resolve(choice.content.get("config"), f"the genotype file {choice.name}")
    last = this_run.folder / "last.pt"
    if args.resume and last.is_file() and not (args.genotype or command.given("final.genotypes")):
        # A search that went on may have written another best.json since.
        with contextlib.suppress(UserError):  # read_previous says what is wrong with the file
            own = check(checkpoint.read(last).get("genotype", {}), dict, f"{last}: genotype")
            choice = Choice(str(last), {**choice.content, **own})
    train_from(this_run, choice, origin, args, device)


def fine_tune(args: argparse.Namespace, detector_path: Path, device: torch.device) -> None:
    """Go on from a trained detector (--load), on data of the same or other classes, in a folder of its own."""
    if args.from_scratch or args.from_pretrained:
        raise UserError(
            f"--load {args.load}: starts from a detector; --from-scratch and --from-pretrained contradict it"
        )
    command = cli.CommandLine(args, "final")
    detector = load_detector(detector_path)
    settings = to_dict(detector.config)
    if command.given("data.root"):
        settings["data"] |= {"classes": [], "num_classes": 0}  # other data, or labels that have changed since
    # The detector's own genotype, unless another one was asked for.
    named = args.genotype or command.given("final.genotypes")
    choice = chosen_genotype(command) if named else Choice(str(detector_path), detector.genotype.to_dict())
    this_run = command.resolve(settings, f"the detector {detector_path}", folder_name="finetuned")
    if detector_path.parent.resolve() == this_run.folder.resolve():
        raise UserError(f"{this_run.folder}: holds the detector to start from; --train-dir DIR writes elsewhere")
    this_run.config.backbone.pretrained_path = str(detector_path)  # config.yaml names it too
    train_from(this_run, choice, "pretrained", args, device)


def train_from(
    this_run: cli.Run, choice: Choice | None, origin: str, args: argparse.Namespace, device: torch.device
) -> None:
    """The whole of stage 3, from a genotype and the `origin` of its weights to a detector.

    Without a `choice` the genotype is that of the pretrained network.
    """
    folder, config = this_run.folder, this_run.config
    seed_everything(config.seed)
    path = supernet_path(config, choice.content, args.load) if origin == "supernet" else None
    annotations, test = load_data(config)
    config, limit = limited(config, "final", len(annotations))
    previous = read_previous(folder, config, "final") if args.resume else None
    if path and annotations.held_out:
        refuse_seen(path.parent / "split.json", annotations)
    network, pretrained = find_start(origin, config, annotations.classes, path)
    genotype = choice.genotype(network.space) if choice else pretrained
    cost = network.cost(genotype)
    loader = final_loader(annotations, genotype.image_size, config, device)
    # The plan: everything that can be wrong has been checked by now.
    for line in (
        *this_run.describe(),
        *plan.describe_data(
            {"train": (annotations, range(len(annotations))), "test": (test, range(len(test)))},
            network.priors(genotype.image_size),
            config.loss.matched_threshold,
        ),
        f"genotype: {genotype}",
        f"  {cost.flops / 1e6:.1f} M multiply-adds, {cost.params / 1e6:.3f} M parameters",
        *plan.describe_priors(network, config),
        plan.describe_training("final", config.final, len(annotations), loader.batch_sampler.batches_per_epoch),
        *limit,
    ):
        print(line)
    with cli.claim(folder / "last.pt", args):
        if args.dry_run:
            training, scoring = estimate_seconds(config, network.extract(genotype), loader, test, device)
            total, scoring = duration(training + scoring), duration(scoring)
            print(f"estimated time on {device}: about {total}, of which {scoring} to evaluate")
            return
        # The training.
        options = {"inherits": origin != "scratch", "previous": previous, "tensorboard": args.tensorboard}
        options["recipe"] = this_run.config
        training = FinalTraining(config, network, genotype, loader, test, folder=folder, device=device, **options)
        # Only now, since a folder with another training has been refused and is to stay as it was.
        this_run.save_config()
        cli.remember("final", folder)
        training.run()
        if distributed.world().main:
            print(describe_parts(training.measure_latency()))
    best, objective = training.best, config.search.objective
    print(f"best {objective}: epoch {best['epoch']}, AP {best['AP']:.4f}, AP50 {best['AP50']:.4f}")
    print(f"wrote {folder / 'best.pt'}, {folder / 'metrics.json'}, {folder / 'curves.png'}")
    print(f"next: {cli.command('final_train.py', load=folder, predict='PICTURES', out='drawn')}")


def estimate_seconds(
    config: Config, model: SSD, loader: DataLoader, test: Annotations, device: torch.device
) -> tuple[float, float]:
    """Seconds of a training on this device, and of its evaluations, measured on a few seconds of each."""
    settings = config.final
    training = plan.final_seconds(model, config, device, loader)
    evaluations = -(-settings.epochs // settings.eval_every)
    return training, evaluations * plan.detecting_seconds(model, test, config, device)


def compare(args: argparse.Namespace, device: torch.device) -> None:
    """--compare: the found genotype and others, scored with inherited weights, fine-tuned and trained from scratch."""
    command = cli.CommandLine(args, "final")
    choice = chosen_genotype(command)
    if not choice.content:
        raise UserError("--compare: takes a genotype from a file, such as best.json, which names its supernet")
    this_run = command.resolve(choice.content.get("config"), f"the genotype file {choice.name}", folder_name="compare")
    annotations, test = load_data(this_run.config)
    folder, config = this_run.folder, shortened(this_run.config, args.compare_epochs, len(annotations))
    path = supernet_path(config, choice.content, args.load)
    refuse_seen(path.parent / "split.json", annotations)
    supernet = load_supernet_of(path, annotations.classes)
    # The found network's competitors.
    found = choice.genotype(supernet.space)
    written = path.parent / "pretrained_genotype.json"
    pretrained = Genotype.from_dict(read_genotype_file(written)) if written.exists() else None
    networks = contestants(supernet, found, pretrained, args.compare_random, config.seed)
    print("\n".join(this_run.describe()))
    print(f"compare: {len(networks)} networks, each trained twice for {config.final.epochs} epochs")
    for name, genotype in networks.items():
        print(f"  {name}: {supernet.detector.cost(genotype).flops / 1e6:.1f} M multiply-adds")
    with cli.claim(folder / "plan.json", args):
        if args.dry_run:
            loader = final_loader(annotations, found.image_size, config, device)
            seconds = sum(estimate_seconds(config, supernet.detector.extract(found), loader, test, device))
            total, each = duration(2 * len(networks) * seconds), duration(seconds)
            print(f"estimated time on {device}: about {total}, {each} for each training as long as the found network's")
            return
        trials = Trials(Recipe(config, supernet, path, annotations, test, device), folder, networks)
        this_run.save_config()
        trials.run()
        print(write_comparison(trials))
    print(f"wrote {folder / 'compare.json'} and {folder / 'compare.md'}")
    print(f"next: {cli.command('final_train.py', genotype=choice.name)}")


def trained_detector(args: argparse.Namespace) -> Path:
    """The detector of --load (a file or a run's folder), else of --train-dir, else of the last run."""
    where = args.load or args.train_dir or cli.last_run("final")
    if where is None:
        raise UserError("no detector found: train one with final_train.py, or name its best.pt with --load")
    if where.is_dir() and not (where / "best.pt").is_file():
        raise UserError(f"{where / 'best.pt'}: no such checkpoint; --load names another run or detector")
    return where / "best.pt" if where.is_dir() else where


def configured_again(args: argparse.Namespace, path: Path, reads_data: bool = True) -> Detector:
    """The detector in `path`, with its configuration changed by --cfg, flags and --set."""
    detector = load_detector(path)
    command = cli.CommandLine(args, "final")
    config = command.resolve(to_dict(detector.config), f"the detector {path}", reads_data=reads_data).config
    config.data.classes = list(detector.classes)  # other data may have them in another order
    return detector._replace(config=config)


def evaluate_again(args: argparse.Namespace, device: torch.device) -> None:
    """--eval-only: the detector on the test set, as metrics.json has it, and its detections as COCO's results."""
    path = trained_detector(args)
    detector = configured_again(args, path)
    test = load_annotations(detector.config.data, "test")
    model = to_device(detector.model, device)
    found = detect_all(model, test, detector.config, device)
    metrics = measure(found, test, args.pycocotools)
    for name, value in metrics.items():
        if name != "per_class":
            print(f"{name:11} {value:.6f}")
    for name, values in metrics["per_class"].items():
        print(f"  {name}: " + ", ".join(f"{metric} {value:.4f}" for metric, value in values.items()))
    for note in test.notes:
        print(f"note: {note}")
    with contextlib.suppress(UserError):  # there is none, or none that can be read
        trained = path.with_name("metrics.json")
        if check(read_json(trained), dict, str(trained)).get("data") not in (None, test.fingerprint()):
            print(f"note: {trained} is of other test pictures, or of other labels")
    print(f"detector: {path}, epoch {detector.epoch}, {len(test)} test images")
    if distributed.world().main:
        results = []
        for i, detections in enumerate(found):
            in_pixels = to_pixels(detections, *test.sizes[i].tolist())
            results += inference.coco_results(test.image_id(i), in_pixels, test.category_ids)
        written = path.with_name("detections_test.json")
        checkpoint.write_text(written, json.dumps(results) + "\n")
        print(f"detections: {written}")
        analysis.write_analysis(found, test, metrics, path)
        print(f"analysis: {path.with_name('analysis.html')}, {path.with_name('analysis.json')}")


def export_detector(args: argparse.Namespace) -> None:
    """--export: the detector beside its checkpoint, if it passes the parity gate of lib/export.py, and export.json."""
    packages, save, suffix = EXPORTS[args.export]
    converters.require(*packages)  # before the minutes that a conversion takes
    path = trained_detector(args)
    detector = configured_again(args, path, reads_data=not args.calibrate)
    config = detector.config
    if args.calibrate:
        faults = Faults(config.data.on_error, config.data.max_skipped)
        test = without_objects(find_pictures(args.calibrate), detector.classes, faults)
    else:
        test = load_annotations(config.data, "test")

    def keep(file: Path, report: dict) -> dict:
        """Report a file as soon as it is written: a later one may fail."""
        export.update_report({file.name: report}, file.parent)
        print(f"wrote {file}, {report['bytes'] / 1e6:.2f} MB: {export.describe(report)}")
        return report

    if args.export == "litert":
        name, model = "detector_raw", detector  # converted from PyTorch, and without NMS
        config.data.workers = 0  # the converter starts threads, and a process with threads must not fork
    else:
        name = "detector_raw" if args.no_nms else "detector"
        model = export.export_graph(detector, nms=not args.no_nms)
    file = path.with_name(f"{name}.{suffix}")
    exact_ap = keep(file, export.write(model, file, detector, test, save=save))["AP"]
    if args.half:
        file = path.with_name(f"{name}_half.{suffix}")
        keep(file, export.write(model, file, detector, test, exact_ap, partial(save, half=True)))
    if args.int8:
        file = path.with_name(f"{name}_int8.{suffix}")
        seen = test if args.calibrate else load_annotations(config.data, "train")
        images = list(some_images(seen, detector.model.image_size, config))
        keep(file, export.write_int8(model, file, detector, test, exact_ap, images, args.int8_loss, save))


def predict(args: argparse.Namespace) -> None:
    """--predict: pictures with what the detector finds in them, and detections.json."""
    threshold = None
    if args.threshold != "auto":
        threshold = check(args.threshold, Annotated[float, Bounds(0, 1)], "--threshold")
    inference.tile_places(args.tiles, 1, 1)  # raises if it is none
    path, pictures = trained_detector(args), find_pictures(args.predict)
    own_ids = {}
    if path.suffix not in EXPORTED:
        loaded = configured_again(args, path, reads_data=False)
        detector = inference.torch_detector(loaded, args.device)
        own_ids = inference.find_own_ids(pictures, loaded.config.data)
    elif args.cfg or args.set or args.data:
        raise UserError(f"{path}: an exported file has its settings inside; --cfg, --set and --data work with best.pt")
    else:
        detector = inference.load(path)
    detector.tiles = args.tiles
    why = "--threshold"
    if threshold is None:
        threshold, why = detector.threshold, f"the best F1 on the test pictures, from {path.name}"
    if threshold is None:
        threshold, why = inference.DEFAULT_THRESHOLD, f"the default: {path.name} was saved without that of the best F1"
    print(f"threshold {threshold:.3g}: {why}")
    inference.draw_pictures(detector, inference.plan_jobs(pictures, own_ids), args.out or Path("drawn"), threshold)


def make_parser() -> argparse.ArgumentParser:
    load_help = "supernet or detector to start from; with --eval-only, --export and --predict the detector to use"
    parser = cli.make_parser(__doc__, load_help)
    add = parser.add_argument
    add("--tensorboard", action="store_true", help="also log for TensorBoard")
    add("--genotype", metavar="FILE", help="best.json, pareto.json with --index, or an aw_nas genotype string")
    add("--index", metavar="K", type=int, help="member of pareto.json or top.json, counted from 0")
    add("--from-scratch", action="store_true", help="start from random weights instead of the supernet's")
    add("--from-pretrained", action="store_true", help="start from backbone.pretrained_path, not from the supernet")
    add("--compare", action="store_true", help="train the genotype and competitors by a short recipe")
    add("--compare-random", metavar="N", type=int, default=2, help="random competitors of similar cost (default: 2)")
    add("--compare-epochs", metavar="N", type=int, help="epochs of each (default: a quarter of final.epochs)")
    add("--eval-only", action="store_true", help="evaluate a trained detector on the test set and stop")
    add("--pycocotools", action="store_true", help="with --eval-only: compute COCO's numbers with pycocotools")
    add("--predict", metavar="PATH", nargs="+", help="detect on these pictures, folders or globs and stop")
    add("--out", metavar="DIR", type=Path, help="where --predict writes (default: drawn)")
    add("--threshold", metavar="SCORE", default="auto", help="of --predict (default: auto, that of the best F1)")
    add("--tiles", metavar="TILES", default="1x1", help="of --predict: 2x2 of them, or 640 pixels a side")
    add("--export", choices=list(EXPORTS), help="export a trained detector, verified on the test set, and stop")
    add("--no-nms", action="store_true", help="with --export: output the scores and boxes of all prior boxes")
    add("--int8", action="store_true", help="with --export: write an int8 file as well and report its AP")
    add("--int8-loss", metavar="AP", type=float, help="with --int8: most AP to lose; some layers stay in float")
    add("--half", action="store_true", help="with --export openvino: write a file with fp16 weights as well")
    add("--calibrate", metavar="PATH", nargs="+", help="with --export: compare on these pictures, not on the data set")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    modes = {"--predict": args.predict, "--export": args.export, "--eval-only": args.eval_only}
    works = any(modes.values())
    chosen = [flag for flag, given in {**modes, "--compare": args.compare}.items() if given]
    starts = args.from_scratch or args.from_pretrained
    bounded = args.int8_loss is None or (args.int8 and not args.calibrate and 0 <= args.int8_loss <= 1)
    for wrong, message in (
        (len(chosen) > 1, f"{' and '.join(chosen)}: a command does one of them"),
        (args.from_scratch and args.from_pretrained, "--from-scratch and --from-pretrained contradict each other"),
        (starts and chosen, "--from-scratch and --from-pretrained: go with training"),
        (works and (args.genotype or args.index is not None), "--genotype and --index: go with training and --compare"),
        (args.compare_epochs is not None and not args.compare, "--compare-epochs: goes with --compare"),
        (
            args.compare_epochs is not None and args.compare_epochs < 1,
            f"--compare-epochs {args.compare_epochs}: expected at least 1",
        ),
        (args.compare_random < 0, f"--compare-random {args.compare_random}: expected 0 or more"),
        (args.dry_run and works, "--dry-run: goes with training and with --compare"),
        (args.pycocotools and not args.eval_only, "--pycocotools: goes with --eval-only"),
        (args.tiles != "1x1" and not args.predict, "--tiles: goes with --predict"),
        (args.threshold != "auto" and not args.predict, "--threshold: goes with --predict"),
        (args.out is not None and not args.predict, "--out: goes with --predict"),
        (not bounded, "--int8-loss: expected a loss of AP from 0 to 1, with --int8 and without --calibrate"),
        (args.no_nms and not args.export, "--no-nms: goes with --export"),
        (args.calibrate and not args.export, "--calibrate: goes with --export"),
        (args.half and args.export != "openvino", "--half: goes with --export openvino"),
        (args.int8 and args.export not in ("onnx", "openvino"), "--int8: goes with --export onnx or openvino"),
    ):
        if wrong:
            raise UserError(message)
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
    elif args.load and (detector_path := detector_checkpoint(args.load)):
        fine_tune(args, detector_path, device)
    else:
        train(args, device)


if __name__ == "__main__":
    run(main)
