"""Several processes that train one model: who is who, what they exchange, and BatchNorm over all of their batches.

torchrun starts the processes and tells each through its environment which one it is. After `join`, all processes call
the functions below in the same order; in a job of one process these return what they were given. Tensors travel by NCCL
on CUDA and by gloo on the CPU, Python objects always by gloo.

Gradients are averaged here instead of by DistributedDataParallel: a step of the supernet runs several sub-networks,
each with a backward pass over its own parameters, while DDP's reducer follows a single pass and would not reduce a
parameter that the last one left out. One reduction after the last pass is exact and sends each gradient once a step.
"""

import contextlib
import copy
import itertools
import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lib.elastic import ElasticBatchNorm

T = TypeVar("T")
TIMEOUT = timedelta(minutes=15)  # for what one process does while the others wait: drawing data, computing AP
BUCKET = 2**23  # numbers that travel together, 32 MiB in float32
_stores: list[dist.Store] = []  # the job's key-value store, once this process has joined


class PeerLost(Exception):
    """Another process of the job is gone, so this one cannot continue."""


class World(NamedTuple):
    """Which process this is: `rank` of `size`, and `local_rank` among those on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def main(self) -> bool:
        """Whether this is the one process that prints and writes files."""
        return self.rank == 0


def world() -> World:
    """What torchrun says; without torchrun, the only process."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    return World(*(int(os.environ[name]) for name in names)) if os.environ.keys() >= set(names) else World()


def join(device: torch.device) -> None:
    """Connect to the other processes of the job. From here on only the main one has a standard output."""
    if world().size == 1:
        return
    with _peers():
        shared, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
        store = _store_of_this_start(shared)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    _stores.append(store)  # for `first_to_report`: it works while the process group no longer does
    if not world().main:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())


def _store_of_this_start(store: dist.Store) -> dist.Store:
    """A part of torchrun's store for this start of the job alone, under a random name chosen by the main process."""
    # The store outlives restarts, so it still has the addresses of processes that are gone. Each process announces a
    # random name of its own. The main one answers to that name, again and again until the answer is confirmed.
    me, rank = uuid.uuid4().hex, world().rank
    if rank > 0:
        store.set(f"here/{rank}", me)
        name = store.get(f"name/{me}").decode()  # blocks until the main process answers
        store.set(f"heard/{name}/{rank}", "")
        return dist.PrefixStore(name, store)
    silent = set(range(1, world().size))
    while silent:
        for other in silent:
            if store.check([f"here/{other}"]):
                store.set(f"name/{store.get(f'here/{other}').decode()}", me)
        silent = {other for other in silent if not store.check([f"heard/{me}/{other}"])}
        time.sleep(0.02)
    return dist.PrefixStore(me, store)


def leave() -> None:
    """Disconnect at the end of the work."""
    if dist.is_initialized():
        dist.destroy_process_group()


def first_to_report() -> bool:
    """Whether this process asks first: an error that several processes run into is reported once."""
    with contextlib.suppress(RuntimeError):  # the store may be gone as well
        return not _stores or _stores[-1].add("reports", 1) == 1
    return world().main


@contextlib.contextmanager
def _peers() -> Iterator[None]:
    """Raise PeerLost for what a backend raises when it cannot reach a peer."""
    try:
        yield
    except RuntimeError as error:
        # Of the backend's message, its first sentence without the place in torch's source.
        reason = re.sub(r"^\[.*?\] |\. .*", "", str(error).partition("\n")[0])
        problem = f"a process of this job died or no longer answers ({reason})"
        raise PeerLost(f"{problem}; start the same command with --resume") from None


def _all_reduce(tensor: Tensor) -> Tensor:
    """Sum `tensor` over the processes, in place."""
    if world().size > 1:
        with _peers():
            dist.all_reduce(tensor)
    return tensor


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes. The same ones are None in every process."""
    if (size := world().size) > 1:
        _in_buckets([p.grad for p in parameters if p.grad is not None], lambda flat: _all_reduce(flat).div_(size))


def copy_from_main(module: nn.Module) -> None:
    """Give every process the main one's parameters and buffers."""
    if world().size > 1:
        _in_buckets(floating_tensors(module), lambda flat: dist.broadcast(flat, 0))


def floating_tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers, without counters such as BatchNorm's."""
    return [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]


