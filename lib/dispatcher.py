"""Jobs on workers that may fail: queues, attempts, time limits. What a worker is, the dispatchers say.

A `WorkerPool` knows nothing of what the jobs are. Its interface is `submit`, `free_slots`, `pending`, `results` and
`close`.

Workers that are processes of this machine.

How long a job may take, judged by the jobs that ended before it.
"""

from __future__ import annotations

import bisect
import contextlib
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection, resource_tracker
from typing import Any

from lib.errors import UserError

ATTEMPTS = 3  # a job that fails so often is given up, and so is a worker that dies so often before it is ready


class WorkerError(RuntimeError):
    """A worker could not be set up. The message holds the worker's traceback."""


class WorkerDied(Exception):
    """A worker is gone, and all that it sent has been received."""


@dataclass(frozen=True)
class Result:
    """How a job ended: with a `value`, or given up with an `error`. `seconds` is its last attempt's wall time."""

    job_id: Hashable
    value: Any
    error: str | None
    worker: str
    seconds: float


@dataclass
class Worker:
    """What a pool knows of one worker. It runs its `jobs` in order, the first since `since`."""

    slot: int
    failed_starts: int  # deaths before it was ready, in a row, of this worker's predecessors
    ready: bool = field(default=False, init=False)
    jobs: deque[Hashable] = field(default_factory=deque, init=False)
    since: float = field(default=0.0, init=False)


