"""Latency of any sub-network: measured on a device, or predicted from a table of block times.

The prediction is the sum of the blocks' times and of a constant for each image size, as in ProxylessNAS (Cai et al.,
ICLR 2019, section 3.3) and Once-for-All. Blocks are not timed one by one: the table is fitted to times of whole
detectors. A time is in milliseconds, from one picture to scores and boxes; non-maximum suppression is timed separately.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torchvision.ops import batched_nms

from lib.checkpoint import write_text
from lib.config import Config
from lib.detector import SSD, ElasticSSD, ScoresAndBoxes, fuse
from lib.elastic import ElasticInvertedResidual
from lib.errors import UserError
from lib.genotype import Block, BlockChoices, Genotype, SearchSpace
from lib.log import progress
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


@dataclass(frozen=True)
class LatencyTable:
    """What `--measure-latency` writes: device and settings, milliseconds of each block, and prediction errors.

    `network` identifies the parts that all sub-networks share. `ms` maps names of `features` to milliseconds, without
    non-maximum suppression. `error_median` and `error_95` are relative absolute errors on `held_out` detectors;
    `error_constant` is the median error of predicting the same time for all of them.
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
    nms_ms: float
    nms_boxes: int
    ms: dict[str, float]

    def __call__(self, counts: Mapping[str, int]) -> float:
        """Milliseconds of a detector with these blocks (`features`)."""
        return predict(self.ms, counts)

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
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
        raise UserError(f'{path}: not a latency table: expected a JSON object with "format": "{FORMAT}"')
    names = {field.name for field in fields(LatencyTable)}
    if data.keys() != names:
        wrong = ", ".join(sorted(names ^ data.keys()))
        raise UserError(f"{path}: latency table with missing or unknown keys: {wrong}; {again}")
    table = LatencyTable(**data)
    if table.network != shared_parts(detector):
        raise UserError(f"{path}: measured on a detector with another stem, head or number of classes; {again}")
    for name, ms in table.ms.items():
        if not isinstance(ms, (int, float)) or not ms >= 0:
            raise UserError(f"{path}: '{name}': expected milliseconds, found {ms!r}")
    for name in all_features(detector):
        if name not in table.ms:
            raise UserError(f"{path}: measured on another search space, without '{name}'; {again}")
    return table


