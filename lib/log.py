"""What a job's main process writes as it goes: lines on stdout, a progress bar, a JSONL log, curves, TensorBoard."""

import contextlib
import errno
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm
from tqdm.utils import ObjectWrapper

from lib import UserError, distributed
from lib.checkpoint import replacing
from lib.plain import check

SHARE = 0.01  # of the time since the start, at most, is spent on writing results: meanwhile no worker gets a job


def progress(items: Iterable | None, description: str, total: int | None = None, initial: int = 0) -> tqdm:
    """A progress bar with rate and remaining time on stderr; a line every 30 seconds if that is not a terminal."""
    interval = 0.2 if sys.stderr.isatty() else 30.0
    shape = {"leave": False, "dynamic_ncols": True, "disable": not distributed.world().main}
    return tqdm(items, description, total=total, initial=initial, file=sys.stderr, mininterval=interval, **shape)


def say(message: str) -> None:
    """Print a line to stdout without tearing a progress bar."""
    tqdm.write(message, file=sys.stdout)
    sys.stdout.flush()


def keep_streams_open() -> None:
    """Make stdout and stderr accept every line: no message is a reason to end a training or to print a traceback.

    One that is closed or whose reader is gone (`| head`) discards lines; one that is ASCII only gets the rest escaped.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")  # None: closed
        stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, _Tolerant(stream))


class _Tolerant(ObjectWrapper):
    """A stream that discards what it cannot write, and everything after it."""

    def write(self, text: str) -> None:
        self._or_discard(lambda: self._wrapped.write(text))

    def flush(self) -> None:
        self._or_discard(self._wrapped.flush)

    def _or_discard(self, operation: Callable[[], object]) -> None:
        try:
            operation()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._wrapped.fileno())
            if error.errno != errno.EPIPE:  # its reader has not just gone away
                with contextlib.suppress(OSError):
                    os.write(2, f"note: what follows is not shown: {error.strerror}\n".encode())

    def __eq__(self, other: object) -> bool:  # tqdm.write compares streams to find the bars on its screen
        return self._wrapped == getattr(other, "_wrapped", other)


class RunLog:
    """Appends JSON objects to `path`, one per line, each with its kind and the time."""

    def __init__(self, path: Path, tensorboard: bool = False):
        self.path = path
        self._board = None
        if tensorboard and distributed.world().main:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("--tensorboard: the package is missing; pip install tensorboard") from None
            self._board = SummaryWriter(str(path.parent / "tensorboard"))

    def write(self, kind: str, step: int, **values: object) -> None:
        if not distributed.world().main:
            return
        record = {"kind": kind, "step": step, "time": round(time.time(), 3), **finite(values)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Open for one line only, so that each is in the file whatever happens next.
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self._board:
            for name, value in _flatten(values):
                self._board.add_scalar(f"{kind}/{name}", value, step)
            self._board.flush()


class _Line(NamedTuple):
    kind: str
    step: int
    losses: dict[str, float | None]
    networks: dict[str, dict]


def read_log(path: Path) -> list[dict]:
    """The records of a log, without lines that a crash cut short. No file is no records."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ()
    records = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError, UserError):
            record = check(json.loads(line), dict)
            check({"losses": {}, "networks": {}, **record}, _Line)
            records.append(record)
    return records


class Throttle:
    """Calls `action` where that takes at most `SHARE` of the time since the start."""

    def __init__(self, action: Callable[[], None]):
        self._action = action
        self._due = time.monotonic() + 1.0 / SHARE  # loading matplotlib takes about a second

    def __call__(self) -> None:
        begun = time.monotonic()
        if begun >= self._due:
            self._action()
            self._due = begun + (time.monotonic() - begun) / SHARE


def plot_training(log: Path, picture: Path, metric: str, phases: Sequence[int] = ()) -> None:
    """Draw losses (top) and `metric` (bottom) by epoch from a JSONL log; a dotted line marks the start of a phase."""
    if not distributed.world().main:
        return
    from matplotlib.figure import Figure

    # By epoch: the records of a resumed epoch replace those of its first attempt.
    losses: dict[int, dict] = {}
    scores: dict[int, dict] = {}
    for record in read_log(log):
        if record["kind"] == "train":
            losses[record["step"]] = record.get("losses", {})
        elif record["kind"] == "eval":
            scores[record["step"]] = {name: values.get(metric) for name, values in record.get("networks", {}).items()}
    figure = Figure(figsize=(8, 7))
    top, bottom = figure.subplots(2, 1, sharex=True)
    for axis, label, marker, curves in ((top, "loss", "", losses), (bottom, metric, ".", scores)):
        # The names of all epochs: distillation, for one, may begin later than the other losses.
        names = dict.fromkeys(itertools.chain.from_iterable(curves.values()))
        for name in names:
            axis.plot(list(curves), [values.get(name) for values in curves.values()], marker=marker, label=name)
        for epoch in phases:
            axis.axvline(epoch, linestyle=":", color="grey")
        axis.set_ylabel(label)
        if names:
            axis.legend(fontsize=8)
    bottom.set_xlabel("epoch")
    with replacing(picture) as file:
        figure.savefig(file, format="png", dpi=110)


def duration(seconds: float) -> str:
    """Seconds for people: 42 s, 12 min, 3.5 h, 2.1 days."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def finite(value: object) -> object:
    """`value` with None in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flatten(values: dict, prefix: str = "") -> Iterable[tuple[str, float]]:
    """The numbers of nested dicts under slash-separated names."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}{name}", value
