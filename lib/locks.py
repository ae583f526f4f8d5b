"""Locks on open files, which end with the process that holds them."""

from __future__ import annotations

from typing import IO

try:
    import fcntl
except ImportError:  # not a POSIX system: nothing keeps a second process away
    fcntl = None


def lock(file: IO, wait: bool) -> None:
    """Lock `file` against other processes until it is closed; where there are no locks nothing happens.

    Raises BlockingIOError if another process has it and this one would not `wait`.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError:
        pass  # some network file systems have none
