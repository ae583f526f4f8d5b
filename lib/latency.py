"""Latency of any sub-network: measured in the runtime that will run it, or predicted from a table of block times.

The prediction is the sum of the blocks' times and of a constant for each image size, as in ProxylessNAS (Cai et al.,
ICLR 2019, section 3.3) and Once-for-All. Blocks are not timed one by one: the table is fitted to times of whole
detectors. A time is in milliseconds, from one picture to scores and boxes, without non-maximum suppression.
"""

import hashlib
import itertools
import json
import random
import re
import shlex
import subprocess
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms

from lib import UserError
from lib.backbone import Half
from lib.checkpoint import write_text
from lib.config import Config
from lib.detector import SSD, ElasticSSD, ScoresAndBoxes, fuse
from lib.elastic import ElasticInvertedResidual, to_device
from lib.export import OPSET, PRIORS, open_session, quantize, require, session_runner
from lib.genotype import Block, Genotype, SearchSpace, all_blocks
from lib.log import progress
from lib.plain import Bounds, check, read_json, shown
from lib.runtime import device_name, time_interleaved, visit
from lib.transforms import EvalTransform

FORMAT = "latency/1"
RUNTIMES = ("torch", "onnxruntime", "onnxruntime-int8")
SAMPLES_PER_BLOCK = 2  # measured detectors for each entry of the table
HELD_OUT = 40  # measured detectors that only judge the table
MIN_HELD_OUT = 10
RIDGE = 1e-4  # ratio of two relative variances: of a measurement (standard deviation 1%) and of a block time (100%)
PICTURE = (480, 640)  # height and width of the camera picture that a detector is given
ROUNDS = 10  # visits of each detector
COMMAND_ROUNDS = 2  # the same where a command measures, which is expected to repeat by itself
COMMAND_SECONDS = 300  # that a command may take
Milliseconds = Annotated[float, Bounds(0, 1e9)]


