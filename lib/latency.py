"""Latency of any sub-network, predicted from a table of block times that was fitted to measured whole detectors.

A detector's time is the sum of its blocks' times and of what all detectors of an image size share, as in ProxylessNAS
(Cai et al., ICLR 2019, section 3.3) and Once-for-All. Blocks are not timed one by one: their sum is what is measured.

Milliseconds of whole detectors on a device: one picture in, scores and boxes out, non-maximum suppression apart.
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
SAMPLES_PER_BLOCK = 2  # measured detectors for each number of the table
HELD_OUT = 40  # measured detectors that the table is not fitted to
FEWEST_HELD_OUT = 10
RIDGE = 1e-4  # variance of a measurement (1% of it) over that of block times (of their own size)


@dataclass(frozen=True)
class LatencyTable:
    """What `--measure-latency` found: where, how, the milliseconds of each block, and how far its sums are off.

    `network` tells the parts that all sub-networks share. `error_median` and `error_95` are absolute errors on
    detectors that were not fitted, as shares of their time; `error_constant` is the median error of one guess for all.
    Non-maximum suppression is not in the sums.
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
            f"{self.error_median:.1%}, 95% below {self.error_95:.1%} (one guess for all: median "
            f"{self.error_constant:.1%}); NMS of {self.nms_boxes} boxes takes {self.nms_ms:.2f} ms more"
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
        raise UserError(f"{path}: not a whole latency table: {', '.join(sorted(names ^ data.keys()))}; {again}")
    table = LatencyTable(**data)
    if table.network != shared_parts(detector):
        raise UserError(f"{path}: measured on a detector with another stem, head or number of classes; {again}")
    wrong = [name for name, ms in table.ms.items() if not isinstance(ms, (int, float)) or not ms >= 0]
    if wrong:
        raise UserError(f"{path}: '{wrong[0]}': expected milliseconds, found {table.ms[wrong[0]]!r}")
    missing = [name for name in all_features(detector) if name not in table.ms]
    if missing:
        raise UserError(f"{path}: measured on another search space, without '{missing[0]}'; {again}")
    return table


# --------------------------------------------------------------------------------------------------------- the features


