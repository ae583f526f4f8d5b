"""How near training and inference come to the chip: GFLOP/s by kind of layer, beside its matrix multiplication's.

    python bench/chip.py --out chip.json

The middling sub-network of the reference space (configs/voc_mbv3.yaml with 3 classes), 300 px: a training step (batch 8)
and inference of it cut out and fused (batch 16). torch.profiler gives each operator's own time and the shapes of its
inputs, from which convolutions' operations are counted (a multiply-add is 2; a gradient counts for input and for
weights). The peak is the best of several square float32 products in the same run; the forward pass's operations must be
those that lib/cost.py counts. Prints a table, writes JSON.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.reference import SupernetSteps, middling, random_batch, reference
from bench.turns import add_options, begin, print_table, write
from lib.errors import UserError
from lib.fuse import fuse

CLASSES, OBJECTS = 3, 10
SIDE = 2048  # of the matrices
FORWARD = ("aten::mkldnn_convolution", "aten::_slow_conv2d_forward")
BACKWARD = ("aten::convolution_backward",)
NORM = ("native_batch_norm", "batch_norm_elemt", "batch_norm_stats")
ACTIVATIONS = ("hardswish", "hardsigmoid", "threshold_backward", "hardtanh", "clamp_min", "relu")
OPTIMIZER = ("_foreach", "_fused_sgd")

Kind = tuple[str, float]  # its name, operations of one call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "chip.json", rounds=5)
    args = parser.parse_args()
    begin(args)
    settings, detector = reference(CLASSES)
    genotype = middling(detector)
    flops = 2 * detector.cost(genotype).flops
    fused = fuse(detector.extract(genotype)).to(memory_format=torch.channels_last)
    pictures = random_batch(16, 300, OBJECTS, CLASSES)
    batch = random_batch(8, 300, OBJECTS, CLASSES)
    steps = SupernetSteps(detector, settings)

    @torch.inference_mode()
    def infer() -> None:
        fused(pictures.images)

    peak = matmul_peak(args.rounds)
    result = {
        "training step, batch 8": measure(lambda: steps(batch, genotype), args.rounds, 8 * flops),
        "inference, batch 16": measure(infer, args.rounds, 16 * flops),
    }
    peak = max(peak, matmul_peak(args.rounds))
    report(args, peak, result)


def matmul_peak(rounds: int) -> float:
    """The best GFLOP/s of several float32 matrix products."""
    a, b, best = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE), math.inf
    for _ in range(1 + rounds):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2e-9 * SIDE**3 / best


def measure(run: Callable[[], object], rounds: int, forward: float) -> dict[str, dict[str, float]]:
    """Milliseconds and GFLOP/s a call, by kind of layer. `forward` are the operations that its convolutions must have."""
    run()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        for _ in range(rounds):
            run()
    ms, operations, ahead = defaultdict(float), defaultdict(float), 0.0
    for event in profiler.key_averages(group_by_input_shape=True):
        kind, each = classify(event.key, event.input_shapes)
        ms[kind] += event.self_cpu_time_total / 1e3 / rounds
        operations[kind] += each * event.count / rounds
        ahead += each * event.count / rounds if event.key in FORWARD else 0
    if abs(ahead / forward - 1) > 0.01:
        raise UserError(f"the profile has {ahead / 1e9:.2f} GFLOP of convolutions ahead, {forward / 1e9:.2f} expected")
    order = sorted(ms, key=ms.get, reverse=True)
    return {kind: {"ms": ms[kind], "gflop": operations[kind] / 1e9, "gflops": 1e-6 * operations[kind] / ms[kind]} for kind in order}


def classify(name: str, shapes: Sequence[Sequence[int]]) -> Kind:
    """What kind of layer an operator belongs to, and its operations."""
    if name in FORWARD:
        x, weight = shapes[:2]
        return convolution(weight), 2.0 * x[0] * math.prod(weight) * output_pixels(name, shapes)
    return "rest", 0.0


if __name__ == "__main__":
    main()
