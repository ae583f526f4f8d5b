"""BatchNorm folded into the convolution before it: what a deployed detector computes, with fewer operations."""

from __future__ import annotations

import copy
import itertools

import torch
from torch import nn
from torch.nn.utils import fuse_conv_bn_weights


def fuse(model: nn.Module) -> nn.Module:
    """A copy of a plain `model` in evaluation mode with the same outputs, but for rounding (Jacob et al., CVPR 2018).

    Every BatchNorm that follows a convolution in an `nn.Sequential` is folded into it and gone.
    """
    return fuse_(copy.deepcopy(model))


@torch.no_grad()
def fuse_(model: nn.Module) -> nn.Module:
    """`fuse` in place: without the copy, which takes a tenth of the time that a candidate's score does."""
    model.eval()
    for sequence in [module for module in model.modules() if isinstance(module, nn.Sequential)]:
        layers = list(sequence._modules.items())  # named_children() leaves out a layer's second occurrence
        for (_, conv), (norm_name, norm) in itertools.pairwise(layers):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                statistics = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
                conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics)
                delattr(sequence, norm_name)
    return model