class WorkerPool(ABC):
    """One worker for each of `devices` ("cpu", "cuda:0", ...; repeats allowed). Use as a context manager.

    `setup(device, *args)` is called once in each worker and returns the function that turns a payload into a result.
    `setup`, `args`, payloads and results must be picklable. A worker holds at most `max_ahead` jobs, the running one
    included, so that it never waits for the parent. `threads_per_worker` bounds a worker's CPU threads.

    A job that raises, kills its worker, or runs longer than `time_limit` seconds is tried again, `ATTEMPTS` times in
    all; then its result carries the error. A dead worker's jobs are queued again and a new worker takes its place.
    """

    def __init__(
        self,
        setup: Callable[..., Callable[[Any], Any]],
        args: tuple,
        devices: Sequence[str],
        max_ahead: int = 2,
        threads_per_worker: int | None = None,
        time_limit: float | None = None,
    ):
        self.time_limit = time_limit  # seconds; may be changed at any time
        self._setup, self._args, self._devices = setup, args, list(devices)
        self._max_ahead, self._threads = max_ahead, threads_per_worker
        self._messages: dict[Hashable, bytes] = {}  # of every job without a result: its id and payload, pickled
        self._waiting: deque[Hashable] = deque()  # jobs that no worker holds
        self._failures: Counter[Hashable] = Counter()
        self._done: list[Result] = []
        self._workers = [self._start(slot, 0) for slot in range(len(self._devices))]

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def pending(self) -> int:
        """How many submitted jobs `results` has not returned yet."""
        return len(self._messages) + len(self._done)

    def free_slots(self) -> int:
        """How many jobs can be submitted until every worker has all it may hold."""
        return max(0, self._max_ahead * len(self._workers) - len(self._messages))

    def submit(self, job_id: Hashable, payload: Any) -> None:
        """Queue a job. Beyond `free_slots` it waits here until a worker has room. Raises what `results` raises."""
        if job_id in self._messages:
            raise ValueError(f"job {job_id!r} is pending already")
        self._messages[job_id] = pickle.dumps((job_id, payload))
        self._waiting.append(job_id)
        self._feed()

    def results(self, timeout: float | None = None) -> list[Result]:
        """Wait until a job ends, at most `timeout` seconds, and return all that ended, in that order.

        Empty after the timeout, or at once if nothing is pending. Raises WorkerError, or UserError where it is the
        user's to mend, when a worker cannot be set up.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._messages and not self._done:
            for worker in self._listen(self._patience(deadline)):
                if not self._drain(worker):
                    self._replace(worker)
            self._stop_overdue()
            self._feed()
            if deadline is not None and time.monotonic() >= deadline:
                break
        done, self._done = self._done, []
        return done

    def close(self) -> None:
        """End all workers, in seconds, whatever they do. Pending jobs are lost."""
        self._dismiss(self._workers)
        self._workers = []
        self._messages.clear()
        self._waiting.clear()

    @abstractmethod
    def _start(self, slot: int, failed_starts: int) -> Worker:
        """A new worker on this slot's device. It sets itself up, and its first message says whether it could."""

    @abstractmethod
    def _listen(self, timeout: float | None) -> Iterable[Worker]:
        """Wait for a message or a death, at most `timeout` seconds; the workers that have news."""

    @abstractmethod
    def _receive(self, worker: Worker) -> Iterator[bytes]:
        """The messages that have arrived. Raises WorkerDied after a dead worker's last one."""

    @abstractmethod
    def _send(self, worker: Worker, message: bytes) -> bool:
        """Hand a job to a worker; False if that is known to be dead."""

    @abstractmethod
    def _kill(self, worker: Worker) -> str:
        """End a worker unless it is dead, and say how it ended. What it had sent can still be received."""

    @abstractmethod
    def _dismiss(self, workers: Sequence[Worker]) -> None:
        """End all workers."""

    def _feed(self) -> None:
        """Hand waiting jobs to the ready workers that hold the fewest.

        While workers start, a job for each is kept back from those that are busy; an idle one may have it. A job that
        failed is tried again on a worker that holds no other: if that dies too, the blame is clear.
        """
        while self._waiting:
            ready = [w for w in self._workers if w.ready and not any(self._failures[job] for job in w.jobs)]
            worker = min(ready, key=lambda w: len(w.jobs), default=None)
            if worker is None or len(worker.jobs) >= self._max_ahead:
                return
            starting = sum(not w.ready for w in self._workers)
            if worker.jobs and (len(self._waiting) <= starting or self._failures[self._waiting[0]]):
                return
            if not self._send(worker, self._messages[self._waiting[0]]):
                self._replace(worker)
                continue
            if not worker.jobs:
                worker.since = time.monotonic()
            worker.jobs.append(self._waiting.popleft())

    def _drain(self, worker: Worker) -> bool:
        """Take all messages that have arrived. False if the worker is dead."""
        try:
            for message in self._receive(worker):
                kind, *content = pickle.loads(message)
                getattr(self, f"_on_{kind}")(worker, *content)
        except WorkerDied:
            return False
        return True

    def _on_ready(self, worker: Worker) -> None:
        worker.ready, worker.failed_starts = True, 0

    def _on_setup_failed(self, worker: Worker, user_error: bool, text: str) -> None:
        if user_error:
            raise UserError(text)
        raise WorkerError(f"worker {self._name(worker)} could not be set up:\n{text}")

    def _on_value(self, worker: Worker, job_id: Hashable, seconds: float, value: Any) -> None:
        self._release(worker, job_id)
        self._finish(worker, job_id, seconds, value, None)

    def _on_error(self, worker: Worker, job_id: Hashable, seconds: float, error: str) -> None:
        self._release(worker, job_id)
        self._failed(worker, job_id, seconds, error)

    def _release(self, worker: Worker, job_id: Hashable) -> None:
        worker.jobs.remove(job_id)
        worker.since = time.monotonic()

    def _finish(self, worker: Worker, job_id: Hashable, seconds: float, value: Any, error: str | None) -> None:
        del self._messages[job_id]
        self._failures.pop(job_id, None)
        self._done.append(Result(job_id, value, error, self._name(worker), seconds))

    def _failed(self, worker: Worker, job_id: Hashable, seconds: float, error: str) -> None:
        self._failures[job_id] += 1
        if self._failures[job_id] < ATTEMPTS:
            self._waiting.appendleft(job_id)
        else:
            self._finish(worker, job_id, seconds, None, f"{error} (attempt {ATTEMPTS} of {ATTEMPTS})")

    def _replace(self, worker: Worker, reason: str = "") -> None:
        """Queue a dead or overdue worker's jobs again, start its successor. The job that was running is to blame."""
        overdue = worker.jobs[0] if reason else None  # asked first: it may have ended just now, and nobody is to blame
        how = self._kill(worker)
        self._drain(worker)
        unfinished, worker.jobs = list(worker.jobs), deque()
        culprit = overdue if reason else next(iter(unfinished), None)
        self._waiting.extendleft(reversed([job_id for job_id in unfinished if job_id != culprit]))
        if culprit in unfinished:
            self._failed(worker, culprit, time.monotonic() - worker.since, reason or f"the worker died ({how})")
        failed_starts = 0 if worker.ready else worker.failed_starts + 1
        if failed_starts >= ATTEMPTS:
            raise UserError(f"worker {self._name(worker)} died {ATTEMPTS} times in a row before it was ready ({how})")
        self._workers[worker.slot] = self._start(worker.slot, failed_starts)

    def _stop_overdue(self) -> None:
        if self.time_limit is None:
            return
        for worker in list(self._workers):
            if worker.jobs and time.monotonic() - worker.since > self.time_limit:
                self._replace(worker, f"no result within {self.time_limit:g} s")

    def _patience(self, deadline: float | None) -> float | None:
        """Seconds until the timeout or the next job's time limit; None if there is neither."""
        moments = [] if deadline is None else [deadline]
        if self.time_limit is not None:
            moments += [w.since + self.time_limit for w in self._workers if w.jobs]
        return max(0.0, min(moments) - time.monotonic()) if moments else None

    def _name(self, worker: Worker) -> str:
        return f"{self._devices[worker.slot]}#{worker.slot}"


def prepare(setup: Callable[..., Callable], device: str, args: tuple) -> tuple[Callable[[Any], Any] | None, bytes]:
    """Set up a worker, within it: its function (None where that failed), and the message that says how it went."""
    try:
        return setup(device, *args), pickle.dumps(("ready",))
    except BaseException as error:
        user_error = isinstance(error, UserError)
        return None, pickle.dumps(("setup_failed", user_error, str(error) if user_error else traceback.format_exc()))


