"""The ledger: nothing lost, torn ends healed, other damage named, errors that leave it whole."""

from __future__ import annotations

import gc
import json
import math
import resource
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import UserError
from lib.genotype import Block, Genotype
from lib.ledger import Ledger, checked, evaluation_basis, evaluation_key

GENOTYPE = Genotype(300, "mbv3_backbone", ((Block(1, 3),), (Block(6, 7), Block(4, 5))), (Block(0.5, 3),))


def record(i: int, status: str = "ok") -> dict:
    metrics = {"AP": i / 30_000, "flops": 10**9 + i}
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


DAMAGE = [
    b'{"key": "a", "met',
    b"[1]",
    b'{"status": "ok", "genotype": {}, "metrics": {}}',
    b'{"key": "a", "status": "ok", "metrics": {}}',
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"key": "' + b"x" * (5 << 20) + b'"}',
]
WRONG = [
    *({"metrics": {"AP": value}} for value in (math.nan, math.inf, 1.2, -0.1, True, "0.5", [0.5], 10**400)),
    *({"metrics": {"flops": value}} for value in (-1, math.inf, {})),
    *({"seconds": value} for value in ("1", None, math.nan)),
    *({"metrics": 3}, {"metrics": None}, {"genotype": {"format": "genotype/1"}}, {"genotype": "net"}),
    *({"key": 3}, {"status": "stopped"}, {"status": None}, {"worker": 3}, {"error": ["a"]}, {"images": True}),
    *({"resampled": "abc"}, {"objective": {}}, {"budget": 3}, {"rests_on": 3}),
]


@pytest.mark.parametrize("number", range(len(DAMAGE) + len(WRONG)))
def test_a_line_that_is_no_record_is_named_and_left_alone(path, number):
    damage = [*DAMAGE, *(json.dumps({**record(7), **fields}).encode() for fields in WRONG)][number]
    fill(path, 2)
    lines = path.read_bytes().splitlines(keepends=True)
    for line in (0, 1, 2):
        damaged = b"".join([*lines[:line], damage + b"\n", *lines[line:]])
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"evals.jsonl, line {line + 1}: not a record") as caught:
            Ledger(path)
        assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)
        assert path.read_bytes() == damaged


def test_a_metric_that_is_not_defined_or_one_by_rounding_is_believed(path):
    fill(path, 1)
    odd = {**record(1), "metrics": {"APs": None, "AP": 1.0000000000000002, "flops": 10**12}}
    with Ledger(path) as ledger:
        ledger.append(odd)
    with Ledger(path) as ledger:
        assert ledger.records() == [record(0), odd]


def test_blank_lines_count_for_nothing_and_doubled_ones_once(path):
    records = fill(path, 3)
    first, second, third = path.read_bytes().splitlines(keepends=True)
    again = json.dumps({**records[0], "status": "failed"}).encode() + b"\n"
    path.write_bytes(b"\n" + first + b"  \n" + second + second + b"\r\n" + third + again + third)
    with Ledger(path) as ledger:
        assert ledger.records() == [{**records[0], "status": "failed"}, *records[1:]]
        assert ledger.lookup("key0")["status"] == "failed"


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=50)
@given(st.sampled_from(["key", "status", "genotype", "metrics", "seconds", "worker", "images", "resampled"]), junk)
def test_whatever_stands_in_a_record_it_is_one_line_or_a_record(field, value):
    try:
        checked({**record(0), field: value})
    except (ValueError, UserError) as error:
        assert "\n" not in str(error)


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
    with pytest.raises(ValueError, match="closed"):
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
    assert not path.exists()  # there is nothing to go on from


def test_the_key_depends_on_all_that_the_result_depends_on():
    parts = {"weights": "a", "settings": "b"}
    bases = [evaluation_basis(each) for each in (parts, {**parts, "weights": "b"}, {**parts, "settings": "a"})]
    genotypes = GENOTYPE, replace(GENOTYPE, image_size=320), replace(GENOTYPE, backbone_type="mbv2_backbone")
    keys = [evaluation_key(genotype, basis) for genotype in genotypes for basis in bases]
    assert len(set(keys)) == len(keys) == 9


def test_the_key_does_not_depend_on_spelling():
    same = replace(GENOTYPE, stages=((Block(1.0, 3),), GENOTYPE.stages[1]))
    assert evaluation_key(GENOTYPE, "a") == evaluation_key(same, "a")
    assert evaluation_basis({"x": "1", "y": "2"}) == evaluation_basis({"y": "2", "x": "1"})


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
