"""What the benches share: their flags, timing in turns, the reference space and its training steps, and the peer.

The speed of a machine drifts. So a figure is a ratio of times that were taken in the same round, and the median of the
ratios of several rounds; a table shows it with its 10% and 90% quantiles.
"""

import argparse
import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import random
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection import ssdlite320_mobilenet_v3_large

# A bench imports this file before any of lib, so it can be started in any folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib import UserError, checkpoint, config_io, scoring
from lib.cli import supernet_checkpoint
from lib.config import Config, TrainConfig
from lib.config_io import to_dict
from lib.datasets import Batch, load_annotations, load_split
from lib.detector import SSD, ElasticSSD, Supernet
from lib.elastic import to_device
from lib.final_training import detection_losses, launched
from lib.genotype import Genotype, SearchSpace
from lib.log import progress
from lib.losses import DetectionLoss
from lib.runtime import device_name, pick_device
from lib.training import Losses, Trainer
from supernet_train import supernet_losses

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "configs" / "voc_mbv3.yaml"
CPU = torch.device("cpu")
TOLERANCE = 1e-4  # of the largest value: the same sums in another order

Clock = Callable[[], float]  # seconds
TimedRun = Callable[[], float]  # does its work and returns the seconds that it took
Step = Callable[[Batch], dict[str, float]]  # a training step with the optimizer's; returns the losses before it


def bench_parser(doc: str, out: str, rounds: int = 0, threads: int = 2, device: bool = False) -> ArgumentParser:
    """--out; with `rounds`, for runs that take turns, --rounds and --threads; with `device`, --device."""
    parser = ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(out), help=f"JSON file to write (default: {out})")
    if rounds:
        parser.add_argument("--rounds", type=int, default=rounds, help=f"turns of each run (default: {rounds})")
        parser.add_argument("--threads", type=int, default=threads, help=f"CPU threads (default: {threads})")
    if device:
        parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N or N (default: cpu)")
    return parser


def begin(args: argparse.Namespace) -> Clock:
    """Apply --threads and --device; return the clock to time with."""
    torch.set_num_threads(args.threads)
    args.device = pick_device(getattr(args, "device", "cpu"))
    return clock_of(args.device)


def clock_of(device: torch.device) -> Clock:
    """Seconds; on a GPU, once its queue is empty."""
    if device.type == "cpu":
        return time.perf_counter

    def synchronised() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronised


def report(args: argparse.Namespace, rows: Sequence[dict], **more: object) -> None:
    """Print `rows` as a Markdown table with their keys as the head; write them, the flags and the machine as JSON."""
    print(", ".join(f"{name} {value}" for name, value in vars(args).items()))
    print_table(rows)
    machine = {"processor": device_name(CPU), "threads": torch.get_num_threads()}
    content = {"machine": machine, "flags": vars(args), "rows": rows, **more}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(content, indent=1, default=str) + "\n")
    print(f"wrote {args.out}")


def print_table(rows: Sequence[dict]) -> None:
    for cells in (rows[0], ["---"] * len(rows[0]), *(map(_cell, row.values()) for row in rows)):
        print(f"| {' | '.join(cells)} |")


