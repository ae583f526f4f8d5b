"""Latency of any sub-network: measured on a device, or predicted from a table of block times.

The prediction is the sum of the blocks' times and of a constant for each image size, as in ProxylessNAS (Cai et al.,
ICLR 2019, section 3.3) and Once-for-All. Blocks are not timed one by one: the table is fitted to times of whole
detectors. A time is in milliseconds, from one picture to scores and boxes; non-maximum suppression is timed separately.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from torch import nn
from torchvision.ops import batched_nms

from lib.backbone import Half
from lib.checkpoint import write_text
from lib.config import Config
from lib.detector import SSD, ElasticSSD, ScoresAndBoxes, fuse
from lib.elastic import ElasticInvertedResidual
from lib.errors import UserError
from lib.genotype import Block, Genotype, SearchSpace, all_blocks
from lib.log import progress
from lib.plain import Bounds, check, read_json
from lib.runtime import device_name

FORMAT = "latency/1"
SAMPLES_PER_BLOCK = 2  # measured detectors for each entry of the table
HELD_OUT = 40  # measured detectors that only judge the table
MIN_HELD_OUT = 10
RIDGE = 1e-4  # ratio of two relative variances: of a measurement (standard deviation 1%) and of a block time (100%)
PICTURE = (480, 640)  # height and width of the camera picture that a detector is given
REPETITIONS = 3  # timed calls of a visit, after one that warms up
ROUNDS = 10  # visits of each run
REFERENCE_EVERY = 4  # visits from one of the reference to the next
Run = Callable[[], object]
Milliseconds = Annotated[float, Bounds(0, 1e9)]


@dataclass(frozen=True)
class LatencyTable:
    """What `--measure-latency` writes: device and settings, milliseconds of each block, and prediction errors.

    `network` identifies the parts that all sub-networks share. `ms` is by name of `features`, without NMS. Errors are
    relative absolute ones on `held_out` detectors; `error_constant` is the median error of one time for all of them.
    """

    device: str
    device_name: str
    threads: int
    batch: int
    torch: str
    image_sizes: list[int]
    network: str
    fitted: int
    held_out: int
    error_median: float
    error_95: float
    error_constant: float
    nms_ms: Milliseconds
    nms_boxes: int
    ms: dict[str, Milliseconds]

    def describe(self) -> str:
        where = f"{self.device_name}, CPU threads: {self.threads}" if self.device == "cpu" else self.device_name
        return (
            f"latency: {where}, batch {self.batch}; on {self.held_out} held-out sub-networks median absolute error "
            f"{self.error_median:.1%}, 95% below {self.error_95:.1%} (one constant for all: median "
            f"{self.error_constant:.1%}); NMS of {self.nms_boxes} boxes takes another {self.nms_ms:.2f} ms"
        )

    def save(self, path: Path) -> None:
        write_text(path, json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")


def load_table(path: Path, detector: ElasticSSD) -> LatencyTable:
    """Read a table. Raises UserError unless it can predict every sub-network of `detector`."""
    again = "measure this supernet with --measure-latency"
    table = check(read_json(path, FORMAT, f"; {again}"), LatencyTable, str(path))
    if table.network != shared_parts(detector):
        raise UserError(f"{path}: measured on a detector with another stem, head or number of classes; {again}")
    if missing := [name for name in all_features(detector) if name not in table.ms]:
        raise UserError(f"{path}: measured on another search space, without '{missing[0]}'; {again}")
    return table


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
    choices = [*(stage.block for stage in space.stages), *space.head]
    options = [all_blocks(c) for c in choices]
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


def measure_table(detector: ElasticSSD, config: Config, device: torch.device) -> LatencyTable:
    """Time a designed sample of whole detectors on `device`, fit the table to it, and judge it on other detectors."""
    rng = random.Random(config.seed)
    space = detector.space
    fitted = designed_sample(space, SAMPLES_PER_BLOCK * len(all_features(detector)), rng)
    held_out = held_out_sample(space, HELD_OUT, set(fitted), rng)
    # All detectors are timed in one interleaved measurement, so that both sets meet the same machine.
    *times, nms = time_detectors(fused_detectors(detector, [*fitted, *held_out], config, device), config, device)
    ms = fit([features(detector, genotype) for genotype in fitted], times[: len(fitted)])
    # Detectors that the fit has not seen judge it, and with it the simplest of all predictions, one constant.
    measured = np.array(times[len(fitted) :])
    predicted = np.array([predict(ms, features(detector, genotype)) for genotype in held_out])
    errors = np.abs(predicted - measured) / measured
    errors_of_constant = np.abs(np.median(times[: len(fitted)]) - measured) / measured
    return LatencyTable(
        device=str(device),
        device_name=device_name(device),
        threads=config.search.latency_threads,
        batch=1,
        torch=torch.__version__,
        image_sizes=list(space.image_size),
        network=shared_parts(detector),
        fitted=len(fitted),
        held_out=len(held_out),
        error_median=float(np.median(errors)),
        error_95=float(np.percentile(errors, 95)),
        error_constant=float(np.median(errors_of_constant)),
        nms_ms=nms,
        nms_boxes=config.postprocess.top_k,
        ms=ms,
    )


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
    sample = []
    for i, size in enumerate(sizes):
        chosen = tuple(column_of_stage[i] for column_of_stage in stages)
        sample.append(Genotype(size, space.backbone_type, chosen, tuple(head[i] for head in heads)))
    return list(dict.fromkeys(sample))


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
    """The w >= 0 with the least |x w - y|^2 + ridge |w|^2, by active sets (Lawson and Hanson, 1974, chapter 23)."""
    gram = x.T @ x + ridge * np.eye(x.shape[1])
    target = x.T @ y
    w = np.zeros(len(target))
    free = np.zeros(len(target), dtype=bool)  # the variables that may leave zero
    tolerance = 1e-10 * np.abs(target).max()
    while True:
        # Free the variable whose increase reduces the objective fastest.
        gain = np.where(free, 0.0, target - gram @ w)
        if gain.max() <= tolerance:
            return w
        free[gain.argmax()] = True
        # Minimise over the free variables. If one turns negative, stop where it reaches zero and fix it there.
        while True:
            best = np.zeros(len(w))
            best[free] = np.linalg.solve(gram[np.ix_(free, free)], target[free])
            blocked = free & (best <= 0)
            if not blocked.any():
                break
            step = (w[blocked] / (w[blocked] - best[blocked])).min()
            w = w + step * (best - w)
            free &= w > 1e-12 * w.max()
            w[~free] = 0.0
        w = best


def predict(ms: Mapping[str, float], counts: Mapping[str, int]) -> float:
    """Milliseconds of a detector with these blocks."""
    return sum(count * ms[name] for name, count in counts.items())


def fused_detectors(
    detector: ElasticSSD, genotypes: Sequence[Genotype], config: Config, device: torch.device
) -> list[ScoresAndBoxes]:
    """The whole detector of each genotype as it is deployed on `device`, with BatchNorm folded.

    Each block is extracted once for all detectors that have it, so that hundreds of them fit into memory.
    """

    @functools.cache
    def part(module: nn.Module, block: Block | tuple[int, ...] | None = None) -> nn.Module:
        plain = module if block is None else module.extract(block)
        return fuse(plain).to(device, memory_format=torch.channels_last)

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
    deployed = ScoresAndBoxes(fuse(model).to(device, memory_format=torch.channels_last), config).eval()
    net = deployed.model
    picture = torch.randint(0, 256, (1, 3, *PICTURE), dtype=torch.uint8, device=device)
    x = net.normalize(picture, net.image_size)
    logits, offsets = net.predict(x)
    # Each part runs on the output of the one before, computed once.
    runs = [
        lambda: deployed(picture),
        lambda: net.normalize(picture, net.image_size),
        lambda: net.predict(x),
        lambda: deployed.decode(logits, offsets),
        nms_run(config, net.predictors.num_classes, device),
    ]
    whole, resize, network, decoding, nms = time_interleaved(runs, device, config.search.latency_threads)
    times = {"resize": resize, "network": network, "decoding": decoding, "nms": nms, "total": whole + nms}
    return {
        "device": str(device),
        "device_name": device_name(device),
        "threads": config.search.latency_threads,
        "batch": 1,
        "picture": list(PICTURE),
        "nms_boxes": config.postprocess.top_k,
        **{f"{name}_ms": round(ms, 4) for name, ms in times.items()},
    }


def describe_parts(times: dict) -> str:
    """The result of `time_parts` in one line."""
    parts = ", ".join(f"{name} {times[f'{name}_ms']:.2f}" for name in ("resize", "network", "decoding", "nms"))
    threads = f", CPU threads: {times['threads']}" if times["device"] == "cpu" else ""
    return f"latency: {times['total_ms']:.2f} ms a picture ({parts}) on {times['device_name']}{threads}"


def nms_run(config: Config, num_classes: int, device: torch.device) -> Run:
    """Non-maximum suppression of `top_k` random boxes."""
    boxes = config.postprocess.top_k
    centres, sizes = torch.rand(2, boxes, 2, device=device)
    corners = torch.cat([centres - 0.1 * sizes, centres + 0.1 * sizes], 1)  # (boxes, 4) xyxy
    scores = torch.rand(boxes, device=device)
    labels = torch.randint(0, num_classes, (boxes,), device=device)
    return lambda: batched_nms(corners, scores, labels, config.postprocess.nms_threshold)


@torch.inference_mode()
def time_detectors(models: Sequence[ScoresAndBoxes], config: Config, device: torch.device) -> list[float]:
    """Milliseconds of each model for one camera picture, and last those of non-maximum suppression."""
    picture = torch.randint(0, 256, (1, 3, *PICTURE), dtype=torch.uint8, device=device)
    runs: list[Run] = [lambda model=model: model(picture) for model in models]
    runs.append(nms_run(config, models[0].model.predictors.num_classes, device))
    return time_interleaved(runs, device, config.search.latency_threads)


def time_interleaved(runs: Sequence[Run], device: torch.device, threads: int) -> list[float]:
    """Median milliseconds of each run over ROUNDS rounds, on `threads` CPU threads.

    A round visits every run, in a random order. A machine's speed drifts. So the first run serves as the reference: it
    is visited again and again within a round, and the times of the round are divided by its median.
    """
    rng = random.Random(0)
    order = list(range(len(runs)))
    times = np.empty((ROUNDS, len(runs)))
    speeds = np.empty(ROUNDS)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    bar = progress(None, "measure", total=ROUNDS * len(runs))
    try:
        for n in range(ROUNDS):
            rng.shuffle(order)
            reference = []
            for position, i in enumerate(order):
                # Within a round the speed drifts too, so the reference is measured several times.
                if position % REFERENCE_EVERY == 0:
                    reference.append(visit(runs[0], device))
                times[n, i] = visit(runs[i], device)
                bar.update()
            speeds[n] = statistics.median(reference)
    finally:
        bar.close()
        torch.set_num_threads(threads_before)
    # Ratios to the reference become milliseconds at the machine's usual speed.
    return (np.median(speeds) * np.median(times / speeds[:, None], axis=0)).tolist()


def visit(run: Run, device: torch.device) -> float:
    """Median milliseconds of a few calls after one that warms up. Waits for the GPU's work to end."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda _: None
    run()
    times = []
    for _ in range(REPETITIONS):
        wait(device)
        start = time.perf_counter()
        run()
        wait(device)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)
