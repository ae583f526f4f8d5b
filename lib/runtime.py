"""The machine and the process that a script runs in: devices, seeds, timing, memory, signals and the exit status."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing.queues
import os
import platform
import random
import re
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from lib import UserError, distributed, one_line
from lib.config import Config
from lib.dispatcher import STOPS, die_with_parent
from lib.log import keep_streams_open, progress, say

MAX_CPU_WORKERS = 8  # by default; more have to be asked for
# What a shortage looks like in the exceptions of PyTorch and Python, and what helps.
SHORTAGES = {
    "Too many open files|ancdata": "too many open files: ulimit -n 65536, or a smaller data.workers",
    "shared memory|</torch_|[Bb]us error": "/dev/shm is too small: docker run --shm-size=2g, or --set data.workers=0",
    r"DataLoader worker \(pid": "a loader process has ended, for want of memory (a smaller data.workers, "
    "data.cache=false), of /dev/shm (docker run --shm-size=2g) or of open files (ulimit -n 65536)",
    "[Oo]ut of memory|an't allocate memory|annot allocate memory|MemoryError": "out of memory: a smaller batch_size "
    "with accumulate in its place, precision=bf16, or final.cuda_graph=false",
    "No space left|quota exceeded|File too large": "the disk is full",
}
GRACE_SECONDS = 10  # that a loader process goes on after SIGTERM
REPETITIONS = 3  # timed calls of a visit, after one that warms up
ECHO_SECONDS = 1.0  # a batch system may send SIGTERM to a process and then again to its process group


def read_devices(text: str, flag: str, gpus: int, place: str = "this machine") -> list[str]:
    """`cpu` or `cuda:N` for each entry of a list such as `0,cuda:1,cpu`, where `place` has `gpus` GPUs."""
    there = ["cpu", *(f"cuda:{i}" for i in range(gpus))]
    devices = []
    for name in map(str.strip, text.split(",")):
        device = "cuda:0" if name == "cuda" else f"cuda:{name}" if name.isdigit() else name
        if device not in there:
            raise UserError(f"{flag} {text}: '{name}' is not among {place}'s devices: {', '.join(there)}")
        devices.append(device)
    return devices


def pick_device(name: str, flag: str = "--device") -> torch.device:
    """The one device named as in `read_devices`, or by `auto`; in a distributed job the GPU of the local rank.

    A GPU becomes the current one, which every process that computes leaves to this function: CUDA calls that name no
    device, NCCL and a loader's pinning thread would otherwise occupy GPU 0 as well.
    """
    world = distributed.world()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if world.size > 1 and name == "cuda":
        name = f"cuda:{world.local_rank}"
    elif world.size > 1 and name != "cpu":
        raise UserError(f"{flag} {name}: expected auto, cpu or cuda, since each process takes a GPU of its own")
    device, *others = read_devices(name, flag, torch.cuda.device_count())
    if others:
        raise UserError(f"{flag} {name}: expected one device; torchrun --nproc_per_node=N trains on N GPUs")
    if device != "cpu":
        torch.cuda.set_device(device)
    return torch.device(device)


def pick_workers(gpus: str, config: Config, flag: str = "--gpus") -> tuple[list[str], int]:
    """The device of each worker of this machine, and the CPU threads of each, an equal share of the cores.

    Each entry of `gpus`, a list as in `read_devices`, is a worker. For `auto` there is one on each of the configured
    `gpu_ids` that exist, else on each GPU, or `search.parallelism` workers that share these if that is more; without a
    GPU, `search.parallelism` CPU workers, or as many as there are cores, up to MAX_CPU_WORKERS.
    """
    gpu_count, parallelism = torch.cuda.device_count(), config.search.parallelism
    cores = torch.get_num_threads()  # respects OMP_NUM_THREADS, unlike os.cpu_count()
    if gpus == "auto":
        ids = [i for i in config.search.gpu_ids if i < gpu_count] or range(gpu_count)
        workers = max(parallelism, len(ids)) if ids else min(cores, parallelism or MAX_CPU_WORKERS)
        devices = [f"cuda:{ids[i % len(ids)]}" if ids else "cpu" for i in range(workers)]
    else:
        devices = read_devices(gpus, flag, gpu_count)
    return devices, max(1, cores // len(devices))


def device_name(device: torch.device) -> str:
    """The model of a GPU, or of this machine's processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        if found := re.search("^model name.*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1]
    return platform.processor() or platform.machine()


def time_interleaved(
    visits: Sequence[Callable[[], float]], threads: int, rounds: int, reference_every: int = 2
) -> list[float]:
    """Median milliseconds of each over so many rounds, on `threads` CPU threads. A visit measures once and returns ms.

    A round makes every visit, in a random order. The speed of a machine changes, also twofold from one second to the
    next. So the first visit serves as the reference: it is repeated after every `reference_every` others, and a time is
    divided by the mean of the reference's before and after it.
    """
    rng = random.Random(0)
    order = list(range(len(visits)))
    ratios = np.empty((rounds, len(visits)))
    references = []
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with progress(None, "measure", total=rounds * len(visits)) as bar:
            for n in range(rounds):
                rng.shuffle(order)
                references.append(visits[0]())
                for start in range(0, len(order), reference_every):
                    some = order[start : start + reference_every]
                    times = np.array([visits[i]() for i in some])
                    references.append(visits[0]())
                    ratios[n, some] = times / statistics.mean(references[-2:])
                    bar.update(len(some))
    finally:
        torch.set_num_threads(threads_before)
    # Ratios to the reference become milliseconds at the machine's usual speed.
    return (statistics.median(references) * np.median(ratios, axis=0)).tolist()