def _cell(value: object) -> str:
    """A `spread` is shown as its median, with 10% to 90% in brackets."""
    if isinstance(value, dict):
        digits = max(0, 2 - math.floor(math.log10(value["median"])))
        return "{median:.{0}f} ({p10:.{0}f} to {p90:.{0}f})".format(digits, **value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def run_stage(script: str, folder: Path, flags: Sequence[object], jobs: int) -> None:
    """Run or resume one of the three scripts in `folder`, as one of `jobs` that share the cores."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, ROOT / script, *flags, "--train-dir", folder, "--resume"]
    env = {**os.environ, "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // jobs))}
    with (folder / "stdout.txt").open("a") as file:
        subprocess.run(list(map(str, command)), check=True, stdout=file, stderr=file, env=env)


def trainings_parser(doc: str) -> ArgumentParser:
    """The flags of a bench that trains sub-networks of a supernet alone, by `train_alone`."""
    parser = ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--supernet", type=Path, required=True, help="folder of a supernet run")
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each (default: 2)")
    parser.add_argument("--epochs", type=int, default=4, help="of each training (default: 4)")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, which share the cores (default: 2)")
    parser.add_argument("--out", type=Path, help="folder (default: SUPERNET/../rank_correlation)")
    return parser


def random_of_cost(supernet: Supernet, share: float, count: int) -> list[Genotype]:
    """Random sub-networks with `share` of the largest one's multiply-adds, to 2.5%."""
    rng, cost = random.Random(1), supernet.detector.cost
    target = share * cost(supernet.space.largest()).flops
    found: list[Genotype] = []
    while len(found) < count:
        genotype = supernet.space.sample_spread(rng)
        if abs(cost(genotype).flops / target - 1) < 0.025 and genotype not in found:
            found.append(genotype)
    return found


def train_alone(args: argparse.Namespace, genotype: Genotype, supernet: Supernet, seed: int) -> dict:
    """final_train.py on one genotype of the supernet in `args.supernet`; its metrics at the end.

    The folder in `args.out` has the genotype's hash and the seed as its name, so benches with the same folder share it.
    """
    name = hashlib.sha256(str(genotype).encode()).hexdigest()[:10]
    folder, path = args.out / f"{name}-{seed}", supernet_checkpoint(args.supernet)
    source = {"supernet": {"path": str(path), "sha256": checkpoint.sha256(path)}, "config": to_dict(supernet.config)}
    if not (folder / "genotype.json").exists():
        checkpoint.write_text(folder / "genotype.json", json.dumps({**genotype.to_dict(), **source}))
    flags = ["--genotype", folder / "genotype.json", "--seed", seed]
    for key in ("epochs", "eval_every"):  # no choice of the best of several evaluations, which would favour noise
        flags += ["--set", f"final.{key}={args.epochs}"]
    metrics = folder / "metrics.json"
    if not metrics.exists() or "latency" not in json.loads(metrics.read_text()):  # which is measured last
        run_stage("final_train.py", folder, flags, args.jobs)
    return json.loads(metrics.read_text())


def timed(run: Callable[[], object], clock: Clock) -> TimedRun:
    def call() -> float:
        start = clock()
        run()
        return clock() - start

    return call


def take_turns(runs: Mapping[str, TimedRun], rounds: int, warm_up: int = 1) -> dict[str, np.ndarray]:
    """Seconds (rounds,) of each run. A round calls each run once, in random order; `warm_up` rounds are discarded."""
    rng = random.Random(0)
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    bar = progress(None, "measure", total=(warm_up + rounds) * len(names))
    for i in range(warm_up + rounds):
        rng.shuffle(names)
        for name in names:
            took = runs[name]()
            bar.update()
            if i >= warm_up:
                seconds[name].append(took)
    bar.close()
    return {name: np.array(values) for name, values in seconds.items()}


def spread(values: np.ndarray) -> dict[str, float]:
    """Median, 10% and 90% quantile."""
    low, median, high = np.percentile(values, (10, 50, 90)).tolist()
    return {"median": median, "p10": low, "p90": high}


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> dict[str, float]:
    """`spread` of the ratios of times that were taken in the same round."""
    return spread(numerator / denominator)


def check_equal(what: str, a: Tensor, b: Tensor) -> float:
    """The largest difference, in units of the largest value of `b`. Raises UserError if it is above `TOLERANCE`."""
    gap = float((a - b).abs().max() / b.abs().max())
    if a.shape != b.shape or not gap <= TOLERANCE:
        raise UserError(f"{what}: the two sides differ by {gap:.1e} of the largest value, expected at most {TOLERANCE}")
    return gap


def reference(num_classes: int = 3) -> tuple[Config, ElasticSSD]:
    """The reference MobileNetV3 space at 300 px, with random weights."""
    config = config_io.read_config(REFERENCE, [f"data.num_classes={num_classes}"])
    torch.manual_seed(0)
    return config, ElasticSSD(config, num_classes)


def random_genotypes(detector: ElasticSSD, count: int) -> list[Genotype]:
    rng = random.Random(0)
    return [detector.space.sample(rng) for _ in range(count)]


def median_genotype(detector: ElasticSSD, count: int = 101) -> Genotype:
    """The median of `count` random genotypes by multiply-adds."""
    return sorted(random_genotypes(detector, count), key=lambda g: detector.cost(g).flops)[count // 2]


def genotypes_by_cost(detector: ElasticSSD, space: SearchSpace, count: int) -> list[Genotype]:
    """The smallest, the largest and `count` - 2 random genotypes, their multiply-adds evenly spread between the two."""
    rng = random.Random(0)
    ends = space.smallest(), space.largest()
    drawn = [space.sample_spread(rng) for _ in range(500)]
    low, high = (detector.cost(genotype).flops for genotype in ends)
    chosen = [ends[0]]
    for target in np.linspace(low, high, count)[1:-1]:
        others = (genotype for genotype in drawn if genotype not in chosen)
        chosen.append(min(others, key=lambda genotype: abs(detector.cost(genotype).flops - target)))
    return [*chosen, ends[1]]


def random_batch(images: int, size: int, objects: int, num_classes: int) -> Batch:
    """Noise with random boxes: sides from a twentieth to four fifths of the picture."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8, generator=generator)
    sides = 0.05 * 16 ** torch.rand(images, objects, 2, generator=generator)
    corner = torch.rand(images, objects, 2, generator=generator) * (1 - sides)
    labels = torch.randint(1, num_classes + 1, (images, objects), generator=generator)
    return Batch(pixels, torch.cat([corner, corner + sides], -1), labels, torch.arange(images))


def outputs(result: tuple[Tensor, Tensor]) -> Tensor:
    """A detector's logits and offsets as one tensor, to compare."""
    return torch.cat([part.flatten(1) for part in result], 1)


class SupernetSteps:
    """`steps(batch, genotype)` is a step of supernet_train.py: matching, network, losses, gradients, optimizer.

    `weight` is that of distillation from the largest sub-network.
    """

    def __init__(self, detector: ElasticSSD, config: Config, device: torch.device, weight: float = 0.0):
        self.detector = detector.train()
        self.distillation = config.supernet.distill
        self.weight = weight
        self.loss = DetectionLoss(config.loss, config.head.variances)
        self.trainer = Trainer(to_device(detector, device), config.supernet, device, batches_per_epoch=2**31)

    def losses(self, batch: Batch, genotype: Genotype) -> Iterator[Losses]:
        return supernet_losses(self.detector, self.loss, batch, [genotype], self.distillation, self.weight)

    def __call__(self, batch: Batch, genotype: Genotype) -> dict[str, float]:
        return _losses(self.trainer, self.losses(batch, genotype))


def plain_step(model: SSD, config: Config, training: TrainConfig, device: torch.device) -> Step:
    """A step of final_train.py on a plain detector, with the optimizer of `training`."""
    final = training is config.final
    to_device(model, device, trains_in_half=final and training.precision != "fp32")
    trainer = Trainer(model.train(), training, device, batches_per_epoch=2**31)
    loss = DetectionLoss(config.loss, config.head.variances)
    network = None if final else model

    def step(batch: Batch) -> dict[str, float]:
        nonlocal network
        network = network or launched(model, training, len(batch.images), device)
        targets = loss.match(batch.boxes, batch.labels, model.priors)
        return _losses(trainer, detection_losses(network, loss, batch, targets))

    return step


def _losses(trainer: Trainer, losses: Iterator[Losses]) -> dict[str, float]:
    """The losses of one step, read at once."""
    return (trainer.update(losses) or trainer.read_losses())[0]


def scoring_data(images: int, bn_images: int, objects: int, num_classes: int, size: int = 300) -> dict:
    """Random pictures with random objects, in the form of `prepare_scoring_data`."""
    batch = random_batch(bn_images + images, size, objects, num_classes)
    ignore = torch.zeros(objects, dtype=torch.bool)
    return {
        "bn_images": {size: batch.images[:bn_images]},
        "images": {size: batch.images[bn_images:]},
        "truth": [
            {"boxes": size * boxes, "labels": labels, "ignore": ignore}
            for boxes, labels in zip(batch.boxes[bn_images:], batch.labels[bn_images:], strict=True)
        ],
        "sizes": [[size, size]] * images,
        "classes": [f"class {i + 1}" for i in range(num_classes)],
    }


class TimedScore:
    """`score(genotype)` returns the seconds that a search worker takes for a candidate, `recalibrate` left out."""

    def __init__(self, data: dict, config: Config, detector: ElasticSSD, device: torch.device, clock: Clock):
        self.scorer = scoring.Scorer(data, config, device)
        self.detector = detector
        self.clock = clock

    def __call__(self, genotype: Genotype) -> float:
        apart = 0.0

        def recalibrate(model: nn.Module, images: Iterable[Tensor], device: torch.device) -> None:
            nonlocal apart
            start = self.clock()
            original(model, images, device)
            apart += self.clock() - start

        original = scoring.recalibrate
        with mock.patch.object(scoring, "recalibrate", recalibrate):
            start = self.clock()
            self.metrics = self.scorer(self.detector, genotype)["metrics"]
            return self.clock() - start - apart


def run_scorers(supernet: Supernet, folder: Path) -> tuple[scoring.Scorer, scoring.Scorer]:
    """Scorers of the supernet in `folder` on its search split and on the test set, with the same BatchNorm pictures."""
    config = supernet.config
    search = search_split_data(supernet, folder)  # sets the classes
    test_annotations = load_annotations(config.data, "test")
    test = scoring.prepare_scoring_data(test_annotations, range(2), range(len(test_annotations)), config)
    return scoring.Scorer(search, config, CPU), scoring.Scorer({**test, "bn_images": search["bn_images"]}, config, CPU)


def search_split_data(supernet: Supernet, folder: Path) -> dict:
    """The pictures and the ground truth on which the search scores candidates of the supernet in `folder`."""
    supernet.config.data.classes = list(supernet.classes)
    annotations = load_annotations(supernet.config.data, "train")
    train, search = load_split(folder / "split.json", annotations)
    return scoring.prepare_scoring_data(annotations, train, search, supernet.config)


PEER_SIZE = 320
BACKGROUND = 9.0  # logit that makes every prior box sure of the background, so that nothing enters NMS


class Peer:
    """`peer.call(name, *arguments)` calls a method of `PeerProcess`; `peer.timed` makes a `TimedRun` of it.

    It is a process of its own, because the C allocator's settings (lib/runtime.py) hold for a whole process, and the
    peer is timed without them. An error in it ends it, and the call that waits for it with EOFError.
    """

    def __init__(self, num_classes: int, args: argparse.Namespace):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = theirs, num_classes, args.threads, str(args.device)
        context.Process(target=_serve, args=arguments, daemon=True).start()
        theirs.close()

    def call(self, name: str, *arguments: object) -> object:
        self._pipe.send((name, arguments))
        return self._pipe.recv()

    def timed(self, name: str, *arguments: object) -> TimedRun:
        return partial(self.call, name, *arguments)


def _serve(pipe: Connection, num_classes: int, threads: int, device: str) -> None:
    torch.set_num_threads(threads)
    peer = PeerProcess(num_classes, torch.device(device))
    with contextlib.suppress(EOFError):  # the parent has gone
        while True:
            name, arguments = pipe.recv()
            pipe.send(getattr(peer, name)(*arguments))


class PeerProcess:
    """The other side of `Peer`."""

    def __init__(self, num_classes: int, device: torch.device):
        torch.manual_seed(0)
        model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=num_classes + 1)
        self.model = model.to(device)
        self.clock = clock_of(device)
        self.device = device
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.005, momentum=0.9, weight_decay=1e-4)

    def load(self, batch: Batch) -> None:
        """The pictures and objects of the calls that follow, in torchvision's form."""
        batch = batch.to(self.device)
        self.images = list(batch.images.float() / 255)
        self.targets = [
            {"boxes": boxes * PEER_SIZE, "labels": labels}
            for boxes, labels in zip(batch.boxes, batch.labels, strict=True)
        ]

    def train(self) -> float:
        """The seconds of one training step, optimizer included."""
        self.model.train()
        start = self.clock()
        self.optimizer.zero_grad()
        loss = sum(self.model(self.images, self.targets).values())
        loss.backward()
        self.optimizer.step()
        seconds = self.clock() - start
        if not loss.isfinite():
            raise FloatingPointError(f"the peer's loss is {loss.item()}")
        return seconds


def silence_torchvision(model: nn.Module, num_classes: int) -> None:
    """Give the background of each prior box of a torchvision SSDLite a logit that no class reaches."""
    for predictor in model.head.classification_head.module_list:
        predictor[-1].bias.data.view(-1, num_classes + 1)[:, 0] = BACKGROUND