def features(detector: ElasticSSD, genotype: Genotype) -> Counter[str]:
    """How often a sub-network has each kind of block; what all of its image size share is one more name."""
    side = genotype.image_size
    counts = Counter([f"shared at {side}"])
    for segment in detector.segments(genotype):
        for module, block in segment:
            if block is None:
                stride = module[0].stride[0]
            else:
                stride = module.depthwise.stride
                counts[_block_name(module, block, side)] += 1
            side = -(-side // stride)
    return counts


def _block_name(module: ElasticInvertedResidual, block: Block, side: int) -> str:
    """All that a block's time depends on. Where a stage repeats a block, the name is the same."""
    parts = [
        f"{side}x{side}",
        f"channels {module.in_channels}-{module.hidden_channels(block.expand)}-{module.out_channels}",
        f"kernel {block.kernel}",
        f"stride {module.depthwise.stride}",
        type(module.activation).__name__,
    ]
    return ", ".join(parts + ["SE"] * (module.squeeze_excitation is not None))


def all_features(detector: ElasticSSD) -> list[str]:
    """The names of every block that a sub-network may have."""
    return sorted({name for genotype in _every_block(detector.space) for name in features(detector, genotype)})


def _every_block(space: SearchSpace) -> Iterator[Genotype]:
    """Genotypes of full depth that between them have every choice of every block."""
    choices = [*(stage.block for stage in space.stages), *space.head]
    most = [range(max(len(getattr(c, field)) for c in choices)) for field in Block._fields]
    for size, e, k in itertools.product(space.image_size, *most):

        def block(c: BlockChoices, e: int = e, k: int = k) -> Block:
            return Block(c.expand[e % len(c.expand)], c.kernel[k % len(c.kernel)])

        stages = tuple((block(s.block),) * max(s.depth) for s in space.stages)
        yield Genotype(size, space.backbone_type, stages, tuple(map(block, space.head)))


def shared_parts(detector: ElasticSSD) -> str:
    """SHA-256 of the layers that every sub-network has, without their weights."""
    segments = detector.segments(detector.space.largest())
    fixed = [repr(module) for segment in segments for module, block in segment if block is None]
    return hashlib.sha256(json.dumps([*fixed, repr(detector.predictors)]).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------- the sample


def designed_sample(space: SearchSpace, count: int, rng: random.Random) -> list[Genotype]:
    """Genotypes in which every choice of every position is equally frequent, in independent random orders."""

    def column(options: Sequence) -> Iterator:
        values = [options[i % len(options)] for i in range(count)]
        rng.shuffle(values)
        return iter(values)

    def blocks(choices: BlockChoices) -> Iterator:
        return column([Block(e, k) for e, k in itertools.product(choices.expand, choices.kernel)])

    sizes = column(space.image_size)
    stages = [(column(s.depth), [blocks(s.block) for _ in range(max(s.depth))]) for s in space.stages]
    heads = [blocks(choices) for choices in space.head]
    sample = []
    for size in sizes:
        drawn = [(next(depth), [next(position) for position in positions]) for depth, positions in stages]
        chosen = tuple(tuple(row[:depth]) for depth, row in drawn)
        sample.append(Genotype(size, space.backbone_type, chosen, tuple(map(next, heads))))
    return list(dict.fromkeys(sample))


def held_out_sample(space: SearchSpace, count: int, known: Sequence[Genotype], rng: random.Random) -> list[Genotype]:
    """The smallest, the largest and random genotypes, none of them known. Raises UserError where there are too few."""
    sample: dict[Genotype, None] = {}
    draws = (space.sample(rng) for _ in range(100 * count))
    for genotype in itertools.chain([space.smallest(), space.largest()], draws):
        if genotype not in known:
            sample[genotype] = None
        if len(sample) == count:
            break
    if len(sample) < FEWEST_HELD_OUT:
        raise UserError(
            f"--measure-latency: a search space of {space.size():.4g} sub-networks is too small for a table"
        )
    return list(sample)


# ------------------------------------------------------------------------------------------------------------- the fit


def fit(samples: Sequence[Mapping[str, int]], milliseconds: Sequence[float]) -> dict[str, float]:
    """Non-negative milliseconds of each name, such that their sums come near to what was measured, relative to it."""
    names = sorted({name for counts in samples for name in counts})
    y = np.asarray(milliseconds, dtype=float)
    x = np.array([[counts.get(name, 0) for name in names] for counts in samples], dtype=float)
    typical = np.median(y) / np.median(x.sum(1))  # the time of one block: the unknowns count in it
    times = typical * nonnegative_ridge(x * typical / y[:, None], np.ones(len(y)), RIDGE)
    return dict(zip(names, times.tolist(), strict=True))


def nonnegative_ridge(x: np.ndarray, y: np.ndarray, ridge: float) -> np.ndarray:
    """The w >= 0 with the least |x w - y|^2 + ridge |w|^2, by active sets (Lawson and Hanson, 1974, chapter 23)."""
    gram, target = x.T @ x + ridge * np.eye(x.shape[1]), x.T @ y
    w, free = np.zeros(len(target)), np.zeros(len(target), dtype=bool)
    tolerance = 1e-10 * np.abs(target).max()
    while True:
        gain = np.where(free, 0.0, target - gram @ w)  # of letting a variable leave zero
        if gain.max() <= tolerance:
            return w
        free[gain.argmax()] = True
        while True:
            best = np.zeros(len(w))
            best[free] = np.linalg.solve(gram[np.ix_(free, free)], target[free])
            blocked = free & (best <= 0)
            if not blocked.any():
                break
            step = (w[blocked] / (w[blocked] - best[blocked])).min()  # as far as no variable turns negative
            w = w + step * (best - w)
            free &= w > 1e-12 * w.max()
            w[~free] = 0.0
        w = best


def predict(ms: Mapping[str, float], counts: Mapping[str, int]) -> float:
    return sum(count * ms[name] for name, count in counts.items())


def relative_errors(predicted: Sequence[float], measured: Sequence[float]) -> np.ndarray:
    """Absolute errors as shares of what was measured."""
    return np.abs(np.asarray(predicted) - measured) / measured


# --------------------------------------------------------------------------------------------------- the measurement


def measure_table(detector: ElasticSSD, config: Config, device: torch.device, threads: int, seed: int) -> LatencyTable:
    """Time a designed sample of whole detectors on `device`, fit the table, and judge it on detectors left out."""
    rng, space, names = random.Random(seed), detector.space, all_features(detector)
    fitted = designed_sample(space, SAMPLES_PER_BLOCK * len(names), rng)
    held_out = held_out_sample(space, HELD_OUT, fitted, rng)
    make = FusedDetectors(detector, config, device)
    rules = config.postprocess
    with cpu_threads(threads):
        measured = time_detectors([make(genotype) for genotype in (*fitted, *held_out)], device, ROUNDS)
        nms = time_nms(rules.top_k, detector.num_classes, rules.nms_threshold, device, ROUNDS)
    counts = [features(detector, genotype) for genotype in (*fitted, *held_out)]
    n = len(fitted)
    ms = fit(counts[:n], measured[:n])
    errors = relative_errors([predict(ms, row) for row in counts[n:]], measured[n:])
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
        error_constant=float(np.median(relative_errors([np.median(measured[:n])] * len(held_out), measured[n:]))),
        nms_ms=nms,
        nms_boxes=rules.top_k,
        ms=ms,
    )


PICTURE = (480, 640)  # height and width of the camera picture that a detector is given
REPETITIONS = 3  # timed calls of a visit, after one that is not
ROUNDS = 10  # visits of each run
REFERENCE_EVERY = 4  # visits from one of the reference to the next
Run = Callable[[], object]


class FusedDetectors:
    """`detectors(genotype)` is a whole detector as it would be deployed on `device`, BatchNorm folded away.

    Each block is cut out once and shared by all detectors that have it, so hundreds of them fit into memory.
    """

    def __init__(self, detector: ElasticSSD, config: Config, device: torch.device):
        self._detector, self._config, self._device = detector, config, device
        self._parts: dict[tuple[nn.Module, Block | None], nn.Module] = {}

    def __call__(self, genotype: Genotype) -> ScoresAndBoxes:
        segments = self._detector.segments(genotype)
        model = SSD(
            image_size=genotype.image_size,
            normalize=self._part(self._detector.normalize),
            backbone=[nn.Sequential(*(self._part(*step) for step in segment)) for segment in segments],
            extras=[],  # one module per feature map, wherever it stands
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
    """Torch computes with `count` CPU threads, until the end of the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def time_parts(model: SSD, config: Config, device: torch.device) -> dict:
    """Milliseconds of a plain detector and of its parts for one camera picture, and how they were taken.

    BatchNorm is folded. `total_ms` is a measurement of its own plus `nms_ms`, so the parts sum to it only nearly.
    """
    deployed = ScoresAndBoxes(fuse(model).to(device, memory_format=torch.channels_last), config).eval()
    net, rules, threads = deployed.model, config.postprocess, config.search.latency_threads
    picture = torch.randint(0, 256, (1, 3, *PICTURE), dtype=torch.uint8, device=device)
    x = net.normalize(picture, net.image_size)
    logits, offsets = net.predict(x)
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
    """What `time_parts` found, in one line."""
    parts = ", ".join(f"{name} {times[f'{name}_ms']:.2f}" for name in ("resize", "network", "decoding", "nms"))
    threads = f", CPU threads: {times['threads']}" if times["device"] == "cpu" else ""
    return f"latency: {times['total_ms']:.2f} ms a picture ({parts}) on {times['device_name']}{threads}"


def time_detectors(models: Sequence[nn.Module], device: torch.device, rounds: int) -> list[float]:
    """Milliseconds of each model for one camera picture that is already on `device`, as `time_interleaved` takes them.

    The first model is also the reference.
    """
    picture = torch.randint(0, 256, (1, 3, *PICTURE), dtype=torch.uint8, device=device)
    with torch.inference_mode():
        return time_interleaved([lambda model=model: model(picture) for model in models], device, rounds)


def time_nms(boxes: int, num_classes: int, threshold: float, device: torch.device, rounds: int) -> float:
    """Milliseconds of non-maximum suppression of that many random boxes."""
    centres, sizes = torch.rand(boxes, 2, device=device), 0.2 * torch.rand(boxes, 2, device=device)
    corners = torch.cat([centres - sizes / 2, centres + sizes / 2], 1)
    scores = torch.rand(boxes, device=device)
    labels = torch.randint(0, num_classes, (boxes,), device=device)
    return statistics.median(
        visit(lambda: batched_nms(corners, scores, labels, threshold), device) for _ in range(rounds)
    )


def time_interleaved(runs: Sequence[Run], device: torch.device, rounds: int) -> list[float]:
    """Median milliseconds of each run over rounds that visit all of them, each round in an order of its own.

    A machine's speed drifts. The first run is the reference: visited every few visits, it tells how fast each round
    was, and the others count relative to it.
    """
    rng = random.Random(0)
    order = list(range(len(runs)))
    speeds: list[float] = []
    relative: list[list[float]] = [[] for _ in runs]
    bar = progress(None, "measure", total=rounds * len(runs))
    for _ in range(rounds):
        rng.shuffle(order)
        reference, found = [], {}
        for n, i in enumerate(order):
            if n % REFERENCE_EVERY == 0:
                reference.append(visit(runs[0], device))
            found[i] = visit(runs[i], device)
            bar.update()
        speeds.append(statistics.median(reference))
        for i, milliseconds in found.items():
            relative[i].append(milliseconds / speeds[-1])
    bar.close()
    usual = statistics.median(speeds)
    return [usual * statistics.median(values) for values in relative]


def visit(run: Run, device: torch.device) -> float:
    """Median milliseconds of a few calls after one that warms up; on a GPU until its work is done."""
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
