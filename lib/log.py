"""What a run writes while it goes: a JSONL log, a progress bar, optionally TensorBoard."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TextIO, TypeVar

from matplotlib import pyplot as plt
from tqdm import tqdm

from lib import distributed
from lib.checkpoint import replacing
from lib.errors import UserError


def plot_training(log: Path, picture: Path, metric: str, phases: Sequence[int] = ()) -> None:
    """Losses above, AP below, from a JSONL log; a dotted line where a phase begins."""
    records = read_log(log)
    train = {r["step"]: r for r in records if r["kind"] == "train"}  # a resumed epoch replaces the one cut short
    scores = {r["step"]: r for r in records if r["kind"] == "eval"}
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 7), sharex=True)
    for name in _names(train, "losses"):  # distillation may begin later than the others
        top.plot(list(train), [r["losses"].get(name) for r in train.values()], label=name)
    for name in _names(scores, "networks"):
        bottom.plot(list(scores), [_value(r, name, metric) for r in scores.values()], marker=".", label=name)
    top.set_ylabel("loss")
    bottom.set_ylabel(metric)
    bottom.set_xlabel("epoch")
    for axis in (top, bottom):
        for epoch in phases:
            axis.axvline(epoch, linestyle=":", color="grey")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    _save(figure, picture)


def _names(records: dict[int, dict], field: str) -> list[str]:
    """What any of the records has in `field`, in order of appearance."""
    return list(dict.fromkeys(name for record in records.values() for name in record[field]))


def _value(record: dict, network: str, metric: str) -> float:
    value = record["networks"].get(network, {}).get(metric)
    return float("nan") if value is None else value


def _save(figure: plt.Figure, picture: Path) -> None:
    figure.tight_layout()
    with replacing(picture) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)


T = TypeVar("T")


def progress(items: Iterable[T], description: str, total: int | None = None, initial: int = 0) -> tqdm:
    """A progress bar with rate and time left on stderr; a line every 30 seconds where that is not a terminal."""
    interval = 0.2 if sys.stderr.isatty() else 30.0
    options = {"mininterval": interval, "leave": False, "dynamic_ncols": True, "disable": not distributed.world().main}
    return tqdm(items, description, total=total, initial=initial, file=_Forgiving(sys.stderr), **options)


def say(message: str) -> None:
    """Print a line to stdout without tearing a progress bar."""
    try:
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()
    except BrokenPipeError:  # its reader is gone: what is to come goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Forgiving:
    """A stream whose reader may go: Ctrl-C ends the `tee` of a log too, and a checkpoint is still to be written."""

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

    def __eq__(self, other: object) -> bool:  # by which tqdm.write finds the bars on its screen
        return self._stream == getattr(other, "_stream", other)

    __hash__ = None


class RunLog:
    """Appends one JSON object per line to `path`, each with its kind and the time; flushed line by line.

    Of the processes of a job, only the main one writes.
    """

    def __init__(self, path: Path, tensorboard: bool = False):
        self.path = path
        if not distributed.world().main:
            path, tensorboard = Path(os.devnull), False
        self._board = _tensorboard(path.parent / "tensorboard") if tensorboard else None
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        if path.stat().st_size and path.read_bytes()[-1:] != b"\n":
            self._file.write("\n")  # the line that a crash cut short stays alone

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
    """The records of a log; a line cut short by a crash is left out."""
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return records


def duration(seconds: float) -> str:
    """In words: 42 s, 12 min, 3.5 h, 2.1 days."""
    for limit, unit, size in ((90, "s", 1), (5400, "min", 60)):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def finite(value: object) -> object:
    """`value` with None in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flatten(values: dict, prefix: str = "") -> Iterable[tuple[str, float]]:
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