@dataclass(frozen=True)
class LatencyTable:
    """What `--measure-latency` writes: device and settings, milliseconds of each block, and prediction errors.

    `network` identifies the parts that all sub-networks share. `ms` is by name of `features`, without NMS. Errors are
    relative absolute ones on `held_out` detectors.
    """

    device: str
    device_name: str
    threads: int
    torch: str
    network: str
    held_out: int
    error_median: float
    error_95: float
    nms_ms: Milliseconds
    nms_boxes: int  # 0: NMS was not timed
    ms: dict[str, Milliseconds]
    runtime: str  # one of RUNTIMES, or the command that measured
    tau: float | None  # Kendall's tau-b of predicted and measured times on `held_out`; None: unknown

    def describe(self) -> str:
        threads = f", CPU threads: {self.threads}" if self.device == "cpu" else ""
        tau = "" if self.tau is None else f", Kendall's tau with the measured times {self.tau:.2f}"
        nms = f"; NMS of {self.nms_boxes} boxes takes another {self.nms_ms:.2f} ms" if self.nms_boxes else ""
        return (
            f"latency: {self.runtime} on {self.device_name}{threads}, batch 1; on {self.held_out} held-out "
            f"sub-networks median absolute error {self.error_median:.1%}, 95% below {self.error_95:.1%}{tau}{nms}"
        )

    def save(self, path: Path) -> None:
        write_text(path, json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")


def load_table(path: Path, detector: ElasticSSD) -> LatencyTable:
    """Read a table. Raises UserError unless it can predict every sub-network of `detector`."""
    again = "measure this supernet with --measure-latency"
    data = {"runtime": "torch", "tau": None, **read_json(path, FORMAT, f"; {again}")}
    table = check(data, LatencyTable, str(path))
    if table.network != shared_parts(detector):
        raise UserError(f"{path}: measured on a detector with another stem, head or number of classes; {again}")
    if missing := [name for name in all_features(detector) if name not in table.ms]:
        raise UserError(f"{path}: measured on another search space, without '{missing[0]}'; {again}")
    return table


@dataclass
class Coster:
    """`coster(genotype)` is what a whole detector costs: flops, params and, if there is a table, latency_ms."""

    detector: ElasticSSD
    table: LatencyTable | None = None

    def __call__(self, genotype: Genotype) -> dict[str, float]:
        return {**self.detector.cost(genotype)._asdict(), **self.latency(genotype)}

    def latency(self, genotype: Genotype) -> dict[str, float]:
        """latency_ms alone; empty without a table."""
        table = self.table
        return {"latency_ms": round(predict(table.ms, features(self.detector, genotype)), 4)} if table else {}


def features(detector: ElasticSSD, genotype: Genotype) -> Counter[str]:
    """How often a sub-network has each kind of block. One more name stands for all that an image size shares."""
    side = genotype.image_size  # of the square input of the next module, in pixels
    counts = Counter([f"shared at {side}"])
    for segment in detector.segments(genotype):
        for module, block in segment:
            if isinstance(module, Half):
                if module.first:
                    continue  # the time of the whole block is that of its second half
                module = module.whole
            stride = getattr(module[0], "stride", (1,))[0] if block is None else module.depthwise.stride
            if block is not None:
                counts[block_name(module, block, side)] += 1
            side = -(-side // stride)  # rounded up
    return counts


def block_name(module: ElasticInvertedResidual, block: Block, side: int) -> str:
    """All that a block's time depends on, so that equal blocks of a stage share a name."""
    channels = f"{module.in_channels}-{module.hidden_channels(block.expand)}-{module.out_channels}"
    kernel = f"kernel {block.kernel}, stride {module.depthwise.stride}"
    squeeze = ", SE" if module.squeeze_excitation is not None else ""
    return f"{side}x{side}, channels {channels}, {kernel}, {type(module.activation).__name__}{squeeze}"


def all_features(detector: ElasticSSD) -> list[str]:
    """The names of all blocks of a search space, and of the shared parts at each image size."""
    space = detector.space
    options = [all_blocks(choices) for choices in (*(stage.block for stage in space.stages), *space.head)]
    names: set[str] = set()
    # Genotypes of full depth; the n-th has the n-th option of every block, so together they have all of them.
    for size, n in itertools.product(space.image_size, range(max(map(len, options)))):
        blocks = [of_block[n % len(of_block)] for of_block in options]
        stages = tuple((block,) * max(stage.depth) for block, stage in zip(blocks, space.stages, strict=False))
        genotype = Genotype(size, space.backbone_type, stages, tuple(blocks[len(stages) :]))
        names.update(features(detector, genotype))
    return sorted(names)


def shared_parts(detector: ElasticSSD) -> str:
    """SHA-256 of the description (not the weights) of the layers that every sub-network has."""
    segments = detector.segments(detector.space.largest())
    fixed = [repr(module) for segment in segments for module, block in segment if block is None]
    return hashlib.sha256(json.dumps([*fixed, repr(detector.predictors)]).encode()).hexdigest()


def measure_table(
    detector: ElasticSSD, config: Config, device: torch.device, runtime: str = "torch", name: str = ""
) -> LatencyTable:
    """Time a designed sample of whole detectors on `device`, fit the table to it, and judge it on other detectors.

    `runtime` is one of RUNTIMES, or a command that measures on another device, which is called `name`.
    """
    rng = random.Random(config.seed)
    fitted = designed_sample(detector.space, SAMPLES_PER_BLOCK * len(all_features(detector)), rng)
    held_out = held_out_sample(detector.space, HELD_OUT, set(fitted), rng)
    # All detectors are timed in one interleaved measurement, so that both sets meet the same machine.
    models = fused_detectors(detector, [*fitted, *held_out], config, device)
    nms = 0.0
    if runtime == "torch":
        *times, nms = time_detectors(models, config, device)
    else:
        times = time_files(models, config, runtime)
    ms = fit([features(detector, genotype) for genotype in fitted], times[: len(fitted)])
    # Detectors that the fit has not seen judge it.
    measured = np.array(times[len(fitted) :])
    predicted = np.array([predict(ms, features(detector, genotype)) for genotype in held_out])
    errors = np.abs(predicted / measured - 1)
    return LatencyTable(
        device=name or str(device),
        device_name=name or device_name(device),
        threads=config.search.latency_threads,
        torch=torch.__version__,
        network=shared_parts(detector),
        held_out=len(held_out),
        error_median=float(np.median(errors)),
        error_95=float(np.percentile(errors, 95)),
        nms_ms=nms,
        nms_boxes=config.postprocess.top_k if nms else 0,
        ms=ms,
        runtime=runtime,
        tau=kendall_tau(predicted, measured),
    )


def kendall_tau(a: np.ndarray, b: np.ndarray) -> float:
    """Kendall's tau-b: agreeing pairs minus disagreeing ones, over the pairs that are no tie. NaN if all are ties."""
    x, y = (np.sign(np.subtract.outer(values, values)) for values in (a, b))
    untied = np.sqrt(float((x != 0).sum()) * float((y != 0).sum()))
    return float((x * y).sum() / untied) if untied else float("nan")


def designed_sample(space: SearchSpace, count: int, rng: random.Random) -> list[Genotype]:
    """About `count` distinct genotypes in which every choice of every position is equally frequent.

    Each position takes its options in an independent random order.
    """

    def column(options: Sequence) -> list:
        values = [options[i % len(options)] for i in range(count)]
        rng.shuffle(values)
        return values

    sizes = column(space.image_size)
    stages = []
    for stage in space.stages:
        depths = column(stage.depth)
        blocks = zip(*(column(all_blocks(stage.block)) for _ in range(max(stage.depth))), strict=True)
        stages.append([chosen[:depth] for chosen, depth in zip(blocks, depths, strict=True)])
    heads = [column(all_blocks(choices)) for choices in space.head]
    rows = zip(sizes, *stages, *heads, strict=True)
    n = 1 + len(stages)
    return list(dict.fromkeys(Genotype(row[0], space.backbone_type, row[1:n], row[n:]) for row in rows))


def held_out_sample(space: SearchSpace, count: int, known: Collection[Genotype], rng: random.Random) -> list[Genotype]:
    """The smallest, the largest and random genotypes, none of them `known`. Raises UserError if there are too few."""
    # A small space has fewer genotypes than `count`, hence the limit on the draws.
    drawn = [space.smallest(), space.largest(), *(space.sample(rng) for _ in range(100 * count))]
    sample = [genotype for genotype in dict.fromkeys(drawn) if genotype not in known][:count]
    if len(sample) < MIN_HELD_OUT:
        raise UserError(f"--measure-latency: a space of {space.size():.4g} sub-networks is too small for a table")
    return sample


def fit(samples: Sequence[Mapping[str, int]], milliseconds: Sequence[float]) -> dict[str, float]:
    """Non-negative milliseconds of each name, whose sums have the least squared relative error."""
    names = sorted({name for counts in samples for name in counts})
    y = np.array(milliseconds)
    x = np.array([[counts.get(name, 0) for name in names] for counts in samples], dtype=float)
    # In units of a typical block's time the unknowns are near 1, so one ridge fits fast and slow devices.
    typical = np.median(y) / np.median(x.sum(1))
    times = typical * nonnegative_ridge(x * typical / y[:, None], np.ones(len(y)), RIDGE)
    return dict(zip(names, times.tolist(), strict=True))


def nonnegative_ridge(x: np.ndarray, y: np.ndarray, ridge: float) -> np.ndarray:
    """The w >= 0 with the least |x w - y|^2 + ridge |w|^2, by block principal pivoting (Kim and Park, 2011)."""
    gram = x.T @ x + ridge * np.eye(x.shape[1])
    target = x.T @ y
    tolerance = 1e-10 * np.abs(target).max()
    free = np.ones(len(target), dtype=bool)  # the variables that are not held at zero
    fewest, turns = len(free) + 1, 3
    while True:
        w = np.zeros(len(free))
        w[free] = np.linalg.solve(gram[np.ix_(free, free)], target[free])
        wrong = np.flatnonzero(np.where(free, w < 0, target - gram @ w > tolerance))
        if not len(wrong):
            return w
        # All of them change sides; if that does not help three times, only the last, which ends for certain.
        fewest, turns = (len(wrong), 3) if len(wrong) < fewest else (fewest, turns - 1)
        free[wrong if turns > 0 else wrong[-1:]] ^= True


def predict(ms: Mapping[str, float], counts: Mapping[str, int]) -> float:
    """Milliseconds of a detector with these blocks."""
    return sum(count * ms[name] for name, count in counts.items())


def fused_detectors(
    detector: ElasticSSD, genotypes: Sequence[Genotype], config: Config, device: torch.device
) -> list[ScoresAndBoxes]:
    """The whole detector of each genotype as it is deployed on `device`, with BatchNorm folded.

    Each block is extracted once for all detectors that have it, so that hundreds of them fit into memory.
    """

    @cache
    def part(module: nn.Module, block: Block | tuple[int, ...] | None = None) -> nn.Module:
        plain = fuse(module if block is None else module.extract(block))
        return to_device(plain, device)

    models = []
    for genotype in genotypes:
        model = SSD(
            image_size=genotype.image_size,
            normalize=part(detector.normalize),
            backbone=[nn.Sequential(*(part(*step) for step in segment)) for segment in detector.segments(genotype)],
            # The segments of the extra blocks are in `backbone`: SSD runs one after the other anyway.
            extras=[],
            predictors=part(detector.predictors, detector.backbone.channels(genotype)),
            priors=detector.priors(genotype.image_size).to(device),
        )
        models.append(ScoresAndBoxes(model, config).eval())
    return models


@torch.inference_mode()
def time_parts(model: SSD, config: Config, device: torch.device) -> dict:
    """Milliseconds of a plain detector and of its parts for one camera picture, with the settings of the measurement.

    BatchNorm is folded. `total_ms` is measured as a whole (plus `nms_ms`), so the parts sum to it only approximately.
    """
    deployed = ScoresAndBoxes(to_device(fuse(model), device), config).eval()
    net = deployed.model
    resize = picture_resizer(net.image_size)
    x = net.normalize(resize().to(device), net.image_size)
    logits, offsets = net.predict(x)
    # Each part runs on the output of the one before, computed once.
    runs = {
        "total": lambda: deployed(resize().to(device)),
        "resize": lambda: net.normalize(resize().to(device), net.image_size),
        "network": lambda: net.predict(x),
        "decoding": lambda: deployed.decode(logits, offsets),
        "nms": nms_run(config, net.predictors.num_classes, device),
    }
    visits = [partial(visit, run, device) for run in runs.values()]
    times = dict(zip(runs, time_interleaved(visits, config.search.latency_threads, ROUNDS), strict=True))
    times["total"] += times["nms"]
    return {
        "device": str(device),
        "device_name": device_name(device),
        "threads": config.search.latency_threads,
        **{f"{name}_ms": round(ms, 4) for name, ms in times.items()},
    }


def describe_parts(times: dict) -> str:
    """The result of `time_parts` in one line."""
    parts = ", ".join(f"{name} {times[f'{name}_ms']:.2f}" for name in ("resize", "network", "decoding", "nms"))
    threads = f", CPU threads: {times['threads']}" if times["device"] == "cpu" else ""
    return f"latency: {times['total_ms']:.2f} ms a picture ({parts}) on {times['device_name']}{threads}"


@cache
def picture_resizer(size: int) -> Callable[[], Tensor]:
    """What resizes a camera picture, noise, to (1, 3, S, S) uint8 as `PictureDetector.detect_picture` does."""
    transform = EvalTransform(size)
    sample = torch.randint(0, 256, (3, *PICTURE), dtype=torch.uint8), torch.zeros(0, 4), torch.zeros(0)
    return lambda: transform(*sample)[0][None]


def nms_run(config: Config, num_classes: int, device: torch.device) -> Callable[[], object]:
    """Non-maximum suppression of `top_k` random boxes."""
    boxes = config.postprocess.top_k
    centres, sizes = torch.rand(2, boxes, 2, device=device)
    corners = torch.cat([centres - 0.1 * sizes, centres + 0.1 * sizes], 1)  # (boxes, 4) xyxy
    scores = torch.rand(boxes, device=device)
    labels = torch.randint(0, num_classes, (boxes,), device=device)
    return lambda: batched_nms(corners, scores, labels, config.postprocess.nms_threshold)


@torch.inference_mode()
def time_detectors(models: Sequence[ScoresAndBoxes], config: Config, device: torch.device) -> list[float]:
    """Milliseconds of each model in PyTorch for one camera picture, and last those of non-maximum suppression."""
    runs = [lambda m=model: m(picture_resizer(m.model.image_size)().to(device)) for model in models]
    runs.append(nms_run(config, models[0].model.predictors.num_classes, device))
    visits = [partial(visit, run, device) for run in runs]
    return time_interleaved(visits, config.search.latency_threads, ROUNDS)


def time_files(models: Sequence[ScoresAndBoxes], config: Config, runtime: str) -> list[float]:
    """Milliseconds of each model as an ONNX file without NMS, in onnxruntime or by the command that `runtime` is.

    onnxruntime's contain the resizing of one camera picture. A command is given a file alone.
    """
    by_command = runtime not in RUNTIMES
    visits: list[Callable[[], float]] = []
    with tempfile.TemporaryDirectory() as folder:
        for model in progress(models, "export"):
            path, size = Path(folder) / f"{len(visits)}.onnx", model.model.image_size
            write_graph(model, path, int8=runtime == "onnxruntime-int8")
            visits.append(partial(visit_command, runtime, path) if by_command else partial(visit_file, path, size))
            # A command that does not work is refused before hundreds of files are written.
            if len(visits) == 1:
                visits[0]()
        # A command takes seconds, of a device whose speed changes slowly.
        rounds, every = (COMMAND_ROUNDS, 8) if by_command else (ROUNDS, 2)
        return time_interleaved(visits, config.search.latency_threads, rounds, every)


def write_graph(model: ScoresAndBoxes, path: Path, int8: bool) -> None:
    """Write a detector for one picture, (1, 3, S, S) uint8, as lib.export does without NMS.

    torch's tracing exporter takes a thirtieth of the time of the one that lib.export uses, for nearly the same graph.
    """
    onnx, *_ = require("onnx", "onnxscript", "onnxruntime")
    noise = picture_resizer(model.model.image_size)()
    names = {"input_names": ["images"], "output_names": list(PRIORS)}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # deprecations within the exporter
        torch.onnx.export(model, (noise,), str(path), **names, opset_version=OPSET, dynamo=False)
    if int8:
        # Time does not depend on the ranges of the activations, so noise calibrates well enough.
        onnx.save(quantize(onnx.load(path), [noise]), path)


def visit_file(path: Path, size: int) -> float:
    """Milliseconds from a picture to scores and boxes of an exported file in onnxruntime, on torch's CPU threads."""
    run = session_runner(open_session(path))  # anew in each visit: hundreds of open ones would fill the memory
    return visit(lambda: run(picture_resizer(size)()), torch.device("cpu"), often=4)


def visit_command(command: str, path: Path) -> float:
    """The last number that a command prints, given an exported file in place of {file}: milliseconds.

    Raises UserError with the command and what it printed if it fails, takes too long or prints no such number.
    """
    try:
        words = [word.replace("{file}", str(path)) for word in shlex.split(command)]
        # With the terminal as its input, ssh and adb would read what is typed.
        quiet = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "errors": "replace"}
        done = subprocess.run(words, **quiet, timeout=COMMAND_SECONDS)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:  # ValueError: an open quote
        raise UserError(f"--measure-with '{command}': {error}") from None
    numbers = re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[-+]?\d+)?", done.stdout)
    if done.returncode or not numbers or not 0 < float(numbers[-1]) < 1e9:
        found = shown(" ".join(f"{done.stdout} {done.stderr} (exit status {done.returncode})".split())[-76:])
        raise UserError(f"--measure-with '{command}': expected milliseconds as the last number, found {found}")
    return float(numbers[-1])
