"""How near training and inference come to the CPU's peak: GFLOP/s by kind of layer, beside a matrix product's.

    python bench/chip.py

A sub-network of median cost of the reference space (configs/voc_mbv3.yaml, 3 classes) at 300 px: a training step (batch
8), and inference of it extracted and fused (batch 16). torch.profiler gives the own time of each operator and the
shapes of its inputs, from which the operations of convolutions are counted (a multiply-add is 2; gradients with respect
to input and weights count as a forward pass each). The peak is the best of several square float32 products in the same
run. The operations of the forward pass must be those that lib/detector.py counts.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import common
import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from lib.detector import fuse
from lib.errors import UserError
from lib.runtime import run

CLASSES, OBJECTS = 3, 10
SIDE = 2048  # of the matrices
COUNT_TOLERANCE = 0.01
WEIGHT_AT = {  # the position of the weights among the inputs of the operators that compute convolutions
    "aten::mkldnn_convolution": 1,
    "aten::_slow_conv2d_forward": 1,
    "aten::convolution": 1,
    "aten::convolution_backward": 2,
    "aten::_slow_conv2d_backward": 2,
}
OTHERS = {  # parts of the names of other operators
    "BatchNorm": ("batch_norm",),
    "activation": ("hardswish", "hardsigmoid", "threshold", "hardtanh", "clamp_min", "aten::relu"),
    "optimizer": ("_foreach", "optimizer"),
}


def main() -> None:
    args = common.bench_parser(__doc__, "chip.json", rounds=5).parse_args()
    common.begin(args)
    config, detector = common.reference(CLASSES)
    genotype = common.median_genotype(detector)
    flops = 2 * detector.cost(genotype).flops
    fused = fuse(detector.extract(genotype)).to(memory_format=torch.channels_last)
    pictures = common.random_batch(16, 300, OBJECTS, CLASSES).images
    batch = common.random_batch(8, 300, OBJECTS, CLASSES)
    steps = common.SupernetSteps(detector, config, args.device)

    peak = matmul_peak(args.rounds)
    with torch.no_grad():
        inference = measure(partial(fused, pictures), args.rounds, 16 * flops)
    training = measure(partial(steps, batch, genotype), args.rounds, 8 * flops)
    peak = max(peak, matmul_peak(args.rounds))

    print(f"{args.threads} threads; the peak, a matrix product of side {SIDE}: {peak:.0f} GFLOP/s")
    rows = []
    for name, kinds in {"training step, batch 8": training, "inference, batch 16": inference}.items():
        kinds["all"] = {key: sum(row[key] for row in kinds.values()) for key in ("ms", "GFLOP")}
        for kind, row in kinds.items():
            speed = 1e3 * row["GFLOP"] / row["ms"]
            shares = {"of the time": row["ms"] / kinds["all"]["ms"], "GFLOP/s": speed, "of the peak": speed / peak}
            rows.append({"run": name, "layers": kind, **row, **shares})
    common.report(args, rows, peak=peak)


def matmul_peak(rounds: int) -> float:
    """The best GFLOP/s of several float32 matrix products."""
    a, b = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)
    best = math.inf
    for _ in range(1 + rounds):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2e-9 * SIDE**3 / best


def measure(work: Callable[[], object], rounds: int, forward: float) -> dict[str, dict[str, float]]:
    """Milliseconds and GFLOP of a call, by kind of layer. `forward`: operations of the forward pass, to check."""
    work()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        for _ in range(rounds):
            work()
    ms, operations = defaultdict(float), defaultdict(float)
    counted = 0.0
    for event in profiler.events():
        kind = kind_of(event)
        of_event = convolution_operations(event) / rounds
        ms[kind] += event.self_cpu_time_total / 1e3 / rounds
        operations[kind] += of_event
        counted += of_event if event.name == "aten::convolution" else 0
    if abs(counted / forward - 1) > COUNT_TOLERANCE:
        raise UserError(f"the profile has {counted / 1e9:.2f} GFLOP of the forward pass, expected {forward / 1e9:.2f}")
    order = sorted(ms, key=ms.get, reverse=True)
    return {kind: {"ms": ms[kind], "GFLOP": operations[kind] / 1e9} for kind in order}


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
    """2 for each multiply-add; of a backward pass, for each gradient that it computes (input, weights)."""
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


if __name__ == "__main__":
    run(main)
