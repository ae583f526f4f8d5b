"""The machine and the process: devices, threads, seeds, signals, the C allocator."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import random
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from lib.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def pick_device(name: str, flag: str = "--device") -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N`, the value of `flag`, as a device that this machine has."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
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


class StopRequest:
    """Turns the first SIGINT or SIGTERM into `requested`, so that a loop can save and leave; the second one ends it.

    A context manager; the handlers that were there before come back at its end.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: object) -> None:
        if self.requested:
            os._exit(128 + number)
        self.requested = True
        print("\nStopping after this step; once more to stop at once.", file=sys.stderr, flush=True)


def run(main: Callable[[], None]) -> None:
    """Run a script's main function. A user's mistake is one line on stderr and exit status 2."""
    keep_freed_memory()
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
