"""The ledger: nothing lost, torn ends healed, other damage named, one writer at a time, errors that leave it whole."""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from lib.errors import UserError
from lib.genotype import Block, Genotype
from lib.ledger import Ledger, evaluation_basis, evaluation_key

GENOTYPE = Genotype(300, "mbv3_backbone", ((Block(1, 3),), (Block(6, 7), Block(4, 5))), (Block(0.5, 3),))


def record(i: int, status: str = "ok") -> dict:
    metrics = {"AP": i / 7, "flops": 10**9 + i}
    return {"key": f"key{i}", "genotype": GENOTYPE.to_dict(), "metrics": metrics, "status": status, "epoch": i // 4}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "search" / "evals.jsonl"


def fill(path: Path, count: int) -> list[dict]:
    records = [record(i) for i in range(count)]
    with Ledger(path) as ledger:
        for one in records:
            ledger.append(one)
    return records


def test_what_was_appended_is_there_after_reopening(path):
    records = fill(path, 3)
    with Ledger(path) as ledger:
        assert ledger.records() == records
        assert len(ledger.records()) == 3
        ledger.append(record(3))
        assert ledger.records()[3] == record(3)
    with Ledger(path) as ledger:
        assert ledger.records() == [*records, record(3)]
        assert Genotype.from_dict(ledger.records()[0]["genotype"]) == GENOTYPE
    assert [json.loads(line) for line in path.read_text().splitlines()] == [*records, record(3)]


def test_records_are_found_by_field_and_by_key(path):
    with Ledger(path) as ledger:
        for one in (record(0), record(5, "failed"), record(6)):
            ledger.append(one)
        assert ledger.records(status="ok") == [record(0), record(6)]
        assert ledger.records(status="ok", epoch=1) == [record(6)]
        assert ledger.lookup("key5") == record(5, "failed")
        assert ledger.lookup("nothing") is None
        ledger.append(record(5))
        assert ledger.lookup("key5") == record(5)


def test_a_line_is_on_disk_when_append_returns(path):
    with Ledger(path) as ledger:
        ledger.append(record(0))
        assert json.loads(path.read_text()) == record(0)


def test_a_line_cut_anywhere_is_dropped_and_no_other(path):
    records = fill(path, 3)
    whole = path.read_bytes()
    second_end = len(b"".join(whole.splitlines(keepends=True)[:2]))
    for end in range(second_end, len(whole) - 1):
        path.write_bytes(whole[:end])
        with Ledger(path) as ledger:
            assert ledger.records() == records[:2]
        assert path.read_bytes() == whole[:second_end]


def test_a_torn_line_is_followed_by_whole_ones(path):
    records = fill(path, 2)
    with path.open("ab") as file:
        file.write(b'{"key": "torn", "metr')
    with Ledger(path) as ledger:
        ledger.append(record(2))
    with Ledger(path) as ledger:
        assert ledger.records() == [*records, record(2)]


def test_a_whole_last_line_that_lacks_its_line_break_is_kept(path):
    records = fill(path, 2)
    path.write_bytes(path.read_bytes()[:-1])
    with Ledger(path) as ledger:
        assert ledger.records() == records
        ledger.append(record(2))
    with Ledger(path) as ledger:
        assert ledger.records() == [*records, record(2)]


def test_zeros_that_a_power_cut_leaves_are_dropped(path):
    records = fill(path, 2)
    with path.open("ab") as file:
        file.write(b"\0" * 64)
    with Ledger(path) as ledger:
        assert ledger.records() == records


@pytest.mark.parametrize("damage", [b'{"key": "a", "met\n', b"\n", b"[1]\n", b'{"status": "ok"}\n', b"\xff\xfe\n"])
@pytest.mark.parametrize("line", [0, 1, 2])
def test_damage_elsewhere_is_named_and_left_alone(path, damage, line):
    fill(path, 2)
    lines = path.read_bytes().splitlines(keepends=True)
    lines.insert(line, damage)
    path.write_bytes(b"".join(lines))
    for _ in range(2):  # and the refused open gave its lock back
        with pytest.raises(UserError, match=rf"evals.jsonl, line {line + 1}: "):
            Ledger(path)
    assert path.read_bytes() == b"".join(lines)


def test_a_second_ledger_on_the_same_file_is_refused_and_told_whose_it_is(path):
    with Ledger(path) as ledger:
        ledger.append(record(0))
        with pytest.raises(UserError, match=f"in use by (process {os.getpid()}|another process)"):
            Ledger(path)
        ledger.append(record(1))
    with Ledger(path) as ledger:
        assert len(ledger.records()) == 2


def test_a_killed_process_leaves_its_lines_and_no_lock(path):
    ready, started = os.pipe()
    child = os.fork()
    if child == 0:
        ledger = Ledger(path)
        for i in range(5):
            ledger.append({"key": str(i)})
        os.write(started, b"!")
        time.sleep(60)
        os._exit(1)
    try:
        os.read(ready, 1)
        with pytest.raises(UserError, match=f"in use by (process {child}|another process)"):
            Ledger(path)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with Ledger(path) as ledger:
        assert [r["key"] for r in ledger.records()] == list("01234")


def test_a_full_disk_is_a_clear_end_and_heals(path):
    """A limit on the file's size stands in for the disk: the kernel writes a part of the line, then refuses."""
    records = fill(path, 2)
    ledger = Ledger(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, hard))
    try:
        with pytest.raises(UserError, match=r"evals.jsonl: cannot write the ledger: "):
            ledger.append(record(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes()[-1:] != b"\n"  # the test did tear a line
    assert ledger.records() == records
    with pytest.raises(UserError, match="closed"):
        ledger.append(record(2))
    with Ledger(path) as ledger:
        assert ledger.records() == records
        ledger.append(record(2))


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / "file" / "evals.jsonl", tmp_path / "folder"):
        with pytest.raises(UserError, match=f"{place}: cannot open the ledger"):
            Ledger(place)


def test_nan_is_refused_before_it_is_written(path):
    with Ledger(path) as ledger:
        with pytest.raises(ValueError, match="JSON"):
            ledger.append({"key": "a", "metrics": {"AP": float("nan")}})
        assert len(ledger.records()) == 0
    assert path.read_bytes() == b""


def test_what_an_earlier_version_stopped_early_counts_as_not_evaluated(path):
    records = fill(path, 2)
    with Ledger(path) as ledger:
        ledger.append(record(2, "stopped"))
    with Ledger(path) as ledger:
        assert ledger.records() == records and ledger.lookup("key2") is None
        ledger.append(record(2))
        assert ledger.lookup("key2") == record(2)


def test_the_key_depends_on_all_that_the_result_depends_on():
    settings = {"bn_images": 200, "metric": "voc"}
    bases = [
        evaluation_basis("a", "b", settings),
        evaluation_basis("b", "b", settings),
        evaluation_basis("a", "a", settings),
        evaluation_basis("a", "b", {**settings, "bn_images": 100}),
    ]
    genotypes = GENOTYPE, replace(GENOTYPE, image_size=320), replace(GENOTYPE, backbone_type="mbv2_backbone")
    keys = [evaluation_key(genotype, basis) for genotype in genotypes for basis in bases]
    assert len(set(keys)) == len(keys) == 12


def test_the_key_does_not_depend_on_spelling():
    same = replace(GENOTYPE, stages=((Block(1.0, 3),), GENOTYPE.stages[1]))
    assert evaluation_key(GENOTYPE, "a") == evaluation_key(same, "a")
    assert evaluation_basis("a", "b", {"x": 1, "y": 2}) == evaluation_basis("a", "b", {"y": 2, "x": 1})


def test_20000_records_replay_in_two_seconds(path):
    path.parent.mkdir()
    path.write_text(
        "".join(json.dumps({**record(i), "worker": "cuda:0#0", "seconds": 1.5}) + "\n" for i in range(20_000))
    )
    gc.collect()
    gc.freeze()  # what other tests left would be gone through at this one's expense
    start = time.process_time()
    with Ledger(path) as ledger:
        assert len(ledger.records(status="ok")) == 20_000
    seconds = time.process_time() - start
    gc.unfreeze()
    assert seconds < 2
