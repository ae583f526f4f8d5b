"""The append-only record of evaluations that ended: one JSON line each, on disk as soon as it is written.

A line: {"key", "basis", "genotype": Genotype.to_dict(), "metrics": {name: number}, "status", "seconds", "worker",
"epoch", "error" (failed only)}. `key` and `basis` come from `evaluation_key` and `evaluation_basis`. "status" is "ok",
"failed", or "stopped" where racing ended it: its metrics are those of the first "images" only. "resampled" has scores
by which candidates are compared (lib/scoring.py). The search adds "search" (its name), "origin" ("given", "random" or
"bred", see evolution; "front" where its members are scored on all images), "budget" (of the proposals), "time" (end).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path

from lib.checkpoint import lock
from lib.errors import UserError
from lib.genotype import Genotype


def evaluation_basis(supernet_sha256: str, split_sha256: str, settings: dict) -> str:
    """SHA-256 (hex) of all that a result depends on beside the genotype; `settings` is plain JSON."""
    return _digest({"supernet": supernet_sha256, "split": split_sha256, "settings": settings})


def evaluation_key(genotype: Genotype, basis: str) -> str:
    """SHA-256 (hex) of a genotype and the basis of its evaluation."""
    return _digest({"genotype": genotype.to_dict(), "basis": basis})


def _digest(parts: dict) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Ledger:
    """An open ledger, locked against a second process. Use it as a context manager.

    Opening reads every line. A last line that a crash cut short is dropped, and no other line is: one that cannot be
    read is a UserError. A failed write is a UserError too and closes the ledger; the next open heals the file.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._records: list[dict] = []
        self._by_key: dict[str, dict] = {}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b", buffering=0)
        except OSError as error:
            raise UserError(f"{self.path}: cannot open the ledger: {error.strerror}") from None
        try:
            self._lock()
            self._read()
        except OSError as error:
            self.close()
            raise UserError(f"{self.path}: cannot read the ledger: {error.strerror}") from None
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._records)

    def close(self) -> None:
        """Give the file and its lock back."""
        self._file.close()

    def append(self, record: dict) -> None:
        """Write one record through to the disk. Raises ValueError on NaN or infinity, which JSON does not have."""
        line = json.dumps(record, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        self._write(line)
        self._remember(record)

    def records(self, **matching: object) -> list[dict]:
        """The records in the order written, those whose fields equal `matching`, as in `records(status="ok")`."""
        return [r for r in self._records if all(r.get(name) == value for name, value in matching.items())]

    def lookup(self, key: str) -> dict | None:
        """The last record with this `key`."""
        return self._by_key.get(key)

    def _write(self, line: bytes) -> None:
        if self._file.closed:
            raise UserError(f"{self.path}: the ledger is closed")
        try:
            while line:  # a disk that fills up takes a part first, and refuses the rest
                line = line[self._file.write(line) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            self.close()  # no later line may be glued to a part of this one
            raise UserError(f"{self.path}: cannot write the ledger: {error.strerror}") from None

    def _remember(self, record: dict) -> None:
        self._records.append(record)
        self._by_key[record["key"]] = record

    def _read(self) -> None:
        self._file.seek(0)
        *lines, tail = self._file.read().split(b"\n")
        for number, line in enumerate(lines, 1):
            record = _parse(line)
            if record is None:
                found = line[:60].decode(errors="replace")
                raise UserError(f'{self.path}, line {number}: expected a record with a "key", found {found!r}')
            self._remember(record)
        if not tail:
            return
        if (record := _parse(tail)) is None:
            self._file.truncate(sum(len(line) + 1 for line in lines))
            os.fsync(self._file.fileno())
        else:  # whole but for its line break
            self._write(b"\n")
            self._remember(record)

    def _lock(self) -> None:
        try:
            lock(self._file, wait=False)
        except BlockingIOError:
            pid = _lock_holder(os.fstat(self._file.fileno()).st_ino)
            who = f"process {pid}" if pid else "another process"
            raise UserError(f"{self.path}: in use by {who}; wait for it to end, or use another folder") from None


def _parse(line: bytes) -> dict | None:
    """The record on this line, None if it holds none. No proper prefix of a record is one."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "key" in record else None


def _lock_holder(inode: int) -> int | None:
    """The process that holds the flock on this file, where the kernel tells (Linux)."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            _, kind, _, _, pid, file, *_ = line.split()  # 1: FLOCK ADVISORY WRITE 4103 fe:00:2146487 0 EOF
            if kind == "FLOCK" and file.endswith(f":{inode}"):
                return int(pid)
    return None
