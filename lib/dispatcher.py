"""Worker processes, one per device: submit jobs, take results as they come, survive whatever happens to a worker.

`Dispatcher` knows nothing of what the jobs are. Its interface is `submit`, `free_slots`, `pending`, `results` and
`close`; whatever offers these can stand in for it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection, resource_tracker
from typing import Any

from lib.errors import UserError

ATTEMPTS = 3  # a job that fails so often is given up, and so is a worker that dies so often before it is ready
GRACE_SECONDS = 2.0  # how long `close` lets workers leave by themselves
PARENT_POLL_SECONDS = 1.0  # how often a worker looks whether its parent still lives

_CONTEXT = multiprocessing.get_context("spawn")


class WorkerError(RuntimeError):
    """A worker could not be set up. The message holds the worker's traceback."""


@dataclass(frozen=True)
class Result:
    """How a job ended: with a `value`, or given up with an `error`. `seconds` is its last attempt's wall time."""

    job_id: Hashable
    value: Any
    error: str | None
    worker: str
    seconds: float


@dataclass
class _Worker:
    """What the parent knows of one worker process. It runs its `jobs` in order, the first since `since`."""

    slot: int
    process: Any
    conn: connection.Connection
    still_births: int = 0  # deaths before it was ready, in a row, of this worker's predecessors
    ready: bool = False
    jobs: deque[Hashable] = field(default_factory=deque)
    since: float = 0.0


