"""Logs, run folders and the process: torn lines, NaN, which run was the last, devices, seeds, signals, exit codes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from lib import cli
from lib.errors import UserError
from lib.log import RunLog, finite, progress, read_log, say

ROOT = Path(__file__).parent.parent


# The log


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    log = RunLog(path)
    log.write("train", 3, losses={"class": 1.5}, lr=0.1)
    (record,) = read_log(path)
    assert record.pop("time") > 1.6e9
    assert record == {"kind": "train", "step": 3, "losses": {"class": 1.5}, "lr": 0.1}
    log.close()


def test_a_second_run_appends(tmp_path):
    for step in (1, 2):
        log = RunLog(tmp_path / "log.jsonl")
        log.write("train", step)
        log.close()
    assert [r["step"] for r in read_log(tmp_path / "log.jsonl")] == [1, 2]


@pytest.mark.parametrize("cut", [1, 2, 10])
def test_a_torn_line_is_left_out_and_no_other_line_is(tmp_path, cut):
    """Neither the lines before, nor the first one that a resumed run writes after it."""
    path = tmp_path / "log.jsonl"
    log = RunLog(path)
    for step in (1, 2, 3):
        log.write("train", step)
    log.close()
    path.write_bytes(path.read_bytes()[:-cut])
    assert [r["step"] for r in read_log(path)] == ([1, 2, 3] if cut == 1 else [1, 2])
    log = RunLog(path)
    log.write("train", 4)
    log.close()
    assert [r["step"] for r in read_log(path)] == ([1, 2, 3, 4] if cut == 1 else [1, 2, 4])


def test_no_log_is_no_records(tmp_path):
    assert read_log(tmp_path / "none.jsonl") == []


def test_nan_becomes_null(tmp_path):
    nan, inf = float("nan"), float("inf")
    assert finite({"a": nan, "b": {"c": -inf, "d": 1.5}, "e": [nan, 2, (inf,)], "f": "nan", "g": None, "h": True}) == {
        "a": None,
        "b": {"c": None, "d": 1.5},
        "e": [None, 2, [None]],
        "f": "nan",
        "g": None,
        "h": True,
    }
    log = RunLog(tmp_path / "log.jsonl")
    log.write("eval", 1, AP=np.float64("nan"), losses=[nan])
    log.close()

    def refuse(constant: str):
        raise AssertionError(f"{constant} is not JSON")

    (record,) = (json.loads(line, parse_constant=refuse) for line in log.path.read_text().splitlines())
    assert (record["AP"], record["losses"]) == (None, [None])


def test_tensorboard_gets_every_number(tmp_path):
    seen = []

    class Board:
        def add_scalar(self, *scalar):
            seen.append(scalar)

        def close(self):
            seen.append("closed")

    log = RunLog(tmp_path / "log.jsonl")
    log._board = Board()
    log.write("eval", 7, networks={"largest": {"AP": 0.5}}, lr=0.1, name="x", flag=True)
    log.close()
    assert seen == [("eval/networks/largest/AP", 0.5, 7), ("eval/lr", 0.1, 7), "closed"]


def test_a_missing_tensorboard_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        RunLog(tmp_path / "log.jsonl", tensorboard=True)
    assert not any(tmp_path.iterdir())


def test_progress_and_lines_do_not_mix(capsys):
    assert list(progress([1, 2, 3], "epoch 1")) == [1, 2, 3]
    say("a line")
    assert capsys.readouterr().out == "a line\n"


# Run folders


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_last_run_of_each_stage(folder):
    assert cli.last_run("search") is None
    assert cli.stage_folder("bccd", "search") == Path("runs/bccd/search")
    for name in ("one", "two"):
        path = cli.stage_folder(name, "search")
        path.mkdir(parents=True)
        cli.remember("search", path)
    cli.remember("supernet", Path("runs/gone/supernet"))
    assert cli.last_run("search") == Path("runs/two/search")
    assert cli.last_run("supernet") is None  # its folder does not exist


def test_a_broken_pointer_file_is_no_run(folder):
    Path("runs").mkdir()
    cli.POINTER.write_text('{"search": ')
    assert cli.last_run("search") is None
    Path("runs/x/search").mkdir(parents=True)
    cli.remember("search", Path("runs/x/search"))
    assert cli.last_run("search") == Path("runs/x/search")


def test_supernet_checkpoint_from_file_run_or_parent(folder):
    last = Path("runs/x/supernet/last.pt")
    last.parent.mkdir(parents=True)
    last.touch()
    assert [cli.supernet_checkpoint(p) for p in (last, last.parent, last.parent.parent)] == [last] * 3
    for missing in (Path("runs"), Path("nowhere")):
        with pytest.raises(UserError, match=f"^{missing}: no supernet checkpoint here; expected last.pt"):
            cli.supernet_checkpoint(missing)


def test_a_bare_genotype_name_falls_back_to_the_last_search(folder):
    search = cli.stage_folder("x", "search")
    search.mkdir(parents=True)
    (search / "best.json").touch()
    with pytest.raises(UserError, match=r"^best.json: no such genotype file here; async_search.py writes"):
        cli.find_genotype("best.json")
    cli.remember("search", search)
    assert cli.find_genotype("best.json") == search / "best.json"
    assert cli.find_genotype(str(search / "best.json")) == search / "best.json"
    Path("best.json").touch()
    assert cli.find_genotype("best.json") == Path("best.json")


def test_a_genotype_that_is_nowhere_names_where_it_was_sought(folder):
    search = cli.stage_folder("x", "search")
    search.mkdir(parents=True)
    (search / "best.json").touch()
    (search / "other").mkdir()
    (search / "other" / "best.json").touch()
    cli.remember("search", search)
    with pytest.raises(UserError, match=f"^bst.json: no such genotype file here nor in {search}; "):
        cli.find_genotype("bst.json")
    with pytest.raises(UserError, match=r"^other/best.json: no such genotype file here; "):
        cli.find_genotype("other/best.json")
