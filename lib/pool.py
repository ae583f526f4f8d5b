"""Jobs on workers that may fail: queues, attempts, time limits. What a worker is, the dispatchers say.

A `WorkerPool` knows nothing of what the jobs are. Its interface is `submit`, `free_slots`, `pending`, `results` and
`close`.
"""

from __future__ import annotations

import pickle
import time
import traceback
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
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
    still_births: int  # deaths before it was ready, in a row, of this worker's predecessors
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
    def _start(self, slot: int, still_births: int) -> Worker:
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
        worker.ready, worker.still_births = True, 0

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
        still_births = 0 if worker.ready else worker.still_births + 1
        if still_births >= ATTEMPTS:
            raise UserError(f"worker {self._name(worker)} died {ATTEMPTS} times in a row before it was ready ({how})")
        self._workers[worker.slot] = self._start(worker.slot, still_births)

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