def features(detector: ElasticSSD, genotype: Genotype) -> Counter[str]:
    """How often a sub-network has each kind of block. One more name stands for all that an image size shares."""
    side = genotype.image_size  # of the square input of the next module, in pixels
    counts = Counter([f"shared at {side}"])
    for segment in detector.segments(genotype):
        for module, block in segment:
            if block is None:
                stride = module[0].stride[0]
            else:
                stride = module.depthwise.stride
                counts[block_name(module, block, side)] += 1
            side = -(-side // stride)  # rounded up
    return counts


def block_name(module: ElasticInvertedResidual, block: Block, side: int) -> str:
    """All that a block's time depends on, so that equal blocks of a stage share a name."""
    parts = [
        f"{side}x{side}",
        f"channels {module.in_channels}-{module.hidden_channels(block.expand)}-{module.out_channels}",
        f"kernel {block.kernel}",
        f"stride {module.depthwise.stride}",
        type(module.activation).__name__,
    ]
    return ", ".join(parts + ["SE"] * (module.squeeze_excitation is not None))


def all_features(detector: ElasticSSD) -> list[str]:
    """The names of all blocks of a search space, and of the shared parts at each image size."""
    space = detector.space
    choices = [*(stage.block for stage in space.stages), *space.head]
    most = max(len(block_options(c)) for c in choices)
    names: set[str] = set()
    # Genotypes of full depth; the n-th has the n-th option of every block, so together they have all of them.
    for size, n in itertools.product(space.image_size, range(most)):
        blocks = [options[n % len(options)] for options in map(block_options, choices)]
        stages = tuple((block,) * max(stage.depth) for block, stage in zip(blocks, space.stages, strict=False))
        head = tuple(blocks[len(stages) :])
        names.update(features(detector, Genotype(size, space.backbone_type, stages, head)))
    return sorted(names)


def block_options(choices: BlockChoices) -> list[Block]:
    """Every pair of an expand ratio and a kernel."""
    return [Block(expand, kernel) for expand, kernel in itertools.product(choices.expand, choices.kernel)]


def shared_parts(detector: ElasticSSD) -> str:
    """SHA-256 of the description (not the weights) of the layers that every sub-network has."""
    segments = detector.segments(detector.space.largest())
    fixed = [repr(module) for segment in segments for module, block in segment if block is None]
    return hashlib.sha256(json.dumps([*fixed, repr(detector.predictors)]).encode()).hexdigest()


def measure_table(detector: ElasticSSD, config: Config, device: torch.device, threads: int, seed: int) -> LatencyTable:
    """Time a designed sample of whole detectors on `device`, fit the table to it, and judge it on other detectors."""
    rng = random.Random(seed)
    space = detector.space
    fitted = designed_sample(space, SAMPLES_PER_BLOCK * len(all_features(detector)), rng)
    held_out = held_out_sample(space, HELD_OUT, fitted, rng)
    genotypes = [*fitted, *held_out]
    make = FusedDetectors(detector, config, device)
    rules = config.postprocess
    # All detectors are timed in one interleaved measurement, so that both sets meet the same machine.
    with cpu_threads(threads):
        measured = time_detectors([make(genotype) for genotype in genotypes], device, ROUNDS)
        nms = time_nms(rules.top_k, detector.num_classes, rules.nms_threshold, device, ROUNDS)
    # The first n are fitted, the others judge.
    counts = [features(detector, genotype) for genotype in genotypes]
    n = len(fitted)
    ms = fit(counts[:n], measured[:n])
    errors = relative_errors([predict(ms, row) for row in counts[n:]], measured[n:])
    constant = [np.median(measured[:n])] * len(held_out)
    return LatencyTable(
        device=str(device),
        device_name=device_name(device),
        threads=threads,
        batch=1,
        torch=torch.__version__,
        image_sizes=list(space.image_size),
        network=shared_parts(detector),
        fitted=n,
        held_out=len(held_out),
        error_median=float(np.median(errors)),
        error_95=float(np.percentile(errors, 95)),
        error_constant=float(np.median(relative_errors(constant, measured[n:]))),
        nms_ms=nms,
        nms_boxes=rules.top_k,
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
    stages = [
        (column(stage.depth), [column(block_options(stage.block)) for _ in range(max(stage.depth))])
        for stage in space.stages
    ]
    heads = [column(block_options(choices)) for choices in space.head]
    sample: dict[Genotype, None] = {}
    for i, size in enumerate(sizes):
        chosen = tuple(tuple(blocks[i] for blocks in positions[: depths[i]]) for depths, positions in stages)
        sample[Genotype(size, space.backbone_type, chosen, tuple(head[i] for head in heads))] = None
    return list(sample)


def held_out_sample(space: SearchSpace, count: int, known: Sequence[Genotype], rng: random.Random) -> list[Genotype]:
    """The smallest, the largest and random genotypes, none of them `known`. Raises UserError if there are too few."""
    sample: dict[Genotype, None] = {}
    # A small space has fewer genotypes than `count`, hence the limit on the draws.
    draws = (space.sample(rng) for _ in range(100 * count))
    for genotype in itertools.chain([space.smallest(), space.largest()], draws):
        if genotype not in known:
            sample[genotype] = None
        if len(sample) == count:
            break
    if len(sample) < MIN_HELD_OUT:
        size = f"{space.size():.4g} sub-networks"
        raise UserError(f"--measure-latency: a search space of {size} is too small for a table")
    return list(sample)


def fit(samples: Sequence[Mapping[str, int]], milliseconds: Sequence[float]) -> dict[str, float]:
    """Non-negative milliseconds of each name, whose sums have the least squared relative error."""
    names = sorted({name for counts in samples for name in counts})
    y = np.asarray(milliseconds, dtype=float)
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


def relative_errors(predicted: Sequence[float], measured: Sequence[float]) -> np.ndarray:
    """Absolute errors divided by the measured values."""
    return np.abs(np.asarray(predicted) - measured) / measured


class FusedDetectors:
    """`detectors(genotype)` is a whole detector as it is deployed on `device`, with BatchNorm folded.

    Each block is extracted once and shared by all detectors that have it, so that hundreds of them fit into memory.
    """

    def __init__(self, detector: ElasticSSD, config: Config, device: torch.device):
        self._detector = detector
        self._config = config
        self._device = device
        self._parts: dict[tuple[nn.Module, Block | None], nn.Module] = {}

    def __call__(self, genotype: Genotype) -> ScoresAndBoxes:
        segments = self._detector.segments(genotype)
        model = SSD(
            image_size=genotype.image_size,
            normalize=self._part(self._detector.normalize),
            backbone=[nn.Sequential(*(self._part(*step) for step in segment)) for segment in segments],
            # The segments of the extra blocks are in `backbone`: SSD runs one after the other anyway.
            extras=[],
            predictors=self._part(self._detector.predictors),
            priors=self._detector.priors(genotype.image_size).to(self._device),
        )
        return ScoresAndBoxes(model, self._config).eval()

    def _part(self, module: nn.Module, block: Block | None = None) -> nn.Module:
        key = (module, block)
        if key not in self._parts:
            plain = module if block is None else module.extract(block)
            self._parts[key] = fuse(plain).to(self._device, memory_format=torch.channels_last)
        return self._parts[key]


@contextlib.contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """A context in which torch uses `count` CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def time_parts(model: SSD, config: Config, device: torch.device) -> dict:
    """Milliseconds of a plain detector and of its parts for one camera picture, with the settings of the measurement.

    BatchNorm is folded. `total_ms` is measured as a whole (plus `nms_ms`), so the parts sum to it only approximately.
    """
    deployed = ScoresAndBoxes(fuse(model).to(device, memory_format=torch.channels_last), config).eval()
    net = deployed.model
    rules = config.postprocess
    threads = config.search.latency_threads
    picture = torch.randint(0, 256, (1, 3, *PICTURE), dtype=torch.uint8, device=device)
    x = net.normalize(picture, net.image_size)
    logits, offsets = net.predict(x)
    # Each part runs on the output of the one before, computed once.
    runs = {
        "whole": lambda: deployed(picture),
        "resize": lambda: net.normalize(picture, net.image_size),
        "network": lambda: net.predict(x),
        "decoding": lambda: deployed.decode(logits, offsets),
    }
    with cpu_threads(threads):
        whole, *parts = time_interleaved(list(runs.values()), device, ROUNDS)
        nms = time_nms(rules.top_k, model.predictors.num_classes, rules.nms_threshold, device, ROUNDS)
    times = dict(zip(list(runs)[1:], parts, strict=True)) | {"nms": nms, "total": whole + nms}
    return {
        "device": str(device),
        "device_name": device_name(device),
        "threads": threads,
        "batch": 1,
        "picture": list(PICTURE),
        "nms_boxes": rules.top_k,
        **{f"{name}_ms": round(ms, 4) for name, ms in times.items()},
    }


def describe_parts(times: dict) -> str:
    """The result of `time_parts` in one line."""
    parts = ", ".join(f"{name} {times[f'{name}_ms']:.2f}" for name in ("resize", "network", "decoding", "nms"))
    threads = f", CPU threads: {times['threads']}" if times["device"] == "cpu" else ""
    return f"latency: {times['total_ms']:.2f} ms a picture ({parts}) on {times['device_name']}{threads}"


def time_detectors(models: Sequence[nn.Module], device: torch.device, rounds: int) -> list[float]:
    """Milliseconds of each model for one camera picture that is already on `device` (see `time_interleaved`)."""
    # On the device already: the transfer depends on the application.
    picture = torch.randint(0, 256, (1, 3, *PICTURE), dtype=torch.uint8, device=device)
    with torch.inference_mode():
        return time_interleaved([lambda model=model: model(picture) for model in models], device, rounds)


def time_nms(boxes: int, num_classes: int, threshold: float, device: torch.device, rounds: int) -> float:
    """Milliseconds of non-maximum suppression of that many random boxes."""
    centres = torch.rand(boxes, 2, device=device)
    sizes = 0.2 * torch.rand(boxes, 2, device=device)
    corners = torch.cat([centres - sizes / 2, centres + sizes / 2], 1)  # (boxes, 4) xyxy
    scores = torch.rand(boxes, device=device)
    labels = torch.randint(0, num_classes, (boxes,), device=device)
    times = [visit(lambda: batched_nms(corners, scores, labels, threshold), device) for _ in range(rounds)]
    return statistics.median(times)


def time_interleaved(runs: Sequence[Run], device: torch.device, rounds: int) -> list[float]:
    """Median milliseconds of each run over `rounds` rounds. A round visits every run, in a random order.

    A machine's speed drifts. So the first run serves as the reference: it is visited again and again within a round,
    and the times of the round are divided by its median.
    """
    rng = random.Random(0)
    order = list(range(len(runs)))
    speeds: list[float] = []
    relative: list[list[float]] = [[] for _ in runs]
    bar = progress(None, "measure", total=rounds * len(runs))
    for _ in range(rounds):
        rng.shuffle(order)
        reference = []
        found = {}
        for n, i in enumerate(order):
            # Within a round the speed drifts too, so the reference is measured several times.
            if n % REFERENCE_EVERY == 0:
                reference.append(visit(runs[0], device))
            found[i] = visit(runs[i], device)
            bar.update()
        speeds.append(statistics.median(reference))
        for i, milliseconds in found.items():
            relative[i].append(milliseconds / speeds[-1])
    bar.close()
    # Ratios to the reference become milliseconds at the machine's usual speed.
    usual = statistics.median(speeds)
    return [usual * statistics.median(values) for values in relative]


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
