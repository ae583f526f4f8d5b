"""Milliseconds of whole detectors on a device: one picture in, scores and boxes out, non-maximum suppression apart."""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from torchvision.ops import batched_nms

from lib.config import Config
from lib.detector import SSD, ElasticSSD, ScoresAndBoxes
from lib.fuse import fuse
from lib.genotype import Block, Genotype
from lib.runlog import progress
from lib.runtime import device_name

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
