"""Jobs on workers that may fail: queues, attempts and time limits, and workers that are processes of this machine.

`submit` jobs while there are `free_slots`, collect `results` until none is `pending`, then `close`. A `WorkerPool`
holds the rules; its subclasses know what a worker is: a local process or a Ray actor (`lib.ray_dispatcher`).
"""

import bisect
import contextlib
import ctypes
import math
import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from abc import abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection, resource_tracker
from typing import Any

from lib import UserError

ATTEMPTS = 3  # of a job before it is given up, and of a worker to start
LONGEST_WAIT = 3600.0  # seconds in one call of the system
KILL_SECONDS = 10.0  # how long a killed process may take to go, which a hung driver can prevent
OUT_OF_MEMORY = ", probably for want of memory: try fewer workers (--gpus) or a smaller search.batch_size"
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)  # by a terminal or a batch system
CONTEXT = multiprocessing.get_context("spawn")  # CUDA does not survive a fork


@dataclass(frozen=True)
class Result:
    """How a job ended: with a `value`, or given up with an `error`. `seconds` is the wall time of the last attempt."""

    job_id: Hashable
    value: Any
    error: str | None
    worker: str
    seconds: float


@dataclass
class Worker:
    """What a pool knows about one worker, which runs its `jobs` in order."""

    slot: int
    ready: bool = field(default=False, init=False)
    jobs: deque[Hashable] = field(default_factory=deque, init=False)
    # time.monotonic() at which the first of `jobs` started, or, of a worker that is not ready, its set-up
    since: float = field(default_factory=time.monotonic, init=False)
    fault: str = field(default="", init=False)  # why its set-up failed