def visit(run: Callable[[], object], device: torch.device, often: int = 1) -> float:
    """Median milliseconds of a few calls after one that warms up. Waits for the GPU's work to end."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda _: None
    times = []
    for _ in range(1 + often * REPETITIONS):
        wait(device)
        start = time.perf_counter()
        run()
        wait(device)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def prepare_process() -> None:
    """TF32 on a GPU; glibc, where there is one, keeps large freed blocks: the kernel would zero them at each use."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    # Each sub-network has other shapes, whose algorithms would be timed, and chosen otherwise in the next run.
    torch.backends.cudnn.benchmark = False
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD of malloc.h
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def start_loader_process(worker: int) -> None:
    """Of a DataLoader's process: use one thread, as the main process uses the others, and leave signals to that one."""
    die_with_parent()
    torch.set_num_threads(1)
    # Ctrl-C, and the SIGTERM of torchrun, reach the whole group of processes, so the worker leaves the group. A batch
    # system may signal each process.
    os.setpgid(0, 0)
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    # The main process may still need batches to end its step, and it ends its children by SIGTERM too.
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE_SECONDS))
    # By default, a batch that does not fit into shared memory is dropped, and the main process waits for it forever.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_give_up)


def _give_up(error: Exception, _batch: object) -> None:
    """End this loader process, which cannot hand its batches over. The main process notices within seconds."""
    os.write(2, f"loader process: {' '.join(str(error).split())}\n".encode())
    os._exit(1)


class Stopped(Exception):
    """A signal ended the work, and everything is saved; `number` is the signal's, the message says how to go on."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number


class StopRequest:
    """A context manager that turns the first signal into `requested`, so that a loop can save and leave.

    A second Ctrl-C or SIGTERM exits at once. SIGHUP (a closed terminal) and SIGUSR1 (Slurm's warning) only ask.
    In a distributed job, `requested` changes only in `agree`, so that all processes stop after the same step. If
    another process of the job is lost (`PeerLost`), SIGTERM stays ignored on leaving: this process still has to report
    the loss, and then ends by itself.
    """

    def __init__(self) -> None:
        self.requested = False
        self.number = signal.SIGTERM  # of the request; in a job, the signal may have reached another process
        self._signalled = False
        self._insisted = 0.0  # time.monotonic() of the first Ctrl-C or SIGTERM

    def __enter__(self) -> StopRequest:
        # nohup has SIGHUP ignored.
        heard = [n for n in STOPS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._on_signal) for number in heard}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is distributed.PeerLost:
            self._before.pop(signal.SIGTERM)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agree(self) -> None:
        """Share the request among all processes of the job. Each of them calls this after every step."""
        self.requested = distributed.any_of(self._signalled)

    def _on_signal(self, number: int, _frame: object) -> None:
        if number in (signal.SIGINT, signal.SIGTERM):
            # An echo of the first SIGTERM is not a second request.
            echo = number == signal.SIGTERM and time.monotonic() - self._insisted < ECHO_SECONDS
            if self._insisted and not echo:
                os._exit(128 + number)
            self._insisted = self._insisted or time.monotonic()
        if self._signalled:
            return
        self._signalled, self.number = True, number
        self.requested |= distributed.world().size == 1
        if distributed.world().main:
            # The reader of stderr may have received the same signal and be gone.
            with contextlib.suppress(OSError):
                os.write(2, b"\nStopping after this step; once more to stop at once.\n")


def run(main: Callable[[], None]) -> None:
    """Run a script's main function and exit with its status: 2 for a user's mistake, 1 for a lost process of the job.

    Both print one line to stderr, from one process of the job. What the machine refuses (a full disk, no permission, no
    memory) counts as a user's mistake. Stopped by a signal, it exits with 130 after Ctrl-C and with 143 otherwise, as
    if SIGTERM had ended it: what a shell runs after `&&` is not to start.
    """
    prepare_process()
    keep_streams_open()
    if distributed.world().size == 1:
        # Where there is nothing to save, temporary files go. While a StopRequest lasts, the signals are its own.
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, lambda *_: sys.exit(143))
    try:
        main()
        distributed.leave()
    except (UserError, distributed.PeerLost, OSError, MemoryError, RuntimeError) as error:
        lost = isinstance(error, distributed.PeerLost)
        message = error if lost or isinstance(error, UserError) else _remedy(error)
        if not message:
            raise
        if distributed.world().size > 1:  # torchrun sends it to the rest of a job as soon as one process has ended
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if distributed.first_to_report():
            # The lost process may have left a progress bar on this line.
            print("\n" * lost + f"error: {message}", file=sys.stderr)
        # The report is out, so the launcher may end this process now.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _let_go(error)
        sys.exit(1 if lost else 2)
    except Stopped as stopped:
        say(f"stopped; {stopped}")
        _let_go(stopped)
        distributed.leave()
        sys.exit(130 if stopped.number == signal.SIGINT else 143)
    except KeyboardInterrupt:
        sys.exit(130)


def _remedy(error: Exception) -> str:
    """What helps where the machine refused something; "" if that is not known."""
    text = f"{type(error).__name__}: {error}".strip().splitlines()[-1]  # of a loader process's traceback, the last line
    for pattern, remedy in SHORTAGES.items():
        if re.search(pattern, text):
            return one_line(f"{remedy} ({text[:160]})")
    return one_line(f"{error.filename}: {error.strerror}") if getattr(error, "filename", None) else ""


def _let_go(error: BaseException | None) -> None:
    """Free what the frames of an error hold. Loaders end their processes then; Python's exit waits 5 s for each."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