@torch.no_grad()
def _in_buckets(tensors: Sequence[Tensor], operation: Callable[[Tensor], object]) -> None:
    """Apply an in-place operation to tensors of one type, which travel in buckets, each as one flat tensor."""
    ends = itertools.accumulate(t.numel() for t in tensors)
    for _, group in itertools.groupby(zip(tensors, ends, strict=True), lambda pair: pair[1] // BUCKET):
        bucket = [tensor for tensor, _ in group]
        flat = torch.cat([t.flatten() for t in bucket])
        with _peers():
            operation(flat)
        for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))


def normalizer(counts: Tensor) -> Tensor:
    """The divisors of a loss such that its mean over the processes is that of one process with the whole batch.

    `counts` are those of this process's share; the result is the whole batch's, at least 1, per process.
    """
    return _all_reduce(counts.float()).clamp(min=1) / world().size


def mean_of(values: dict[str, float]) -> dict[str, float]:
    """The mean of each number over the processes, which all have the same names."""
    total = _all_reduce(torch.tensor(list(values.values()), dtype=torch.float64))
    return dict(zip(values, (total / world().size).tolist(), strict=True))


def any_of(flag: bool) -> bool:
    """Whether `flag` is true in any process."""
    return bool(_all_reduce(torch.tensor(int(flag))))


def deal(items: Sequence[T]) -> Sequence[T]:
    """This process's share of the work: every `size`-th item, from its rank on."""
    return items[world().rank :: world().size]


def collect(results: Sequence[T]) -> list[T]:
    """The results of dealt items, in the items' order, in the main process; the others get an empty list."""
    if (size := world().size) == 1:
        return list(results)
    parts: list | None = [None] * size if world().main else None
    with _peers():
        dist.gather_object(list(results), parts)
    # Item i was dealt to process i % size.
    return [parts[i % size][i // size] for i in range(sum(map(len, parts or ())))]


def from_main(value: T) -> T:
    """The main process's `value`, in every process."""
    if world().size == 1:
        return value
    values = [value]
    with _peers():
        dist.broadcast_object_list(values, 0)
    return values[0]


class _Sum(torch.autograd.Function):
    """The sum over the processes; its gradient is the sum of their gradients."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return _all_reduce(x.clone())

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:
        return _all_reduce(gradient.clone())


def stack(x: Tensor) -> Tensor:
    """`x` of every process, (size, *x.shape), differentiable: the gradient sums over all processes' uses."""
    own_row = torch.arange(world().size, device=x.device).view(-1, *(1,) * x.ndim) == world().rank
    return _Sum.apply(torch.where(own_row, x, 0))


class SyncBatchNorm(ElasticBatchNorm):
    """BatchNorm of the first c channels, with the statistics of all processes' batches, which have equal shapes.

    torch.nn.SyncBatchNorm has no CPU version and cannot normalise a slice of its channels.
    """

    def __init__(self, replaced: nn.BatchNorm2d):
        self.__dict__ = {**replaced.__dict__, "kind": type(replaced)}  # the same parameters and statistics

    def __deepcopy__(self, memo: dict) -> nn.BatchNorm2d:
        """The layer it replaced. A copy, such as an extracted sub-network or a moving average, runs in one process."""
        norm = self.kind.__new__(self.kind)
        norm.__dict__ = copy.deepcopy(self.__dict__, memo)
        return norm

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, H, W) to the same shape; c may be less than the layer's number of channels."""
        if not self.training:
            return super().forward(x)
        c = x.shape[1]
        count = x.numel() // c * world().size
        # In half precision the variance of large activations would overflow.
        full = x.to(torch.promote_types(x.dtype, torch.float32))
        own = torch.stack(torch.var_mean(full, (0, 2, 3), correction=0))  # (2, c)
        variances, means = stack(own).unbind(1)  # (size, c) each
        mean = means.mean(0)
        # Law of total variance.
        var = variances.mean(0) + (means - mean).square().mean(0)
        with torch.no_grad():
            self.running_mean[:c].lerp_(mean, self.momentum)
            self.running_var[:c].lerp_(var * (count / (count - 1)), self.momentum)
        scale = self.weight[:c] * (var + self.eps).rsqrt()
        shift = self.bias[:c] - mean * scale
        return (full * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)).to(x.dtype)


def synchronise_norms(module: nn.Module) -> None:
    """Replace every BatchNorm2d below `module` by a SyncBatchNorm with the same parameters and statistics."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, SyncBatchNorm(child))
