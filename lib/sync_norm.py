"""BatchNorm over the batches of all processes of a job, of whole layers and of slices of elastic ones."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from lib import distributed
from lib.elastic import ElasticBatchNorm

TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class SyncBatchNorm(ElasticBatchNorm):
    """Batch normalisation of the first channels with the statistics of all processes' batches, of equal shape.

    torch.nn.SyncBatchNorm would do on CUDA for whole layers; it has no CPU version and knows no slices.
    """

    def __init__(self, replaced: nn.BatchNorm2d):
        super().__init__(replaced.num_features, replaced.eps, replaced.momentum)
        self.kind = type(replaced)
        self.train(replaced.training)
        for name in TENSORS:
            setattr(self, name, getattr(replaced, name))

    def __deepcopy__(self, memo: dict) -> nn.BatchNorm2d:
        """The layer it stands for. What is cut out of a network, or averages one, does not run in all processes."""
        norm = self.kind(self.num_features, self.eps, self.momentum).train(self.training)
        for name in TENSORS:
            setattr(norm, name, copy.deepcopy(getattr(self, name), memo))
        return norm

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        c, count = x.shape[1], x.numel() // x.shape[1] * distributed.world().size
        full = x.to(torch.promote_types(x.dtype, torch.float32))
        own = torch.stack(torch.var_mean(full, (0, 2, 3), correction=0))  # (2, c)
        variances, means = distributed.stack(own).unbind(1)  # (size, c)
        mean = means.mean(0)
        var = variances.mean(0) + (means - mean).square().mean(0)  # law of total variance
        with torch.no_grad():
            self.running_mean[:c].lerp_(mean, self.momentum)
            self.running_var[:c].lerp_(var * (count / (count - 1)), self.momentum)
        scale = self.weight[:c] * (var + self.eps).rsqrt()
        shift = self.bias[:c] - mean * scale
        return (full * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)).to(x.dtype)


def synchronise_norms(module: nn.Module) -> None:
    """Put a SyncBatchNorm with the same parameters and statistics in the place of every BatchNorm2d below `module`."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, SyncBatchNorm(child))
        else:
            synchronise_norms(child)