class WorkerPool(contextlib.AbstractContextManager):
    """One worker for each of `devices` ("cpu", "cuda:0", ...; repeats allowed). Use as a context manager.

    `setup(device, *args)` is called once in each worker and returns the function that turns a payload into a result.
    `setup`, `args`, payloads and results must be picklable. `threads_per_worker` bounds each one's CPU threads.

    A job that raises, kills its worker, or runs longer than `time_limit` seconds is tried again, `ATTEMPTS` times in
    all; then its result carries the error. A dead worker's jobs are queued again and a new worker takes its place. That
    also replaces one whose setup fails or takes more than `setup_limit` seconds, until `ATTEMPTS` in a row have failed.
    """

    MAX_AHEAD = 2  # jobs that a worker holds, including the running one, so that it never waits for the parent
    SETUP_HINT = ""  # added to a UserError of `setup`

    def __init__(
        self,
        setup: Callable,
        args: tuple,
        devices: Sequence[str],
        threads_per_worker: int | None = None,
        setup_limit: float | None = None,
    ):
        self.time_limit: float | None = None  # seconds; may be changed between calls
        self._setup_limit = setup_limit
        self._setup = setup
        self._args = args
        self._devices = list(devices)
        self._threads = threads_per_worker
        self._messages: dict[Hashable, bytes] = {}  # id and payload, pickled, of every job without a result
        self._waiting: deque[Hashable] = deque()  # jobs that no worker holds
        self._failures: Counter[Hashable] = Counter()  # attempts of each job
        self._failed_starts: Counter[int] = Counter()  # workers of each slot, in a row, that failed to be ready
        self._done: list[Result] = []
        self._workers: list[Worker] = []
        try:
            for slot in range(len(self._devices)):
                self._workers.append(self._start(slot))
        except BaseException:
            self.close()
            raise

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def pending(self) -> int:
        """How many submitted jobs `results` has not returned yet."""
        return len(self._messages) + len(self._done)

    def free_slots(self) -> int:
        """How many jobs can be submitted until every worker holds as many as it may."""
        return max(0, self.MAX_AHEAD * len(self._workers) - len(self._messages))

    def submit(self, job_id: Hashable, payload: Any) -> None:
        """Queue a job. Beyond `free_slots` it waits here until a worker has room."""
        if job_id in self._messages:
            raise ValueError(f"job {job_id!r} is pending already")
        self._messages[job_id] = pickle.dumps((job_id, payload))
        self._waiting.append(job_id)
        self._hand_out()

    def results(self, timeout: float | None = None) -> list[Result]:
        """Wait at most `timeout` seconds until a job ends; all that have ended, in that order, perhaps none.

        Does not wait if nothing is pending. Raises UserError if workers cannot be set up.
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while self._messages and not self._done:
            # Wake up at the deadline, or when the time of the next job or setup is up.
            moment = min([deadline, *(w.since + self._limit(w) for w in self._workers)])
            for worker in self._listen(min(max(0.0, moment - time.monotonic()), LONGEST_WAIT)):
                if not self._drain(worker):
                    self._replace(worker)
            for worker in list(self._workers):
                limit = self._limit(worker)
                if time.monotonic() - worker.since > limit:
                    late = f"no result within {limit:g} s"
                    early = f"not ready within {limit:g} s (search.first_time_limit)"
                    self._replace(worker, late if worker.ready else early)
            self._hand_out()
            if time.monotonic() >= deadline:
                break
        done, self._done = self._done, []
        return done

    def close(self) -> None:
        """End all workers at once, whatever they do. Pending jobs are lost."""
        for worker in self._workers:
            self._kill(worker)
        self._workers = []
        self._messages.clear()
        self._waiting.clear()

    @abstractmethod
    def _start(self, slot: int) -> Worker:
        """Start a worker on this slot's device. Its first message is that of `set_up`."""

    @abstractmethod
    def _listen(self, timeout: float) -> Iterable[Worker]:
        """Wait at most `timeout` seconds for a message or a death; return the workers concerned."""

    @abstractmethod
    def _receive(self, worker: Worker) -> Iterator[bytes]:
        """The messages that have arrived. Raises OSError or EOFError after the last one of a dead worker."""

    @abstractmethod
    def _send(self, worker: Worker, message: bytes) -> None:
        """Hand a job to a worker. If that is dead, the job is lost, and `_listen` reports the death."""

    @abstractmethod
    def _kill(self, worker: Worker) -> str:
        """End a worker unless it is dead, and return how it ended. What it has sent can still be received."""

    def _limit(self, worker: Worker) -> float:
        """Seconds that a worker may take for what it does."""
        if not worker.ready:
            return self._setup_limit or math.inf
        return (self.time_limit if worker.jobs else None) or math.inf

    def _hand_out(self) -> None:
        """Send waiting jobs to the ready workers that hold the fewest."""
        while self._waiting:
            worker = min((w for w in self._workers if w.ready), key=lambda w: len(w.jobs), default=None)
            if worker is None or len(worker.jobs) >= self.MAX_AHEAD:
                return
            # A worker that is about to be ready takes a job sooner than a busy one.
            if worker.jobs and len(self._waiting) <= sum(not w.ready for w in self._workers):
                return
            if not worker.jobs:
                worker.since = time.monotonic()
            job_id = self._waiting.popleft()
            worker.jobs.append(job_id)
            self._send(worker, self._messages[job_id])

    def _drain(self, worker: Worker) -> bool:
        """Act on the messages of `set_up` and `run_job` that have arrived. False if the worker is of no more use."""
        try:
            for kind, *content in map(pickle.loads, self._receive(worker)):
                if kind == "ready":
                    worker.ready = True
                    self._failed_starts[worker.slot] = 0
                elif kind == "setup_failed":
                    user_error, worker.fault = content
                    if user_error:
                        raise UserError(worker.fault + self.SETUP_HINT)
                    return False
                elif kind == "placed":
                    worker.since = time.monotonic()
                else:
                    self._end_attempt(worker, *content)
        except (EOFError, OSError):
            return False
        return True

    def _end_attempt(self, worker: Worker, job_id: Hashable, seconds: float, value: Any, error: str | None) -> None:
        """Keep the result of a job, or queue the job again if it failed."""
        worker.jobs.remove(job_id)
        worker.since = time.monotonic()
        if error is not None:
            self._failures[job_id] += 1
            if self._failures[job_id] < ATTEMPTS:
                self._waiting.appendleft(job_id)
                return
            error += f" (attempt {ATTEMPTS} of {ATTEMPTS})"
        del self._messages[job_id]
        self._failures.pop(job_id, None)
        self._done.append(Result(job_id, value, error, self._name(worker), seconds))

    def _replace(self, worker: Worker, reason: str = "") -> None:
        """Queue the jobs of a dead worker, or of one that is overdue by `reason`, again and start its successor."""
        running = worker.jobs[0] if worker.jobs else None
        how = self._kill(worker)
        # Results that the worker sent before it died count.
        self._drain(worker)
        if reason and worker.jobs and worker.jobs[0] != running:
            # The overdue job ended at the last moment, and the next one is not to blame.
            self._waiting.extendleft(reversed(worker.jobs))
        elif worker.jobs:
            # Jobs run in order, so the first one left was running: only that attempt failed.
            culprit, *others = worker.jobs
            self._waiting.extendleft(reversed(others))
            error = reason or f"the worker died ({how})"
            self._end_attempt(worker, culprit, time.monotonic() - worker.since, value=None, error=error)
        # A setup that always fails would restart for ever.
        self._failed_starts[worker.slot] += not worker.ready
        if self._failed_starts[worker.slot] >= ATTEMPTS:
            why = worker.fault or reason or how
            raise UserError(f"worker {self._name(worker)} failed {ATTEMPTS} times in a row before it was ready: {why}")
        self._workers[worker.slot] = self._start(worker.slot)

    def _name(self, worker: Worker) -> str:
        return f"{self._devices[worker.slot]}#{worker.slot}"


