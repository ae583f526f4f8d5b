"""Several processes that train one model: who this one is, and what they tell one another.

torchrun starts the processes and says in the environment which one each is. A script that `join`s then works with the
functions below; in a job of one process they give back what they were given. All processes call them in the same order.
Tensors travel by NCCL on CUDA and by gloo on the CPU, Python objects always by gloo.

Gradients are averaged here and not by DistributedDataParallel. A step of the supernet runs several sub-networks, each
with a backward pass over parameters of its own, and DDP's reducer follows one pass: it would not reduce a parameter
that the last one left out. One reduction after the last pass is exact, and sends each gradient once a step.

BatchNorm over the batches of all processes of a job, of whole layers and of slices of elastic ones.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lib.elastic import ElasticBatchNorm

T = TypeVar("T")
TIMEOUT = timedelta(minutes=15)  # the longest that the others wait for one, which draws the data or measures AP
BUCKET = 2**23  # numbers that travel together, 32 MiB in float32
_NOTHING = object()
_stores: list[dist.Store] = []  # the job's, once this process has joined


class PeerLost(Exception):
    """Another process of the job is gone, so this one cannot go on."""

    def __init__(self, reason: str):
        super().__init__(
            f"a process of this job died or no longer answers ({reason}); start the same command with --resume"
        )


@dataclass(frozen=True)
class World:
    """Which process this is: `rank` of `size`, and `local_rank` of those on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def main(self) -> bool:
        """Whether this is the one process that prints and writes files."""
        return self.rank == 0


def world() -> World:
    """What torchrun says, or the only process."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    return World(*(int(os.environ[name]) for name in names)) if os.environ.keys() >= set(names) else World()


def join(device: torch.device) -> None:
    """Meet the other processes of the job. From here on only the main one has a standard output."""
    if world().size == 1:
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with _peers():
        shared, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
        store = _own_part(shared)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    _stores.append(store)
    if not world().main:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())


def _own_part(store: dist.Store) -> dist.Store:
    """A part of torchrun's store for this start of the job alone, under a name that the main process makes up.

    The store outlives restarts and still has the addresses of processes that are gone. So each process says that it is
    here, under a name of its own, and the main one answers to that name, again and again until it is heard.
    """
    me, rank = uuid.uuid4().hex, world().rank
    if rank > 0:
        store.set(f"here/{rank}", me)
        name = store.get(f"name/{me}").decode()  # waits for the answer
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
    """Part from the others at the end of the work."""
    if dist.is_initialized():
        dist.destroy_process_group()


def first_to_report() -> bool:
    """Whether this process is the first of the job to ask: an error that several run into is told once."""
    with contextlib.suppress(RuntimeError):  # the store may be gone as well
        return not _stores or _stores[-1].add("reports", 1) == 1
    return world().main


@contextlib.contextmanager
def _peers() -> Iterator[None]:
    """Raise PeerLost for what a backend raises when it cannot reach a peer."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLost(re.sub(r"^\[.*?\] |\. .*", "", str(error).partition("\n")[0])) from None


def _all_reduce(tensor: Tensor, operation: dist.ReduceOp = dist.ReduceOp.SUM) -> Tensor:
    """Sum `tensor` over the processes, in place."""
    if world().size > 1:
        with _peers():
            dist.all_reduce(tensor, operation)
    return tensor


# ------------------------------------------------------------------------------------------------------------ training


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """The mean over the processes of every gradient there is, in place.

    Those that are None must be so in every process: a step's sub-networks are the same in all of them.
    """
    size = world().size
    if size > 1:
        _in_buckets([p.grad for p in parameters if p.grad is not None], lambda flat: _all_reduce(flat).div_(size))


def copy_from_main(module: nn.Module) -> None:
    """Give every process the main one's parameters and buffers."""
    if world().size > 1:
        tensors = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
        _in_buckets(tensors, lambda flat: dist.broadcast(flat, 0))


@torch.no_grad()
def _in_buckets(tensors: Sequence[Tensor], operation: Callable[[Tensor], object]) -> None:
    """Apply an operation that works in place to `tensors` of one type, a bucket at a time as one flat tensor."""
    ends = itertools.accumulate(t.numel() for t in tensors)
    for _, group in itertools.groupby(zip(tensors, ends, strict=True), lambda pair: pair[1] // BUCKET):
        bucket = [tensor for tensor, _ in group]
        flat = torch.cat([t.flatten() for t in bucket])
        with _peers():
            operation(flat)
        for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))


def normalizers(counts: Tensor) -> Tensor:
    """What each process divides its sums by, so that their mean is that of one process with the whole batch.

    `counts` are this process's; the result is the whole batch's, at least 1, over the number of processes.
    """
    return _all_reduce(counts.float()).clamp(min=1) / world().size


def mean_of(values: dict[str, float]) -> dict[str, float]:
    """The mean over the processes of each number; all have the same names."""
    total = _all_reduce(torch.tensor(list(values.values()), dtype=torch.float64))
    return dict(zip(values, (total / world().size).tolist(), strict=True))


def any_of(flag: bool) -> bool:
    """Whether `flag` is true in any process."""
    return bool(_all_reduce(torch.tensor(int(flag)), dist.ReduceOp.MAX))


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return _all_reduce(x.clone())

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:
        return _all_reduce(gradient.clone())


def stack(x: Tensor) -> Tensor:
    """`x` of every process, (size, *x.shape), with the gradient that all of them together have."""
    row = torch.arange(world().size, device=x.device).view(-1, *(1,) * x.ndim) == world().rank
    return _Sum.apply(torch.where(row, x, 0))


# ---------------------------------------------------------------------------------------------------- the rest of a run


def deal(items: Sequence[T]) -> Sequence[T]:
    """This process's part of the work: every item of which the number, modulo `size`, is its rank."""
    return items[world().rank :: world().size]


def collect(results: Sequence[T]) -> list[T]:
    """The results of items that were dealt, in the items' order. The main process has them, the others get none."""
    rank, size = world().rank, world().size
    if size == 1:
        return list(results)
    parts: list | None = [None] * size if rank == 0 else None
    with _peers():
        dist.gather_object(list(results), parts)
    rounds = itertools.zip_longest(*(parts or ()), fillvalue=_NOTHING)
    return [result for round_ in rounds for result in round_ if result is not _NOTHING]


def from_main(value: T) -> T:
    """The main process's `value`, in every process."""
    if world().size == 1:
        return value
    values = [value]
    with _peers():
        dist.broadcast_object_list(values, 0)
    return values[0]


@contextlib.contextmanager
def in_turns() -> Iterator[None]:
    """Around work that leaves files for those who come later: the main process, one on each machine, the rest."""
    turn = 0 if world().main else 1 if world().local_rank == 0 else 2
    for _ in range(turn):
        any_of(False)  # waits for all
    yield
    for _ in range(2 - turn):
        any_of(False)


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
        c, count = x.shape[1], x.numel() // x.shape[1] * world().size
        full = x.to(torch.promote_types(x.dtype, torch.float32))
        own = torch.stack(torch.var_mean(full, (0, 2, 3), correction=0))  # (2, c)
        variances, means = stack(own).unbind(1)  # (size, c)
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
