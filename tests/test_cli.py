"""Which configuration a command stands on, which folder it writes to, and what it does not write over."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import yaml
from tiny_runs import TINY

from lib import UserError, checkpoint, cli, config_io


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))


def parse(*words):
    return cli.make_parser("", "").parse_args([str(word) for word in words])


def resolve(stage, *words, inherited=None, flags=None, folder_name=None):
    return cli.CommandLine(parse(*words), stage, flags).resolve(inherited, "somewhere", folder_name)


def tiny(*overrides):
    return config_io.to_dict(config_io.read_config("tiny.yaml", overrides))


def stage_folder(name, stage):
    return cli.RUNS / name / stage


def leave_run(settings, folder, product="last.pt"):
    cli.Run(folder, config_io.from_dict(settings), "").save_config()
    checkpoint.write_text(folder / product, "")


def test_the_layers_in_their_order():
    """--set over flags over the file over the defaults; the source is named."""
    flags = {"search.max_flops": 3e6, "search.steps": 7, "search.max_params": None}
    run = resolve("search", "--cfg", "tiny.yaml", "--set", "search.steps=8", "--seed", "5", flags=flags)
    assert (run.config.search.max_flops, run.config.search.steps, run.config.search.max_params) == (3e6, 8, 0)
    assert run.config.seed == 5 and run.config.search.bn_images == TINY["search"]["bn_images"]
    assert run.config.search.tournament_size == 2 and run.config.loss.alpha == 0.25
    assert run.folder == Path("runs/tiny/search")
    assert run.describe()[0] == "configuration: tiny.yaml" and run.describe()[1] == "data: data/shapes"
    assert resolve("supernet").source == "configs/shapes.yaml"


@pytest.mark.parametrize("folder", ["d/my set #2", "20240601", "yes", "2024-06-01", "it's"])
def test_a_flag_is_a_value_and_no_yaml(folder):
    Path(folder).mkdir(parents=True)
    run = resolve("supernet", "--cfg", "tiny.yaml", "--data", folder)
    assert run.config.data.root == folder and f"data: {folder}" in run.describe()
    table = "t #1.json"
    assert resolve("search", flags={"search.latency_table": table}).config.search.latency_table == table


@pytest.mark.parametrize("given", [[], ["--train-dir", "elsewhere"]])
def test_a_resumed_run_keeps_its_own_configuration(given):
    """--set comes after it, --cfg before it, and a run that starts anew does not know it."""
    inherited = tiny()
    folder = resolve("search", "--resume", *given, inherited=inherited).folder
    leave_run(tiny("search.max_flops=3e6", "search.steps=5"), folder, "evals.jsonl")
    resumed = resolve("search", "--resume", *given, inherited=inherited)
    assert resumed.config.search.max_flops == 3e6 and "with which this run began" in resumed.source
    changed = resolve("search", "--resume", *given, "--set", "search.steps=6", inherited=inherited).config.search
    assert (changed.max_flops, changed.steps) == (3e6, 6)
    for anew in (["--resume", "--cfg", "tiny.yaml"], []):
        assert resolve("search", *anew, *given, inherited=inherited).config.search.max_flops == 0


def test_without_a_run_to_resume_it_starts_from_what_it_inherits():
    inherited = tiny("seed=3")
    assert resolve("final", "--resume", inherited=inherited).config.seed == 3
    assert resolve("final", "--resume").config.name == "shapes"
    cli.Run(stage_folder("tiny", "final"), config_io.from_dict(tiny("seed=5")), "").save_config()
    assert resolve("final", "--resume", inherited=inherited).config.seed == 3  # that run has nothing to go on from
    leave_run(tiny("seed=4"), stage_folder("tiny", "finetuned"))
    assert resolve("final", "--resume", inherited=inherited).config.seed == 3
    assert resolve("final", "--resume", inherited=inherited, folder_name="finetuned").config.seed == 4


def test_a_value_that_the_user_gave_is_known_before_the_rest():
    words = ["--cfg", "tiny.yaml", "--set", "final.genotypes=a.json", "--set", "final.genotypes=b.json"]
    command = cli.CommandLine(parse(*words), "final")
    assert command.given("final.genotypes") == "b.json" and command.given("final.epochs") == 2
    assert command.given("final.optimizer") is None and command.given("nothing.at.all") is None


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("search.racing=true", "search.racing: this key"),
        ("final.distill.weight={boundary: [1], value: [0]}", "final.distill: this key"),
        ("supernet.sampling=sandwich", "supernet.sampling: sandwich"),
        ("final.compile=true", "final.compile: this key"),
    ],
)
def test_what_was_removed_is_refused_but_old_files_have_it(text, what):
    inherited = config_io.with_changes(tiny(), [config_io.parse_override(text)])
    assert resolve("search", inherited=inherited).config == config_io.from_dict(tiny())
    with pytest.raises(UserError, match=f"^{what} was removed"):
        resolve("search", "--set", text)


def test_a_written_configuration_may_have_what_was_removed_at_its_default():
    assert resolve("final", "--set", "final.compile=false").config == resolve("final").config


@pytest.mark.parametrize("name", ["../../x", "a/b", "", ".", "..", "a\\b", "x" * 300, 7, None, "a\nb"])
def test_a_foreign_name_cannot_choose_where_to_write(name):
    inherited = tiny() | {"name": name}
    with pytest.raises(UserError, match=r"^somewhere: name: expected a plain name"):
        resolve("final", inherited=inherited)


@pytest.mark.parametrize(("kind", "words"), [("shapes", "not below this folder"), ("voc", "not here"), ("auto", "not")])
def test_a_foreign_configuration_cannot_choose_where_pictures_are_drawn(kind, words, tmp_path, monkeypatch):
    """Its other paths are only read, and shown where they lead elsewhere."""
    inherited = tiny() | {"data": {"dataset_type": kind, "root": str(tmp_path / "victim"), "test_images": "../x"}}
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(UserError, match=f"data.root: somewhere has .*victim, which is {words}.*--data DIR"):
        resolve("final", inherited=inherited)
    resolve("final", "--set", "data.root=mine", inherited=inherited)
    (tmp_path / "victim").mkdir()
    if kind != "shapes":
        assert "note: data.test_images is ../x, from somewhere" in resolve("final", inherited=inherited).describe()


def test_a_printed_command_is_quoted_for_a_shell():
    words = {"load": 'it\'s a "run"; rm -rf $HOME', "train_dir": "-x", "index": 2}
    line = cli.command("final_train.py", **words)
    assert shlex.split(line) == [
        *("python", "final_train.py", "--load", words["load"], "--train-dir=-x", "--index", "2"),
    ]


def test_a_mistake_names_the_layer_that_it_stands_in():
    with pytest.raises(UserError, match=r"^somewhere: search\.steps: expected"):
        resolve("search", inherited=tiny() | {"search": {"steps": 0}})
    with pytest.raises(UserError, match=r"^search\.max_flops: expected a number, found nan"):
        resolve("search", inherited=tiny(), flags={"search.max_flops": float("nan")})
    with pytest.raises(UserError, match="--data nowhere: no such folder"):
        resolve("supernet", "--data", "nowhere")


def test_what_an_earlier_run_left_is_not_written_over(tmp_path, capsys):
    product = tmp_path / "last.pt"
    with cli.claim(product, parse()):
        checkpoint.write_text(product, "precious")
    with cli.claim(product, parse("--resume")):
        pass
    with (
        pytest.raises(UserError, match=r"last\.pt exists: --resume continues that run, --train-dir DIR starts one"),
        cli.claim(product, parse()),
    ):
        pass
    assert not capsys.readouterr().out
    with cli.claim(product, parse("--dry-run")):
        assert f"note: {product} exists" in capsys.readouterr().out
    assert product.read_text() == "precious"


def test_the_last_run_of_each_stage_is_remembered():
    assert cli.last_run("search") is None
    for name in ("one", "two"):
        folder = stage_folder(name, "search")
        folder.mkdir(parents=True)
        cli.remember("search", folder)
    cli.remember("supernet", Path("runs/gone/supernet"))
    assert cli.last_run("search") == Path("runs/two/search")
    assert cli.last_run("supernet") is None  # its folder does not exist


@pytest.mark.parametrize("text", ['{"search": ', "[]", "null", '{"search": 3}', "\x00"])
def test_a_damaged_pointer_is_as_none(text):
    cli.RUNS.mkdir()
    cli.POINTER.write_text(text)
    assert cli.last_run("search") is None
    stage_folder("x", "search").mkdir(parents=True)
    cli.remember("search", stage_folder("x", "search"))
    assert cli.last_run("search") == Path("runs/x/search")


def test_a_supernet_is_found_by_its_folder_or_file(tmp_path):
    last = tmp_path / "runs" / "x" / "supernet" / "last.pt"
    checkpoint.write_text(last, "")
    assert [cli.supernet_checkpoint(p) for p in (last, last.parent, last.parent.parent)] == [last] * 3
    with pytest.raises(UserError, match="no supernet checkpoint here"):
        cli.supernet_checkpoint(tmp_path / "nothing")


def test_a_genotype_is_found_here_or_in_the_last_search():
    with pytest.raises(UserError, match=r"best\.json: no such genotype file here; "):
        cli.find_genotype("best.json")
    search = stage_folder("x", "search")
    checkpoint.write_text(search / "best.json", json.dumps({}))
    cli.remember("search", search)
    assert cli.find_genotype("best.json") == search / "best.json" == cli.find_genotype(str(search / "best.json"))
    with pytest.raises(UserError, match=r"bst\.json: no such genotype file here nor in runs/x/search"):
        cli.find_genotype("bst.json")
    with pytest.raises(UserError, match=r"other/best\.json: no such genotype file here; "):
        cli.find_genotype("other/best.json")
    Path("best.json").write_text("{}")
    assert cli.find_genotype("best.json") == Path("best.json")


def test_a_word_of_60000_letters_is_no_genotype_file():
    with pytest.raises(UserError, match="aaa: no such genotype file here") as caught:
        cli.find_genotype(60_000 * "a")
    assert len(str(caught.value)) < 2000
