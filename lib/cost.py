"""What a network costs: multiply-adds and parameters, counted without running it on data."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


class Cost(NamedTuple):
    """`flops` are multiply-adds for one image, `params` are learned numbers."""

    flops: int
    params: int

    def plus(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.params + other.params)


ModuleCost = tuple[Cost, list[tuple[int, ...]]]  # and the shapes of the outputs


def module_cost(module: nn.Module, *input_shapes: Sequence[int]) -> ModuleCost:
    """The cost of a plain module on inputs of these shapes, and the shapes of its outputs.

    Runs on torch's meta device, so no arithmetic is done. Convolutions and matrix products count, as in the papers.
    """
    shadow = copy.deepcopy(module).to("meta").eval()
    inputs = [torch.empty(shape, device="meta") for shape in input_shapes]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        outputs = shadow(*inputs)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    params = sum(p.numel() for p in module.parameters())
    return Cost(counter.get_total_flops() // 2, params), [tuple(o.shape) for o in outputs]
