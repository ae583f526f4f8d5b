"""BatchNorm over the batches of all processes of a job, of whole layers and of slices of elastic ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lib import distributed
from lib.elastic import ElasticBatchNorm


class SyncBatchNorm(ElasticBatchNorm):
    """Batch normalisation of the first channels with the statistics of all processes' batches, of equal shape.

    torch.nn.SyncBatchNorm would do on CUDA for whole layers; it has no CPU version and knows no slices.
    """

    local = False

    def forward(self, x: Tensor) -> Tensor:
        if self.local or not self.training:
            return super().forward(x)
        c, count = x.shape[1], x.numel() // x.shape[1] * distributed.world().size
        own = torch.stack(torch.var_mean(x.float(), (0, 2, 3), correction=0))  # (2, c)
        variances, means = distributed.stack(own).unbind(1)  # (size, c)
        mean = means.mean(0)
        var = variances.mean(0) + (means - mean).square().mean(0)  # law of total variance
        with torch.no_grad():
            self.running_mean[:c].lerp_(mean, self.momentum)
            self.running_var[:c].lerp_(var * (count / (count - 1)), self.momentum)
        scale = self.weight[:c] * (var + self.eps).rsqrt()
        shift = self.bias[:c] - mean * scale
        return (x.float() * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)).to(x.dtype)


def synchronise_norms(module: nn.Module) -> None:
    """Put a SyncBatchNorm with the same parameters and statistics in the place of every BatchNorm2d below `module`."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            norm = SyncBatchNorm(child.num_features, child.eps, child.momentum).train(child.training)
            for tensor in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
                setattr(norm, tensor, getattr(child, tensor))
            setattr(module, name, norm)
        else:
            synchronise_norms(child)


@contextlib.contextmanager
def local_norms(module: nn.Module) -> Iterator[None]:
    """While it lasts, each process normalises for itself: what it runs is not what the others run."""
    norms = [child for child in module.modules() if isinstance(child, SyncBatchNorm)]
    for norm in norms:
        norm.local = True
    try:
        yield
    finally:
        for norm in norms:
            norm.local = False
