"""Which configuration a command stands on, and what it may write over."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from tiny_runs import TINY

from lib import checkpoint, cli, config_io
from lib.cli import stage_folder
from lib.errors import UserError


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))


def parse(*words):
    return cli.make_parser("", "").parse_args(words)


def saved(settings, folder, product="last.pt"):
    cli.save_config(settings, folder)
    checkpoint.write_text(folder / product, "")


@pytest.mark.parametrize("given", [[], ["--train-dir", "elsewhere"]])
def test_a_resumed_run_keeps_its_own_configuration(given):
    """--set comes after it, --cfg before it, and a run that starts anew does not know it."""
    inherited = config_io.to_dict(config_io.read_config("tiny.yaml"))
    args = parse("--resume", *given)
    folder = cli.run_folder(args, config_io.read_config("tiny.yaml"), "search")
    saved(config_io.read_config("tiny.yaml", ["search.max_flops=3e6", "search.steps=5"]), folder, "evals.jsonl")
    assert cli.read_config(args, "search", inherited).search.max_flops == 3e6
    changed = cli.read_config(parse("--resume", *given, "--set", "search.steps=6"), "search", inherited).search
    assert (changed.max_flops, changed.steps) == (3e6, 6)
    for anew in (["--resume", "--cfg", "tiny.yaml"], []):
        assert cli.read_config(parse(*anew, *given), "search", inherited).search.max_flops == 0


def test_without_a_run_to_resume_it_starts_from_what_it_inherits():
    inherited = config_io.to_dict(config_io.read_config("tiny.yaml", ["seed=3"]))
    assert cli.read_config(parse("--resume"), "final", inherited).seed == 3
    assert cli.read_config(parse("--resume"), "final").name == "shapes"
    cli.save_config(config_io.read_config("tiny.yaml", ["seed=5"]), stage_folder("tiny", "final"))
    assert cli.read_config(parse("--resume"), "final", inherited).seed == 3  # that run has nothing to go on from
    saved(config_io.read_config("tiny.yaml", ["seed=4"]), stage_folder("tiny", "finetuned"))
    assert cli.read_config(parse("--resume"), "final", inherited).seed == 3
    assert cli.read_config(parse("--resume"), "final", inherited, "finetuned").seed == 4


def test_what_an_earlier_run_left_is_not_written_over(tmp_path, capsys):
    product = tmp_path / "last.pt"
    cli.refuse_to_overwrite(product, parse())
    checkpoint.write_text(product, "precious")
    cli.refuse_to_overwrite(product, parse("--resume"))
    with pytest.raises(UserError, match=r"last\.pt exists: --resume continues that run, --train-dir DIR starts one"):
        cli.refuse_to_overwrite(product, parse())
    assert not capsys.readouterr().out
    cli.refuse_to_overwrite(product, parse("--dry-run"))
    assert f"note: {product} exists" in capsys.readouterr().out


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