class Dispatcher:
    """One worker process for each of `devices` ("cpu", "cuda:0", ...; repeats allowed). Use as a context manager.

    `setup(device, *args)` is called once in each worker and returns the function that turns a payload into a result.
    `setup`, `args`, payloads and results must be picklable. A worker holds at most `max_ahead` jobs, the running one
    included, so that it never waits for the parent. `threads_per_worker` bounds a worker's CPU threads.

    A job that raises, kills its worker, or runs longer than `time_limit` seconds is tried again, `ATTEMPTS` times in
    all; then its result carries the error. A dead worker's jobs are queued again and a new worker takes its place. A
    worker ends by itself when this process is gone, and ignores Ctrl-C, which is this process's to handle. Workers are
    daemons: they may not start `multiprocessing` children of their own.
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
        self._workers = [self._start(slot) for slot in range(len(self._devices))]

    def __enter__(self) -> Dispatcher:
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

        Empty after the timeout, or at once if nothing is pending. Raises WorkerError (or the worker's own UserError)
        when a worker cannot be set up.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._messages and not self._done:
            slots = {channel: w.slot for w in self._workers for channel in (w.conn, w.process.sentinel)}
            ready = connection.wait(slots, self._patience(deadline))
            for slot in {slots[channel] for channel in ready}:
                self._attend(self._workers[slot])
            self._stop_overdue()
            self._feed()
            if deadline is not None and time.monotonic() >= deadline:
                break
        done, self._done = self._done, []
        return done

    def close(self) -> None:
        """End all workers, in seconds, whatever they do. Pending jobs are lost."""
        for worker in self._workers:
            with contextlib.suppress(OSError):
                worker.conn.send_bytes(pickle.dumps(None))
        deadline = time.monotonic() + GRACE_SECONDS
        for worker in self._workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
            worker.process.kill()
            worker.process.join()
            worker.conn.close()
        self._workers = []
        self._messages.clear()

    def _start(self, slot: int, still_births: int = 0) -> _Worker:
        ours, theirs = _CONTEXT.Pipe()
        process = _CONTEXT.Process(
            target=_work, args=(theirs, os.getpid(), self._setup, self._devices[slot], self._args), daemon=True
        )
        with _inherited_by_children(self._threads):
            process.start()
        theirs.close()  # so that the worker's death closes the pipe
        return _Worker(slot, process, ours, still_births)

    def _feed(self) -> None:
        """Hand waiting jobs to the workers that hold the fewest."""
        while self._waiting:
            worker = min(self._workers, key=lambda w: (len(w.jobs), not w.ready))
            if len(worker.jobs) >= self._max_ahead:
                return
            job_id = self._waiting[0]
            try:
                worker.conn.send_bytes(self._messages[job_id])
            except OSError:
                self._replace(worker)
                continue
            self._waiting.popleft()
            if not worker.jobs:
                worker.since = time.monotonic()
            worker.jobs.append(job_id)

    def _attend(self, worker: _Worker) -> None:
        """Take what a worker has sent, and replace it if it is dead."""
        alive = worker.process.is_alive()  # asked first: all that a dead worker ever sent is in its pipe by now
        if not self._drain(worker) or not alive:
            self._replace(worker)

    def _drain(self, worker: _Worker) -> bool:
        """Take all messages that have arrived. False if the other end is closed."""
        try:
            while worker.conn.poll():
                kind, *content = pickle.loads(worker.conn.recv_bytes())
                getattr(self, f"_on_{kind}")(worker, *content)
        except (EOFError, OSError):
            return False
        return True

    def _on_ready(self, worker: _Worker) -> None:
        worker.ready, worker.still_births, worker.since = True, 0, time.monotonic()

    def _on_setup_failed(self, worker: _Worker, user_error: bool, text: str) -> None:
        if user_error:
            raise UserError(text)
        raise WorkerError(f"worker {self._name(worker)} could not be set up:\n{text}")

    def _on_value(self, worker: _Worker, job_id: Hashable, seconds: float, value: Any) -> None:
        self._release(worker, job_id)
        self._finish(worker, job_id, seconds, value, None)

    def _on_error(self, worker: _Worker, job_id: Hashable, seconds: float, error: str) -> None:
        self._release(worker, job_id)
        self._failed(worker, job_id, seconds, error)

    def _release(self, worker: _Worker, job_id: Hashable) -> None:
        worker.jobs.remove(job_id)
        worker.since = time.monotonic()

    def _finish(self, worker: _Worker, job_id: Hashable, seconds: float, value: Any, error: str | None) -> None:
        del self._messages[job_id]
        self._failures.pop(job_id, None)
        self._done.append(Result(job_id, value, error, self._name(worker), seconds))

    def _failed(self, worker: _Worker, job_id: Hashable, seconds: float, error: str) -> None:
        self._failures[job_id] += 1
        if self._failures[job_id] < ATTEMPTS:
            self._waiting.appendleft(job_id)
        else:
            self._finish(worker, job_id, seconds, None, f"{error} (attempt {ATTEMPTS} of {ATTEMPTS})")

    def _replace(self, worker: _Worker, reason: str = "", culprit: Hashable | None = None) -> None:
        """Queue a dead worker's jobs again, start its successor. `culprit` is blamed, else the job that was running."""
        worker.process.kill()
        worker.process.join()
        if not worker.conn.closed:
            self._drain(worker)
            worker.conn.close()
        code = worker.process.exitcode
        if worker.ready and worker.jobs:
            culprit = worker.jobs[0] if culprit is None else culprit
        unfinished, worker.jobs = list(worker.jobs), deque()
        self._waiting.extendleft(reversed([job_id for job_id in unfinished if job_id != culprit]))
        if culprit in unfinished:
            seconds = time.monotonic() - worker.since
            self._failed(worker, culprit, seconds, reason or f"the worker died (exit code {code})")
        still_births = 0 if worker.ready else worker.still_births + 1
        if still_births >= ATTEMPTS:
            raise WorkerError(
                f"worker {self._name(worker)} died {ATTEMPTS} times in a row before it was ready (exit code {code})"
            )
        self._workers[worker.slot] = self._start(worker.slot, still_births)

    def _stop_overdue(self) -> None:
        if self.time_limit is None:
            return
        for worker in list(self._workers):
            if worker.ready and worker.jobs and time.monotonic() - worker.since > self.time_limit:
                self._replace(worker, f"no result within {self.time_limit:g} s", worker.jobs[0])

    def _patience(self, deadline: float | None) -> float | None:
        """Seconds until the timeout or the next job's time limit; None if there is neither."""
        moments = [] if deadline is None else [deadline]
        if self.time_limit is not None:
            moments += [w.since + self.time_limit for w in self._workers if w.ready and w.jobs]
        return max(0.0, min(moments) - time.monotonic()) if moments else None

    def _name(self, worker: _Worker) -> str:
        return f"{self._devices[worker.slot]}#{worker.slot}"


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
    try:
        handle = setup(device, *args)
    except BaseException as error:
        user_error = isinstance(error, UserError)
        text = str(error) if user_error else traceback.format_exc()
        conn.send_bytes(pickle.dumps(("setup_failed", user_error, text)))
        return
    conn.send_bytes(pickle.dumps(("ready",)))
    for job_id, payload in iter(jobs.get, None):
        conn.send_bytes(_attempt(handle, job_id, payload))


def _attempt(handle: Callable[[Any], Any], job_id: Hashable, payload: Any) -> bytes:
    """Run one job; the message that tells the parent how it went."""
    start = time.perf_counter()
    try:
        value = handle(payload)
        return pickle.dumps(("value", job_id, time.perf_counter() - start, value))
    except BaseException:
        text = traceback.format_exc(limit=-2).strip()
        return pickle.dumps(("error", job_id, time.perf_counter() - start, text))


def _listen(conn: connection.Connection, parent: int, jobs: queue.SimpleQueue) -> None:
    """Receive while the main thread computes, so that the parent never waits; end the process with its parent's."""
    try:
        while os.getppid() == parent:
            if conn.poll(PARENT_POLL_SECONDS):
                jobs.put(pickle.loads(conn.recv_bytes()))
    except (EOFError, OSError):
        pass
    except BaseException:
        traceback.print_exc()
    os._exit(1)
