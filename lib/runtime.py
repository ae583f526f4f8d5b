"""Which workers a search has: processes or actors of a Ray cluster, the device of each, CPU threads where it is one.

The machine and the process: devices, threads, seeds, signals, the C allocator.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import platform
import random
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from lib import distributed
from lib.config import Config
from lib.errors import UserError

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


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
PR_SET_PDEATHSIG = 1  # sys/prctl.h
ECHO_SECONDS = 1.0  # a batch system may send SIGTERM to a process, and again to the group it is in


def pick_device(name: str, flag: str = "--device") -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N`, the value of `flag`, as a device that this machine has.

    In a job of several processes each has a GPU of its own.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if distributed.world().size > 1 and name.startswith("cuda"):
        if name != "cuda":
            raise UserError(f"{flag} {name}: expected auto, cpu or cuda, since each process takes a GPU of its own")
        name = f"cuda:{distributed.world().local_rank}"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"{flag} {name}: expected auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"{flag} {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def device_name(device: torch.device) -> str:
    """The model of a GPU or of this machine's processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def keep_freed_memory() -> None:
    """Ask glibc to keep large freed blocks: a training step frees and asks for the same ones again and again.

    Without it the kernel takes them back and zeroes them anew each step. Does nothing where mallopt is missing.
    """
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def die_with_parent() -> None:
    """Ask Linux to kill this process when the one that forked it ends, however that ends.

    A child has its parent's sockets open: as long as it lives, the parent's peers do not see that the parent is gone.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if not multiprocessing.parent_process().is_alive():  # it ended before that
        os._exit(1)


class StopRequest:
    """Turns the first SIGINT or SIGTERM into `requested`, so that a loop can save and leave; the second one ends it.

    A context manager; the handlers that were there before come back at its end, unless another process of the job is
    lost: this one has to say so and ends by itself, whatever signals come. In a job of several processes, `requested`
    changes in `agree` alone, and so after the same step in all of them.
    """

    def __init__(self) -> None:
        self.requested = False
        self._signalled = 0.0  # when, on time.monotonic
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is distributed.PeerLost:
            self._before.pop(signal.SIGTERM)
            _be_deaf_to_the_launcher()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agree(self) -> None:
        """To be called by all processes after each step."""
        self.requested = distributed.any_of(bool(self._signalled))

    def _on_signal(self, number: int, _frame: object) -> None:
        if self._signalled:
            if number == signal.SIGINT or time.monotonic() - self._signalled > ECHO_SECONDS:
                os._exit(128 + number)
            return
        self._signalled = time.monotonic()
        self.requested = self.requested or distributed.world().size == 1
        if distributed.world().main:
            with contextlib.suppress(OSError):  # whoever reads it may have had the same signal
                os.write(2, b"\nStopping after this step; once more to stop at once.\n")


def _be_deaf_to_the_launcher() -> None:
    """Ignore SIGTERM, which torchrun sends to the rest of a job as soon as one process has ended."""
    if distributed.world().size > 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def run(main: Callable[[], None]) -> None:
    """Run a script's main function. A user's mistake is one line on stderr and exit status 2, a lost process status 1.

    Several processes say it once.
    """
    keep_freed_memory()
    try:
        main()
        distributed.leave()
    except (UserError, distributed.PeerLost) as error:
        _be_deaf_to_the_launcher()
        lost = isinstance(error, distributed.PeerLost)
        if distributed.first_to_report():
            print("\n" * lost + f"error: {error}", file=sys.stderr)  # the lost one may have left a progress bar
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.exit(1 if lost else 2)
    except KeyboardInterrupt:
        sys.exit(130)
