"""Workers that are actors of a Ray cluster, on this machine or on many.

What a search gives its workers are paths, so every machine must have this code, the supernet's run and the search's
folder under the same paths: a shared folder. Nothing else is copied.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lib.errors import UserError
from lib.pool import Worker, WorkerDied, WorkerPool, attempt, prepare

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

    def _start(self, slot: int, still_births: int) -> _Actor:
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
        actor = _Actor(slot, still_births, handle, device)
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
