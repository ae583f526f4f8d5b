"""The append-only record of finished evaluations: one JSON line each, on disk as soon as it is written.

A record: "key" and "basis" (hashes of all that the result depends on), "genotype" (Genotype.to_dict()), "status" ("ok"
or "failed"), "metrics" {name: number}, "images" (how many it was scored on), "objective" and "resampled"
{"<images>": packed scores} (lib/scoring.py), "seconds", "worker", "time" (of its end), "epoch", "error" (failed only),
"search" (the search that paid for it), "budget" (limits of its proposals) and "origin" ("given", "random" or "bred",
see lib/controllers.py; "front" if a member of the front was scored again on all images).
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
    """SHA-256 (hex) of all that a result depends on besides the genotype; `settings` is plain JSON."""
    return _digest({"supernet": supernet_sha256, "split": split_sha256, "settings": settings})


def evaluation_key(genotype: Genotype, basis: str) -> str:
    """SHA-256 (hex) of a genotype and the basis of its evaluation."""
    return _digest({"genotype": genotype.to_dict(), "basis": basis})


def _digest(parts: dict) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Ledger:
    """An open ledger, locked against a second process. Use it as a context manager.

    Opening reads every line. A last line that a crash cut short is dropped; any other line that cannot be read is a
    UserError. A failed write is a UserError too and closes the ledger; the next open repairs the file.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._records: list[dict] = []
        self._by_key: dict[str, dict] = {}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.ExitStack() as on_failure:  # closes the file, which releases its lock
                self._file = on_failure.enter_context(self.path.open("a+b", buffering=0))
                self._lock()
                self._read()
                on_failure.pop_all()
        except OSError as error:
            raise UserError(f"{self.path}: cannot open the ledger: {error.strerror}") from None

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, which releases its lock."""
        self._file.close()

    def append(self, record: dict) -> None:
        """Write one record through to the disk. Raises ValueError on NaN or infinity, which JSON does not have."""
        self._write(json.dumps(record, allow_nan=False, separators=(",", ":")).encode() + b"\n")
        self._remember(record)

    def records(self, **matching: object) -> list[dict]:
        """The records whose fields equal `matching`, as in `records(status="ok")`, in the order written."""
        return [r for r in self._records if all(r.get(name) == value for name, value in matching.items())]

    def lookup(self, key: str) -> dict | None:
        """The last record with this `key`."""
        return self._by_key.get(key)

    def _write(self, line: bytes) -> None:
        if self._file.closed:
            raise UserError(f"{self.path}: the ledger is closed")
        try:
            while line:  # a disk that fills up accepts a part of a line first
                line = line[self._file.write(line) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            self.close()  # a later line must not be appended to a part of this one
            raise UserError(f"{self.path}: cannot write the ledger: {error.strerror}") from None

    def _remember(self, record: dict) -> None:
        # Earlier versions could stop an evaluation on a part of the images: such a candidate is scored again.
        if record.get("status") != "stopped":
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
        # The last line lacks its line break if the process died while it wrote.
        if not tail:
            return
        if (record := _parse(tail)) is None:
            self._file.truncate(sum(len(line) + 1 for line in lines))
            os.fsync(self._file.fileno())
        else:
            self._write(b"\n")
            self._remember(record)

    def _lock(self) -> None:
        try:
            lock(self._file, wait=False)
        except BlockingIOError:
            who = "another process"
            inode = os.fstat(self._file.fileno()).st_ino
            # Linux lists the holder of a lock: 1: FLOCK ADVISORY WRITE 4103 fe:00:2146487 0 EOF
            with contextlib.suppress(OSError):
                for line in Path("/proc/locks").read_text().splitlines():
                    _, kind, _, _, pid, file, *_ = line.split()
                    if kind == "FLOCK" and file.endswith(f":{inode}"):
                        who = f"process {pid}"
            raise UserError(f"{self.path}: in use by {who}; wait for it to end, or use another folder") from None


def _parse(line: bytes) -> dict | None:
    """The record on this line, or None. A proper prefix of a record is never taken for one."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "key" in record else None
