"""What a run writes as it goes: lines on stdout, a progress bar, a JSONL log and its curves, optionally TensorBoard.

Of the processes of a job, only the main one writes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, TypeVar

from tqdm import tqdm

from lib import distributed
from lib.checkpoint import replacing
from lib.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T = TypeVar("T")


def progress(items: Iterable[T], description: str, total: int | None = None, initial: int = 0) -> tqdm:
    """A progress bar with rate and remaining time on stderr; a line every 30 seconds if that is not a terminal."""
    return tqdm(
        items,
        description,
        total=total,
        initial=initial,
        file=_PipeTolerant(sys.stderr),
        mininterval=0.2 if sys.stderr.isatty() else 30.0,
        leave=False,
        dynamic_ncols=True,
        disable=not distributed.world().main,
    )


def say(message: str) -> None:
    """Print a line to stdout without tearing a progress bar."""
    try:
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader is gone: discard this and all later output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _PipeTolerant:
    """A stream that ignores a lost reader: Ctrl-C ends the `tee` of a log too, and a checkpoint must still be saved."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._stream.flush()

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def __eq__(self, other: object) -> bool:  # tqdm.write compares streams to find the bars on its screen
        return self._stream == getattr(other, "_stream", other)

    __hash__ = None


class RunLog:
    """Appends JSON objects to `path`, one per line, each with its kind and the time; flushed after every line."""

    def __init__(self, path: Path, tensorboard: bool = False):
        self.path = path
        if not distributed.world().main:
            path = Path(os.devnull)
            tensorboard = False
        self._board = _tensorboard(path.parent / "tensorboard") if tensorboard else None
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        # A line that a crash cut short must not swallow the next one.
        if path.stat().st_size and path.read_bytes()[-1:] != b"\n":
            self._file.write("\n")

    def write(self, kind: str, step: int, **values: object) -> None:
        record = {"kind": kind, "step": step, "time": round(time.time(), 3), **finite(values)}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in _flatten(values):
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_log(path: Path) -> list[dict]:
    """The records of a log, without lines that a crash cut short. No file is no records."""
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                records.append(json.loads(line))
    return records


def plot_training(log: Path, picture: Path, metric: str, phases: Sequence[int] = ()) -> None:
    """Draw losses (top) and `metric` (bottom) by epoch from a JSONL log; a dotted line marks the start of a phase."""
    if not distributed.world().main:
        return
    from matplotlib.figure import Figure

    records = read_log(log)
    # By epoch: the records of a resumed epoch replace those of its first attempt.
    losses = {r["step"]: r["losses"] for r in records if r["kind"] == "train"}
    networks = {r["step"]: r["networks"] for r in records if r["kind"] == "eval"}
    figure = Figure(figsize=(8, 7))
    top, bottom = figure.subplots(2, 1, sharex=True)
    for name in _names(losses):
        top.plot(list(losses), [values.get(name) for values in losses.values()], label=name)
    for name in _names(networks):
        scores = [values.get(name, {}).get(metric) for values in networks.values()]
        bottom.plot(list(networks), scores, marker=".", label=name)
    top.set_ylabel("loss")
    bottom.set_ylabel(metric)
    bottom.set_xlabel("epoch")
    for axis in (top, bottom):
        for epoch in phases:
            axis.axvline(epoch, linestyle=":", color="grey")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    save_figure(figure, picture)


def _names(values_by_epoch: dict[int, dict]) -> list[str]:
    """Every key in order of appearance; distillation, for one, may begin later than the other losses."""
    return list(dict.fromkeys(name for values in values_by_epoch.values() for name in values))


def save_figure(figure: Figure, picture: Path) -> None:
    """Write a matplotlib figure as a PNG file."""
    figure.tight_layout()
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


def _tensorboard(folder: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard: the package is missing; pip install tensorboard") from None
    return SummaryWriter(str(folder))
