"""Which workers a search has: processes or actors of a Ray cluster, the device of each, CPU threads where it is one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from lib import ray_dispatcher
from lib.config import Config
from lib.dispatcher import Dispatcher
from lib.errors import UserError
from lib.pool import WorkerPool
from lib.runtime import pick_device

CPU_WORKERS = 8  # at most, where nothing else is asked for


def devices_of(device: str) -> str | None:
    """--device as --gpus would say it; None where the machine is to decide."""
    if device == "auto":
        return None
    picked = pick_device(device)
    return "cpu" if picked.type == "cpu" else str(picked.index or 0)


def pick_workers(gpus: str | None, config: Config) -> tuple[list[str], int | None]:
    """The device of each worker, and CPU threads per worker where it is the CPU.

    `--gpus` is `0,1,2`, `cpu` or `cpu,cpu`. Without it: the configured `gpu_ids` that exist, every GPU, or the CPU.
    `search.parallelism` workers are dealt out over the GPUs, where it is more than these; on a CPU it is how many there
    are without `--gpus`.
    """
    count, cores = torch.cuda.device_count(), torch.get_num_threads()  # which OMP_NUM_THREADS bounds
    wanted = config.search.parallelism
    if gpus is None:
        ids = [i for i in config.search.gpu_ids if i < count] or list(range(count))
        devices = [f"cuda:{i}" for i in ids] or ["cpu"] * min(cores, wanted or CPU_WORKERS)
    else:
        names = [name.strip() for name in gpus.split(",")]
        bad = [n for n in names if n != "cpu" and not (n.isdigit() and int(n) < count)]
        if bad:
            raise UserError(f"--gpus {gpus}: '{bad[0]}' is neither cpu nor one of this machine's {count} CUDA devices")
        devices = ["cpu" if name == "cpu" else f"cuda:{name}" for name in names]
    if wanted > len(devices) and devices[0] != "cpu":
        devices = [devices[i % len(devices)] for i in range(wanted)]
    on_cpu = devices.count("cpu")
    return devices, max(1, cores // on_cpu) if on_cpu else None


def pick_dispatcher(
    kind: str, address: str | None, gpus: str | None, config: Config
) -> tuple[list[str], Callable[..., WorkerPool]]:
    """The device of each worker, and what makes the dispatcher from its `setup` and `args`.

    `kind` and `address` are the values of --dispatcher and --ray-address. A cluster is joined here, or started.
    """
    if kind != "ray" and address:
        raise UserError(f"--ray-address {address}: goes with --dispatcher ray")
    if kind == "ray":
        ray_dispatcher.connect(address)
        devices, threads = pick_ray_workers(gpus, ray_dispatcher.machines(), config)
        pool = ray_dispatcher.RayDispatcher
    else:
        devices, threads = pick_workers(gpus, config)
        pool = Dispatcher
    return devices, functools.partial(pool, devices=devices, threads_per_worker=threads)


def pick_ray_workers(gpus: str | None, machines: Sequence[dict], config: Config) -> tuple[list[str], int | None]:
    """The device of each worker on a cluster whose machines have so much "CPU" and "GPU", and CPU threads of each.

    Ray chooses the places, so a number in `--gpus` means any GPU. Without it: every GPU of the cluster, else every CPU
    or `search.parallelism` CPU workers.
    """
    cpus, count = ([int(m.get(name, 0)) for m in machines] for name in ("CPU", "GPU"))
    if gpus is None:
        devices = ["cuda"] * sum(count) or ["cpu"] * (config.search.parallelism or sum(cpus))
    else:
        names = [name.strip() for name in gpus.split(",")]
        bad = [name for name in names if name != "cpu" and not name.isdigit()]
        if bad:
            raise UserError(f"--gpus {gpus}: '{bad[0]}' is neither cpu nor the number of a GPU")
        devices = ["cpu" if name == "cpu" else "cuda" for name in names]
    on_gpu, on_cpu = devices.count("cuda"), devices.count("cpu")
    if on_gpu > sum(count) or on_cpu > sum(cpus):
        found = f"{sum(count)} GPUs and {sum(cpus)} CPUs"
        raise UserError(f"{on_gpu} GPU and {on_cpu} CPU workers: more than the Ray cluster's {found}")
    return devices, most_threads(cpus, on_cpu) if on_cpu else None


def most_threads(cpus: Sequence[int], workers: int) -> int:
    """The most threads that each of so many workers can have on machines of so many CPUs each."""
    return next(n for n in range(max(cpus), 0, -1) if sum(machine // n for machine in cpus) >= workers)
