"""A Ray cluster for tests that need one; they are skipped where Ray is not installed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from types import ModuleType

import pytest


@contextlib.contextmanager
def cluster(cpus: int) -> Iterator[ModuleType]:
    """lib.ray_dispatcher, joined to a cluster of this machine alone that believes in so many CPUs."""
    ray = pytest.importorskip("ray", reason="Ray is not installed (pip install ray)")
    from lib import ray_dispatcher

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # no token is left in the home folder
    ray_dispatcher.connect(None, cpus)
    try:
        yield ray_dispatcher
    finally:
        ray.shutdown()