def attempt(handle: Callable[[Any], Any], message: bytes) -> bytes:
    """Run one job, within a worker; the message that says how it went."""
    job_id, payload = pickle.loads(message)
    start = time.perf_counter()
    try:
        value = handle(payload)
        return pickle.dumps(("value", job_id, time.perf_counter() - start, value))
    except BaseException:
        text = traceback.format_exc(limit=-2).strip()
        return pickle.dumps(("error", job_id, time.perf_counter() - start, text))


GRACE_SECONDS = 2.0  # how long `close` lets workers leave by themselves
PARENT_POLL_SECONDS = 1.0  # how often a worker looks whether its parent still lives
LEAVE = b""  # the message that ends a worker
_CONTEXT = multiprocessing.get_context("spawn")


@dataclass
class _Process(Worker):
    process: Any
    conn: connection.Connection


class Dispatcher(WorkerPool):
    """A WorkerPool of spawned processes.

    A worker ends by itself when this process is gone, and ignores Ctrl-C, which is this process's to handle. Workers
    are daemons: they may not start `multiprocessing` children of their own.
    """

    def _start(self, slot: int, failed_starts: int) -> _Process:
        ours, theirs = _CONTEXT.Pipe()
        process = _CONTEXT.Process(
            target=_work, args=(theirs, os.getpid(), self._setup, self._devices[slot], self._args), daemon=True
        )
        with _inherited_by_children(self._threads):
            process.start()
        theirs.close()  # so that the worker's death closes the pipe
        return _Process(slot, failed_starts, process, ours)

    def _listen(self, timeout: float | None) -> list[_Process]:
        owners = {channel: w for w in self._workers for channel in (w.conn, w.process.sentinel)}
        ready = connection.wait(owners, timeout)
        return list({owners[channel].slot: owners[channel] for channel in ready}.values())

    def _receive(self, worker: _Process) -> Iterator[bytes]:
        alive = worker.process.is_alive()  # asked first: all that a dead worker ever sent is in its pipe by now
        try:
            while worker.conn.poll():
                yield worker.conn.recv_bytes()
        except (EOFError, OSError):
            worker.conn.close()
            alive = False
        if not alive:
            raise WorkerDied

    def _send(self, worker: _Process, message: bytes) -> bool:
        try:
            worker.conn.send_bytes(message)
        except OSError:
            return False
        return True

    def _kill(self, worker: _Process) -> str:
        worker.process.kill()
        worker.process.join()
        return _how_it_ended(worker.process.exitcode)

    def _dismiss(self, workers: Sequence[_Process]) -> None:
        for worker in workers:
            self._send(worker, LEAVE)
        deadline = time.monotonic() + GRACE_SECONDS
        for worker in workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
            self._kill(worker)
            worker.conn.close()


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    hint = ", as the system does when memory runs out" if code == -signal.SIGKILL else ""
    return f"killed by {signal.Signals(-code).name}{hint}"


@contextlib.contextmanager
def _inherited_by_children(threads: int | None) -> Iterator[None]:
    """Start children with `threads` CPU threads, and with Ctrl-C blocked until they can ignore it."""
    variables = ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if threads else ()
    saved = {name: os.environ.get(name) for name in variables}
    os.environ.update(dict.fromkeys(variables, str(threads)))
    resource_tracker.ensure_running()  # its own start, which spawn would trigger, unblocks Ctrl-C
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for name, value in saved.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _work(conn: connection.Connection, parent: int, setup: Callable, device: str, args: tuple) -> None:
    """A worker's life: set up, then payload in, result out, until told to leave."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    jobs: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(conn, parent, jobs), daemon=True).start()
    handle, message = prepare(setup, device, args)
    conn.send_bytes(message)
    if handle is not None:
        for job in iter(jobs.get, LEAVE):
            conn.send_bytes(attempt(handle, job))


def _listen(conn: connection.Connection, parent: int, jobs: queue.SimpleQueue) -> None:
    """Receive while the main thread computes, so that the parent never waits; end the process with its parent's."""
    with contextlib.suppress(EOFError, OSError):
        while os.getppid() == parent:
            if conn.poll(PARENT_POLL_SECONDS):
                jobs.put(conn.recv_bytes())
    os._exit(1)


class TimeLimit:
    """`factor` times the running median of the jobs that ended well, and no less than `floor` seconds.

    There is no limit before `least` jobs have ended, since a median of few says little, nor with a `factor` of 0. The
    median begins anew with each run: the times of another machine would not fit this one.
    """

    def __init__(self, factor: float = 10.0, floor: float = 60.0, least: int = 10):
        self.factor, self.floor, self.least = factor, floor, least
        self._sorted: list[float] = []

    def add(self, seconds: float) -> None:
        """Take in how long a job took that ended well."""
        bisect.insort(self._sorted, seconds)

    @property
    def seconds(self) -> float | None:
        """The limit as it stands; None where there is none."""
        if self.factor == 0 or len(self._sorted) < self.least:
            return None
        return max(self.floor, self.factor * self._sorted[len(self._sorted) // 2])
