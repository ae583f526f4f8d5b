"""How near training and inference come to the chip: GFLOP/s by kind of layer, beside its matrix multiplication's.

    python bench/chip.py --out chip.json

The middling sub-network of the reference space (configs/voc_mbv3.yaml, 3 classes), 300 px: a training step (batch 8)
and inference of it cut out and fused (batch 16). torch.profiler gives each operator's own time and the shapes of its
inputs, from which convolutions' operations are counted (a multiply-add is 2; a gradient counts for input and for
weights). The peak is the best of several square float32 products in the same run; the forward pass's operations must be
those that lib/detector.py counts. Prints a table, writes JSON.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.reference import SupernetSteps, middling, random_batch, reference
from bench.turns import add_options, begin, print_table, write
from lib.detector import fuse
from lib.errors import UserError

CLASSES, OBJECTS = 3, 10
SIDE = 2048  # of the matrices
COUNT_TOLERANCE = 0.01
WEIGHT_AT = {  # the position of the weights among the inputs of what computes convolutions
    "aten::mkldnn_convolution": 1,
    "aten::_slow_conv2d_forward": 1,
    "aten::convolution": 1,
    "aten::convolution_backward": 2,
    "aten::_slow_conv2d_backward": 2,
}
OTHERS = {
    "BatchNorm": ("batch_norm",),
    "activation": ("hardswish", "hardsigmoid", "threshold", "hardtanh", "clamp_min", "aten::relu"),
    "optimizer": ("_foreach", "optimizer"),
}


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
    """Milliseconds and operations of a call, by kind of layer. `forward`: operations of the forward pass, to check."""
    run()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        for _ in range(rounds):
            run()
    ms, operations, ahead = defaultdict(float), defaultdict(float), 0.0
    for event in profiler.events():
        each, kind = convolution_operations(event), kind_of(event)
        ms[kind] += event.self_cpu_time_total / 1e3 / rounds
        operations[kind] += each / rounds
        ahead += each / rounds if event.name == "aten::convolution" else 0
    if abs(ahead / forward - 1) > COUNT_TOLERANCE:
        raise UserError(f"the profile has {ahead / 1e9:.2f} GFLOP of the forward pass, {forward / 1e9:.2f} expected")
    order = sorted(ms, key=ms.get, reverse=True)
    return {kind: {"ms": ms[kind], "gflop": operations[kind] / 1e9} for kind in order}


def kind_of(event: FunctionEvent) -> str:
    if event.name in WEIGHT_AT and event.input_shapes:
        out_channels, in_channels, size, _ = event.input_shapes[WEIGHT_AT[event.name]]
        if size == 1:
            return "1x1 convolution"
        return "depthwise convolution" if in_channels == 1 < out_channels else f"{size}x{size} convolution"
    for kind, parts in OTHERS.items():
        if any(part in event.name.lower() for part in parts):
            return kind
    return "rest"


def convolution_operations(event: FunctionEvent) -> float:
    """2 for each multiply-add; of a gradient, for each of those that are asked for (input, weights)."""
    if event.name == "aten::convolution":
        (batch, _, *sides), weight = event.input_shapes[:2]
        strides, paddings = event.concrete_inputs[3:5]
        places = zip(sides, weight[2:], strides, paddings, strict=True)
        outputs = math.prod((side + 2 * padding - size) // stride + 1 for side, size, stride, padding in places)
        return 2.0 * batch * outputs * math.prod(weight)
    if event.name == "aten::convolution_backward":
        (batch, _, *outputs), _, weight = event.input_shapes[:3]
        return 2.0 * batch * math.prod(outputs) * math.prod(weight) * sum(event.concrete_inputs[-1][:2])
    return 0.0


def report(args: argparse.Namespace, peak: float, result: dict[str, dict]) -> None:
    print(f"{args.threads} threads; the peak, a matrix product of side {SIDE}: {peak:.0f} GFLOP/s")
    table = []
    for run, kinds in result.items():
        whole = {"ms": sum(row["ms"] for row in kinds.values()), "gflop": sum(row["gflop"] for row in kinds.values())}
        for kind, row in {**kinds, "all": whole}.items():
            row |= {"share_of_time": row["ms"] / whole["ms"], "gflops": 1e3 * row["gflop"] / row["ms"]}
            row["share_of_peak"] = row["gflops"] / peak
            share, of_peak = f"{row['share_of_time']:.0%}", f"{row['share_of_peak']:.1%}"
            table.append((run, kind, f"{row['ms']:.1f}", share, f"{row['gflop']:.2f}", f"{row['gflops']:.1f}", of_peak))
        kinds["all"] = whole
    print_table(("run", "layers", "ms", "of the time", "GFLOP", "GFLOP/s", "of the peak"), table)
    write(args.out, {"rounds": args.rounds, "peak_gflops": peak, "runs": result})


if __name__ == "__main__":
    main()
