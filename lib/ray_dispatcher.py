"""Workers that are actors of a Ray cluster, on this machine or on many.

What a search gives its workers are paths, so every machine must have this code, the supernet's run and the search's
folder under the same paths: a shared folder. Nothing else is copied.
"""

from __future__ import annotations

import functools
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lib.config import Config
from lib.dispatcher import Dispatcher, Worker, WorkerDied, WorkerPool, attempt, prepare
from lib.errors import UserError
from lib.runtime import pick_workers

LOCAL = "local"  # a cluster of this machine alone, which ends with this process


@dataclass
class _Actor(Worker):
    handle: Any
    device: str
    calls: deque = field(default_factory=deque)  # references to its messages that have not been received, in order
    end: str = ""  # how it died


class _Remote:
    """What runs in an actor's process; its methods return messages."""

    def __init__(self, setup: Callable, device: str, args: tuple):
        self._handle, self._ready = prepare(setup, device, args)

    def ready(self) -> bytes:
        return self._ready

    def run(self, message: bytes) -> bytes:
        return attempt(self._handle, message)


class RayDispatcher(WorkerPool):
    """A WorkerPool of Ray actors; call `connect` first.

    A worker on "cuda" has a GPU of its own, which it knows as "cuda:0"; one on "cpu" has `threads_per_worker` CPUs. Ray
    chooses the machine. An actor whose machine is gone is started on another as soon as one has room, and the others
    go on. Actors end with this process. One that dies without a job is missed only when it is given one, which then
    counts as an attempt.
    """

    def _start(self, slot: int, failed_starts: int) -> _Actor:
        ray = _ray()
        threads = self._threads or 1
        on_gpu = self._devices[slot].startswith("cuda")
        device = "cuda:0" if on_gpu else self._devices[slot]
        options = {
            "num_gpus": int(on_gpu),
            "num_cpus": 0 if on_gpu else threads,
            "max_restarts": 0,  # what a dead actor held is queued again here
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}},
        }
        handle = ray.remote(_Remote).options(**options).remote(self._setup, device, self._args)
        actor = _Actor(slot, failed_starts, handle, device)
        actor.calls.append(handle.ready.remote())
        return actor

    def _listen(self, timeout: float | None) -> list[_Actor]:
        owners = {actor.calls[0]: actor for actor in self._workers if actor.calls}
        ready, _ = _ray().wait([*owners], num_returns=1, timeout=timeout)
        return [owners[call] for call in ready]

    def _receive(self, worker: _Actor) -> Iterator[bytes]:
        ray = _ray()
        while worker.calls and ray.wait([worker.calls[0]], timeout=0)[0]:
            try:
                message = ray.get(worker.calls[0])
            except ray.exceptions.RayError as error:
                worker.end = _last_words(error)
                raise WorkerDied from None
            worker.calls.popleft()
            yield message

    def _send(self, worker: _Actor, message: bytes) -> bool:
        worker.calls.append(worker.handle.run.remote(message))
        return True

    def _kill(self, worker: _Actor) -> str:
        _ray().kill(worker.handle, no_restart=True)
        return worker.end

    def _dismiss(self, workers: Sequence[_Actor]) -> None:
        for worker in workers:
            self._kill(worker)

    def _on_setup_failed(self, worker: Worker, user_error: bool, text: str) -> None:
        if user_error:
            text += " (a Ray worker says so: every machine needs this run's files under the same paths)"
        super()._on_setup_failed(worker, user_error, text)


def _last_words(error: Exception) -> str:
    """What Ray says of a death, in one line: its first line and the one that names the reason, without advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    reason = next((line for line in lines[1:] if line.startswith("The actor is dead because")), "")
    return f"{lines[0]} {reason.partition(' Some common causes')[0]}".strip()


def connect(address: str | None, cpus: int | None = None) -> None:
    """Join the Ray cluster at `address` ("auto": the one this machine is part of), or start one of this machine alone.

    That one believes in `cpus` CPUs (default: those there are) and ends with this process. To be called before signal
    handlers are set, since Ray sets its own. UserError where Ray or the cluster is missing.
    """
    ray = _ray()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet = {"logging_level": "ERROR", "log_to_driver": False}
    if not address:
        ray.init(address=LOCAL, num_cpus=cpus, include_dashboard=False, **quiet)
        return
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--ray-address {address}: no Ray cluster answers ({reason}); start one with: ray start --head"
        ) from None


def machines() -> list[dict[str, float]]:
    """The resources ("CPU", "GPU", ...) of each machine of the cluster."""
    return [node["Resources"] for node in _ray().nodes() if node["Alive"]]


def _ray():
    try:
        import ray
    except ImportError:
        raise UserError("--dispatcher ray: the package is missing; pip install ray") from None
    return ray


def pick_dispatcher(
    kind: str, address: str | None, gpus: str | None, config: Config
) -> tuple[list[str], Callable[..., WorkerPool]]:
    """The device of each worker, and what makes the dispatcher from its `setup` and `args`.

    `kind` and `address` are the values of --dispatcher and --ray-address. A cluster is joined here, or started.
    """
    if kind != "ray" and address:
        raise UserError(f"--ray-address {address}: goes with --dispatcher ray")
    if kind == "ray":
        connect(address)
        devices, threads = pick_ray_workers(gpus, machines(), config)
        pool = RayDispatcher
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
