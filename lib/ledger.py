"""The append-only record of finished evaluations: one JSON line each, on disk as soon as it is written.

A record: "key" and "basis" (hashes of all that the result depends on), "rests_on" (the parts of the basis, by which a
message says what has changed), "genotype" (Genotype.to_dict()), "status" ("ok" or "failed"), "metrics" {name: number},
"images" (how many it was scored on), "objective" and "resampled" {"<images>": packed scores} (lib/scoring.py),
"seconds", "worker", "time" (of its end), "epoch", "error" (failed only), "search" (the search that paid for it),
"budget" (limits of its proposals) and "origin" ("given", "random" or "bred", see lib/controllers.py; "front" if a
member of the front was scored again on all images).
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from lib import UserError
from lib.genotype import Genotype
from lib.plain import shown

ROUNDING = 1e-6  # a mean of ones may be a little more than 1
LARGEST = 1e18  # of a number that is no share
KINDS = {
    **dict.fromkeys(("key", "basis", "search", "origin", "worker", "error", "objective"), str),
    **dict.fromkeys(("genotype", "metrics", "budget", "resampled", "rests_on"), dict),
}


def evaluation_basis(parts: Mapping[str, object]) -> str:
    """SHA-256 (hex) of all that a result depends on besides the genotype (`lib.scoring.rests_on`)."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def evaluation_key(genotype: Genotype, basis: str) -> str:
    """SHA-256 (hex) of a genotype and the basis of its evaluation."""
    return evaluation_basis({"genotype": genotype.to_dict(), "basis": basis})


class Ledger:
    """An open ledger, a context manager; `checkpoint.lock_folder` keeps a second process away.

    Blank lines count for nothing, and of several records with one key the last counts, in the place of the first. A
    last line that a crash cut short is dropped; any other line that is no record is a UserError. A failed write is one
    too and closes the ledger; the next open repairs the file.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._by_key: dict[str, dict] = {}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b", buffering=0)
            gc.disable()  # or half of the time would go into looking for garbage among the records
            self._read()
        except OSError as error:
            raise UserError(f"{self.path}: cannot open the ledger: {error.strerror}") from None
        finally:
            gc.enable()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_) -> None:
        # A file without a line is removed: there is nothing to go on from.
        with contextlib.suppress(OSError):
            if not self._file.closed and not os.fstat(self._file.fileno()).st_size:
                self.path.unlink()
        self._file.close()

    def append(self, record: dict) -> None:
        """Write one record through to the disk. Raises ValueError on NaN or infinity, which JSON does not have."""
        self._write(json.dumps(record, allow_nan=False, separators=(",", ":")).encode() + b"\n")
        self._by_key[record["key"]] = record

    def records(self, **matching: object) -> list[dict]:
        """The records whose fields equal `matching`, as in `records(status="ok")`, in the order written."""
        return [r for r in self._by_key.values() if all(r.get(name) == value for name, value in matching.items())]

    def lookup(self, key: str) -> dict | None:
        """The record with this `key`."""
        return self._by_key.get(key)

    def _write(self, line: bytes) -> None:
        try:
            while line:  # a disk that fills up accepts a part of a line first
                line = line[self._file.write(line) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.close()  # a later line must not be appended to a part of this one
            raise UserError(f"{self.path}: cannot write the ledger: {error.strerror}") from None

    def _read(self) -> None:
        self._file.seek(0)
        *lines, tail = self._file.read().split(b"\n")
        for number, line in enumerate(lines, 1):
            if line.strip():
                self._take(line, number)
        # The last line lacks its line break if the process died while it wrote.
        if tail:
            try:
                json.loads(tail)  # a proper prefix of a record never is JSON
            except (ValueError, RecursionError):
                self._file.truncate(sum(len(line) + 1 for line in lines))
                os.fsync(self._file.fileno())
            else:
                self._take(tail, len(lines) + 1)
                self._write(b"\n")

    def _take(self, line: bytes, number: int) -> None:
        try:
            record = checked(json.loads(line))
        except (ValueError, RecursionError, UserError) as error:
            wrong = f"not a record of an evaluation ({error}), found {line[:60].decode(errors='replace')!r}"
            remedy = "without that line, --resume goes on and scores its candidate again"
            raise UserError(f"{self.path}, line {number}: {wrong}; {remedy}") from None
        self._by_key[record["key"]] = record


def checked(record: object) -> dict:
    """`record`, if what stands in it can be believed. Else raises ValueError or UserError that says what cannot.

    By hand, because `lib.plain.check` would take many times as long.
    """
    if not isinstance(record, dict):
        raise ValueError("expected a JSON object")
    if missing := {"key", "status", "genotype", "metrics"} - record.keys():
        raise ValueError(f'"{min(missing)}" is missing')
    for name in record.keys() & KINDS.keys():
        if not isinstance(record[name], KINDS[name]):
            raise ValueError(f'"{name}" is {shown(record[name])}')
    if record["status"] not in ("ok", "failed"):
        raise ValueError(f'"status" is {shown(record["status"])}')
    counts = [(name, record[name]) for name in ("seconds", "time", "images", "epoch") if name in record]
    # null stands for a metric that is not defined on these images
    metrics = [(name, value) for name, value in record["metrics"].items() if value is not None]
    for name, value in counts + metrics:
        most = 1 + ROUNDING if name.startswith(("AP", "AR", "mAP")) else LARGEST
        if type(value) not in (int, float) or not 0 <= value <= most:
            raise ValueError(f"{name} is {shown(value)}")
    Genotype.from_dict(record["genotype"])
    return record
