"""Workers that are processes of this machine."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker
from typing import Any

from lib.pool import Worker, WorkerDied, WorkerPool, attempt, prepare

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

    def _start(self, slot: int, still_births: int) -> _Process:
        ours, theirs = _CONTEXT.Pipe()
        process = _CONTEXT.Process(
            target=_work, args=(theirs, os.getpid(), self._setup, self._devices[slot], self._args), daemon=True
        )
        with _inherited_by_children(self._threads):
            process.start()
        theirs.close()  # so that the worker's death closes the pipe
        return _Process(slot, still_births, process, ours)

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
