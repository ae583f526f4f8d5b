"""Which workers a search has: the device of each, and CPU threads where that is the CPU."""

from __future__ import annotations

import torch

from lib.config import Config
from lib.errors import UserError
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
    `search.parallelism` workers are dealt out over the devices.
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
