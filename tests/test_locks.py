"""Locks between open files, which count like those of two processes."""

from __future__ import annotations

import pytest

from lib.checkpoint import lock

pytest.importorskip("fcntl", reason="locks are POSIX's")


def test_one_has_it_until_it_closes_the_file(tmp_path):
    path = tmp_path / "file"
    with path.open("w") as second:
        with path.open("w") as first:
            lock(first, wait=True)
            with pytest.raises(BlockingIOError):
                lock(second, wait=False)
        lock(second, wait=True)
