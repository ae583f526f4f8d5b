"""What the dispatchers' tests run in workers. They import no torch, so that they start fast."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lib import UserError
from tests.dispatch_helpers import wait_for


def setup(device: str, *args: Any) -> Callable[[tuple], Any]:
    """A handler of payloads (action, argument)."""

    def handle(payload: tuple) -> Any:
        action, argument = payload
        return globals()[f"do_{action}"](argument, device, args)

    return handle


def do_echo(argument, device, args):
    return argument


def do_where(argument, device, args):
    return device, args, os.getpid()


def do_sleep(seconds, device, args):
    time.sleep(seconds)
    return seconds


def do_wait(path, device, args):
    """Create a file `path`.runs, then wait for a file `path`."""
    Path(f"{path}.runs").touch()
    wait_for(Path(path).exists)


def do_pid_then_sleep(path, device, args):
    """Write this process's id to a file of its own in folder `path`, then hang."""
    (Path(path) / str(os.getpid())).touch()
    time.sleep(600)


def do_pid_then_compute(path, device, args):
    """Likewise, but busy instead of asleep."""
    (Path(path) / str(os.getpid())).touch()
    while True:
        sum(range(10_000))


def do_raise(message, device, args):
    raise ValueError(message)


def do_exit(code, device, args):
    os._exit(code)


def do_sys_exit(code, device, args):
    raise SystemExit(code)


def do_unpicklable(argument, device, args):
    return lambda: None


def do_large(size, device, args):
    return b"x" * size


def do_length(data, device, args):
    return len(data)


def do_environment(name, device, args):
    return os.environ.get(name)


def do_interrupt(argument, device, args):
    """What Ctrl-C in the terminal, or a batch system, does to every process of the group."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        os.kill(os.getpid(), number)
    return "alive"


def do_fail_until(path, device, args):
    """Die the first time, raise the second, succeed the third; `path` counts."""
    count = Path(path).read_text().count("x") if Path(path).exists() else 0
    with Path(path).open("a") as file:
        file.write("x")
    if count == 0:
        ctypes.string_at(0)  # a segmentation fault
    if count == 1:
        raise ValueError("not yet")
    return count + 1


def do_count_then_die_once(path, device, args):
    """Die without a trace if `path` does not exist yet."""
    if not Path(path).exists():
        Path(path).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def do_allocate(size, device, args):
    """Allocate `size` bytes, with the limit 256 MB above what the process has now."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (256 << 20), before[1]))
    try:
        return len(bytearray(size))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def do_killed(argument, device, args):
    os.kill(os.getpid(), signal.SIGKILL)


def setup_raises(device: str) -> None:
    raise RuntimeError(f"no such device {device}")


def setup_user_error(device: str) -> None:
    raise UserError("last.pt: not a checkpoint")


def setup_dies(device: str) -> None:
    os._exit(7)


def setup_hangs(device: str) -> None:
    time.sleep(600)


def setup_in_the_end(device: str, folder: str) -> Callable[[tuple], Any]:
    """Hang the first time, raise the second, succeed the third; a file in `folder` for each process."""
    count = len(list(Path(folder).iterdir()))
    (Path(folder) / str(os.getpid())).touch()
    if count == 0:
        time.sleep(600)
    if count == 1:
        raise RuntimeError("not yet")
    return setup(device)