def die_with_parent() -> None:
    """Make this process end when the process that started it ends, for whatever reason and however it was started.

    A forked child inherits its parent's sockets. While it lives, the parent's peers cannot see that the parent is gone.
    """
    parent = multiprocessing.parent_process()
    # The thread below cannot run in a process that hangs in a driver, so Linux is asked to kill it. Under forkserver,
    # the server is the parent to Linux.
    if os.getppid() == parent.pid:
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG of sys/prctl.h

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def set_up(setup: Callable[..., Callable], device: str, args: tuple) -> tuple[Callable[[Any], Any] | None, bytes]:
    """Called in a worker: its job function (None if the setup failed) and the message that reports the outcome."""
    try:
        return setup(device, *args), pickle.dumps(("ready",))
    except BaseException as error:
        # An exception may not be picklable, so its text is sent, in one line and with the place where it was raised.
        user_error = isinstance(error, UserError)
        place = traceback.extract_tb(error.__traceback__)[-1]
        what = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        text = str(error) if user_error else f"{what} ({place.filename}, line {place.lineno})"
        return None, pickle.dumps(("setup_failed", user_error, text))


def run_job(function: Callable[[Any], Any], message: bytes) -> bytes:
    """Called in a worker: run one job and return the message that reports the outcome."""
    job_id, payload = pickle.loads(message)
    start = time.perf_counter()
    try:
        value = function(payload)
        return pickle.dumps(("ended", job_id, time.perf_counter() - start, value, None))
    except BaseException:
        error = traceback.format_exc(limit=-2).strip()
        return pickle.dumps(("ended", job_id, time.perf_counter() - start, None, error))


@dataclass
class _Process(Worker):
    process: Any
    conn: connection.Connection


class Dispatcher(WorkerPool):
    """A WorkerPool of spawned processes.

    A worker exits by itself when this process is gone, and ignores `STOPS`, which this process handles. Workers are
    daemons: they may not start `multiprocessing` children of their own. Results may be large; `MAX_AHEAD` jobs must fit
    into a pipe, 64 KB, because the parent must not wait for a worker to read them.
    """

    def _start(self, slot: int) -> _Process:
        conn, worker_conn = CONTEXT.Pipe()
        args = (worker_conn, self._setup, self._devices[slot], self._args)
        process = CONTEXT.Process(target=_worker_main, args=args, daemon=True)
        with _settings_for_children(self._threads):
            process.start()
        # With this end closed here, the worker's death closes the pipe.
        worker_conn.close()
        return _Process(slot, process, conn)

    def _listen(self, timeout: float) -> list[_Process]:
        owners = {channel: w for w in self._workers for channel in (w.conn, w.process.sentinel)}
        ready = connection.wait(owners, timeout)
        return list({owners[channel].slot: owners[channel] for channel in ready}.values())

    def _receive(self, worker: _Process) -> Iterator[bytes]:
        # Asked before the pipe is read: if the worker is dead, all that it ever sent is in the pipe by now.
        is_dead = not worker.process.is_alive()
        while worker.conn.poll():
            yield worker.conn.recv_bytes()
        if is_dead:
            raise EOFError

    def _send(self, worker: _Process, message: bytes) -> None:
        with contextlib.suppress(OSError):
            worker.conn.send_bytes(message)

    def _kill(self, worker: _Process) -> str:
        worker.process.kill()
        worker.process.join(KILL_SECONDS)
        code = worker.process.exitcode
        if code is None or code >= 0:
            return f"exit code {code}"
        return f"killed by {signal.Signals(-code).name}{OUT_OF_MEMORY if code == -signal.SIGKILL else ''}"


@contextlib.contextmanager
def _settings_for_children(threads: int | None) -> Iterator[None]:
    """Children started within have `threads` CPU threads, and `STOPS` blocked until they can ignore them."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if threads else ()
    before = {name: os.environ[name] for name in names if name in os.environ}
    os.environ.update(dict.fromkeys(names, str(threads)))
    # Started before the mask is set: otherwise spawn starts it, and that unblocks Ctrl-C and SIGTERM.
    resource_tracker.ensure_running()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for name in names:
            del os.environ[name]
        os.environ.update(before)


def _worker_main(conn: connection.Connection, setup: Callable, device: str, args: tuple) -> None:
    """The main function of a worker process: set up, then run one job after the other."""
    die_with_parent()
    # They reach the whole process group, but only the parent knows how to stop.
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    function, message = set_up(setup, device, args)
    with contextlib.suppress(EOFError, OSError):  # the parent is gone
        conn.send_bytes(message)
        while function is not None:
            # The parent sends jobs ahead, which wait in the pipe, so that this worker never waits.
            conn.send_bytes(run_job(function, conn.recv_bytes()))


@dataclass
class TimeLimit:
    """`factor` times the running median of the successful jobs' seconds in this run, and at least `floor` seconds.

    Before `least` jobs have ended, the median of a few says little, and the limit is `first` seconds. There is no limit
    with a `factor` of 0.
    """

    factor: float = 10.0
    floor: float = 60.0
    least: int = 10
    first: float | None = None
    _sorted: list[float] = field(default_factory=list, init=False)

    def add(self, seconds: float) -> None:
        """Take in the duration of a successful job."""
        bisect.insort(self._sorted, seconds)

    @property
    def seconds(self) -> float | None:
        """The current limit; None if there is none."""
        if self.factor == 0:
            return None
        if len(self._sorted) < self.least:
            return self.first or None
        return max(self.floor, self.factor * self._sorted[len(self._sorted) // 2])
