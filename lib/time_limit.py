"""How long a job may take, judged by the jobs that ended before it."""

from __future__ import annotations

import bisect


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
