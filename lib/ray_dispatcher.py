"""Workers that are actors of a Ray cluster, on this machine or on many; `pick_dispatcher` chooses these or processes.

The search gives its workers paths, and no file is copied: every machine must have this code, the supernet's run and the
search's folder under the same paths, as in a shared folder.
"""

import functools
import math
import os
import pickle
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lib import UserError
from lib.config import Config
from lib.dispatcher import Dispatcher, Worker, WorkerPool, run_job, set_up
from lib.runtime import pick_workers, read_devices


def pick_dispatcher(
    kind: str, address: str | None, gpus: str, config: Config, flag: str = "--gpus"
) -> tuple[list[str], Callable[..., WorkerPool]]:
    """The device of each worker, and a function that makes the dispatcher from its `setup` and `args`.

    `kind` and `address` are the values of --dispatcher and --ray-address, `gpus` that of `flag`. For "ray", this joins
    the cluster, or starts one.
    """
    if kind == "ray":
        connect(address)
        # The cluster's machines decide how many workers there can be.
        machines = [node["Resources"] for node in _ray().nodes() if node["Alive"]]
        devices, threads = pick_ray_workers(gpus, machines, config, flag)
        pool = RayDispatcher
    elif address:
        raise UserError(f"--ray-address {address}: goes with --dispatcher ray")
    else:
        devices, threads = pick_workers(gpus, config, flag)
        pool = Dispatcher
    limit = config.search.first_time_limit or None
    return devices, functools.partial(pool, devices=devices, threads_per_worker=threads, setup_limit=limit)


def connect(address: str | None, cpus: int | None = None) -> None:
    """Join the Ray cluster at `address` ("auto": the one of this machine), or start one on this machine alone.

    The latter assumes `cpus` CPUs (default: all) and ends with this process. Call this before setting signal handlers,
    since Ray sets its own. Raises UserError if Ray or the cluster is missing.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    init = functools.partial(_ray().init, logging_level="ERROR", log_to_driver=False)
    if not address:
        init(address="local", num_cpus=cpus, include_dashboard=False)
        return
    try:
        init(address=address)
    except (ConnectionError, ValueError, RuntimeError) as error:
        problem = f"no Ray cluster answers ({str(error).splitlines()[0]})"
        raise UserError(f"--ray-address {address}: {problem}; start one with: ray start --head") from None


def pick_ray_workers(
    gpus: str, machines: Sequence[dict], config: Config, flag: str = "--gpus"
) -> tuple[list[str], int]:
    """The device of each worker of a cluster, and the CPU threads of each.

    `machines` are the resources ("CPU", "GPU", ...) of each machine. `gpus` is what `pick_workers` takes, but Ray
    places the workers: a number is any GPU, and an equal one says that two workers share a GPU.
    """
    cpus = [int(machine.get("CPU", 0)) for machine in machines]
    gpus_of = [int(machine.get("GPU", 0)) for machine in machines]
    gpu_count, parallelism = sum(gpus_of), config.search.parallelism
    if gpus == "auto":
        workers = max(parallelism, gpu_count) or max(1, sum(cpus))
        devices = [f"cuda:{i % gpu_count}" if gpu_count else "cpu" for i in range(workers)]
    else:
        devices = read_devices(gpus, flag, gpu_count, "the Ray cluster")
    cpu_workers = devices.count("cpu")
    if cpu_workers > sum(cpus):
        raise UserError(f"{cpu_workers} CPU workers: more than the Ray cluster's {sum(cpus)} CPUs")
    if cpu_workers:
        # The most that every worker can have, each on one machine.
        fits = (n for n in range(max(cpus), 0, -1) if sum(machine // n for machine in cpus) >= cpu_workers)
        return devices, next(fits)
    # Of the machine with the fewest CPUs for a GPU, each worker of a GPU has an equal share.
    cpus_of_gpu = min(count // gpu for count, gpu in zip(cpus, gpus_of, strict=True) if gpu)
    return devices, max(1, cpus_of_gpu // max(Counter(devices).values()))


@dataclass
class _Actor(Worker):
    handle: Any
    calls: deque  # references to the messages not yet received, in order
    end: str = field(default="", init=False)  # how it died


class _Remote:
    """What runs in an actor's process. Its methods return messages."""

    def __init__(self, *what_to_set_up):
        self._what = what_to_set_up

    def placed(self) -> bytes:
        return pickle.dumps(("placed",))

    def ready(self) -> bytes:
        self._function, message = set_up(*self._what)
        return message

    def run(self, message: bytes) -> bytes:
        return run_job(self._function, message)


class RayDispatcher(WorkerPool):
    """A WorkerPool of Ray actors, which end with this process; call `connect` first.

    A worker on "cuda:N" has its part of a GPU, which it sees as "cuda:0"; one on "cpu" has `threads_per_worker` CPUs.
    Ray chooses the machine. If a machine is lost, its actors start on another one as soon as there is room, while the
    others go on. The death of an idle actor is noticed when it is given a job, which then counts as an attempt.
    """

    SETUP_HINT = " (reported by a Ray worker: every machine needs this run's files under the same paths)"

    def _start(self, slot: int) -> _Actor:
        threads = self._threads or 1
        on_gpu = self._devices[slot].startswith("cuda")
        # Workers of one GPU have equal parts of it, rounded down, since Ray rounds to 1e-4, perhaps up.
        part = 10_000 // self._devices.count(self._devices[slot]) / 10_000
        options = {
            "num_gpus": part if on_gpu else 0,
            "num_cpus": 0 if on_gpu else threads,
            # WorkerPool restarts actors, and queues a dead one's jobs again.
            "max_restarts": 0,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}},
        }
        device = "cuda:0" if on_gpu else self._devices[slot]
        handle = _ray().remote(_Remote).options(**options).remote(self._setup, device, self._args)
        actor = _Actor(slot, handle, deque([handle.placed.remote(), handle.ready.remote()]))
        actor.since = math.inf  # it may wait for room on a machine for as long as it takes
        return actor

    def _listen(self, timeout: float) -> list[_Actor]:
        owners = {actor.calls[0]: actor for actor in self._workers if actor.calls}
        ready, _ = _ray().wait([*owners], num_returns=1, timeout=timeout)
        return [owners[call] for call in ready]

    def _receive(self, worker: _Actor) -> Iterator[bytes]:
        ray = _ray()
        while worker.calls and ray.wait([worker.calls[0]], timeout=0)[0]:
            try:
                message = ray.get(worker.calls[0])
            except ray.exceptions.RayError as error:
                worker.end = " ".join(str(error).partition("Some common causes")[0].split())
                raise EOFError from None
            worker.calls.popleft()
            yield message

    def _send(self, worker: _Actor, message: bytes) -> None:
        worker.calls.append(worker.handle.run.remote(message))

    def _kill(self, worker: _Actor) -> str:
        _ray().kill(worker.handle, no_restart=True)
        return worker.end


def _ray():
    try:
        import ray
    except ImportError:
        raise UserError("--dispatcher ray: the package is missing; pip install ray") from None
    return ray
