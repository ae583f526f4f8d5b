"""Which configuration a command stands on, and what it may write over."""

from __future__ import annotations

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
