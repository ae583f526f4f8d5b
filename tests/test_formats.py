"""Files of our own formats as strangers may have made them: whatever is in them, a reader accepts it or says in one
line, with the file's name, what is wrong."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

from lib import UserError, checkpoint, cli, config_io, inference, pretrained
from lib.config import Config, PostprocessConfig
from lib.converters import check_metadata
from lib.datasets import load_split
from lib.detector import load_detector, load_supernet
from lib.genotype import Genotype, read_genotype_file, read_genotype_files
from lib.latency import FORMAT as LATENCY
from lib.latency import LatencyTable, all_features, load_table, shared_parts
from lib.log import plot_training, read_log
from lib.pretrained import load_pretrained
from lib.sources import recognise
from lib.trials import read_result

MUTANTS = 100  # of each file
DEEP: list = []
for _ in range(200):
    DEEP = [DEEP]
WRONG = [
    *(None, True, -1, 0, 0.5, 10**30, 10**400, float("nan"), float("inf"), "", "x", "nan", "\0", "../../x", "\ud800\n"),
    *([], {}, [[]], [None], ["a", "a"], [-1], {"x": 1}, DEEP, list(range(300)), "y" * 5000),
]


def paths(node: object, path: tuple = ()) -> Iterator[tuple]:
    """The path of every part of plain data, itself among them; of long lists only the first parts."""
    yield path
    items = node.items() if isinstance(node, dict) else enumerate(node[:3]) if isinstance(node, list) else ()
    for key, item in items:
        yield from paths(item, (*path, key))


def mutated(data: object, path: tuple, change: Callable[[object, object], None]) -> object:
    """A copy of `data` in which `change(parent, key)` was made to the part at `path`."""
    box = {"": copy.deepcopy(data)}
    parent, key = box, ""
    for step in path:
        parent, key = parent[key], step
    change(parent, key)
    return box.get("")


def mutants(data: object, seed: int, count: int = MUTANTS) -> Iterator[tuple[str, object]]:
    """Copies of `data`, each with one part deleted, doubled or of another kind, size or depth."""
    rng = random.Random(seed)
    places = list(paths(data))
    # Near the top each part is as likely as all those far below together.
    weights = [4.0 ** -len(path) for path in places]
    for _ in range(count):
        path = rng.choices(places, weights)[0]
        wrong = rng.choice(WRONG)
        changes = {
            "delete": lambda parent, key: parent.pop(key),
            "double": lambda parent, key: parent.__setitem__(key, [parent[key], parent[key]]),
            "nest": lambda parent, key: parent.__setitem__(key, {"x": parent[key]}),
            f"{wrong!r:.40}": lambda parent, key, wrong=wrong: parent.__setitem__(key, copy.deepcopy(wrong)),
        }
        what = rng.choices(list(changes), [1, 1, 1, 6])[0]
        yield f"{path}: {what}", mutated(data, path, changes[what])


def accepts_or_names(read: Callable[[], object], name: str, what: str) -> bool:
    """Whether `read` accepts the file. If not, its UserError is one line with the file's `name`."""
    try:
        read()
    except UserError as error:
        text = str(error)
        assert name in text and text.isprintable() and len(text) < 2000, what
        return False
    except Exception as error:
        raise AssertionError(what) from error
    return True


class Images:
    """Annotations, as far as a split needs them."""

    ids = ("a", "b", "c", "d")
    held_out = ()

    def __len__(self) -> int:
        return len(self.ids)


@pytest.fixture(scope="module")
def detector(tiny_detector):
    return tiny_detector()


@pytest.fixture(scope="module")
def formats(detector, tiny_config, tmp_path_factory):
    """By the name of a file: its valid content, and its reader. The files lie in the current folder."""
    config = config_io.to_dict(tiny_config())
    genotype = {
        **detector.space.smallest().to_dict(),
        "metrics": {"AP": 0.5},
        "supernet": {"path": "runs/tiny/supernet/last.pt", "sha256": "0" * 64},
        "config": config,
    }
    ms = dict.fromkeys(all_features(detector), 0.5)
    numbers = dict.fromkeys(("threads", "held_out", "nms_boxes"), 1)
    numbers |= dict.fromkeys(("error_median", "error_95", "nms_ms"), 0.5)
    numbers |= {"network": shared_parts(detector), "runtime": "torch", "tau": 0.9}
    table = LatencyTable("cpu", "a", torch="2", ms=ms, **numbers)
    trial = {"AP": 0.5, "AP50": 0.7}
    result = {"name": "found", "genotype": detector.space.smallest().to_dict(), "flops": 5, "params": 5}
    result |= dict.fromkeys(("inherited", "fine_tuned", "scratch"), trial)
    images = Images()
    arguments = cli.make_parser("", "").parse_args([])

    def read_genotype(path) -> None:
        content = read_genotype_file(path)
        detector.space.check(Genotype.from_dict(content))
        cli.CommandLine(arguments, "final").resolve(content.get("config"), f"the genotype file {path}")

    return {
        "best.json": (genotype, read_genotype),
        "pareto.json": ({"format": "pareto/1", "front": [genotype, genotype]}, read_genotype_files),
        "latency.json": ({"format": LATENCY, **dataclasses.asdict(table)}, lambda path: load_table(path, detector)),
        "result.json": (result, read_result),
        "split.json": (
            {"format": "split/1", "train": ["a", "b"], "search": ["c"]},
            lambda path: load_split(path, images),
        ),
    }


JSON_FILES = ["best.json", "pareto.json", "latency.json", "result.json", "split.json"]


@pytest.mark.parametrize("name", JSON_FILES)
def test_no_json_file_ends_in_a_traceback(name, formats, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, read = formats[name]
    path = tmp_path / name
    path.write_text(json.dumps(content))
    assert accepts_or_names(lambda: read(path), name, "as it is")
    accepted = 0
    for what, mutant in mutants(content, seed=len(name)):
        path.write_text(json.dumps(mutant))
        # A mistake of its configuration or its genotype names the key, which is in no other file.
        accepted += accepts_or_names(lambda: read(path), "" if name == "best.json" else name, what)
    assert accepted < MUTANTS / 2


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\xfe{",
        b"[" * 100_000,
        b'{"a": ' * 100_000,
        b"9" * 5000,
        b'{"format": NaN}',
        b"null",
        b"\x00" * 10,
        b'{"format": "genotype/1", "format": "pareto/1"}',
    ],
    ids=lambda text: str(text[:12]),
)
def test_no_text_ends_in_a_traceback(name, text, formats, tmp_path):
    path = tmp_path / name
    path.write_bytes(text)
    assert not accepts_or_names(lambda: formats[name][1](path), name, "text")


def test_a_key_that_stands_twice_is_refused_wherever_it_stands(formats, tmp_path):
    content, read = formats["best.json"]
    text = json.dumps(content)
    for key in ("image_size", "kernel", "sha256", "epochs"):
        path = tmp_path / "best.json"
        path.write_text(text.replace(f'"{key}":', f'"{key}": 3, "{key}":', 1))
        with pytest.raises(UserError, match=rf"best\.json: .*'{key}' stands there twice"):
            read(path)


@pytest.fixture(scope="module")
def payloads(detector, tiny_checkpoint, tiny_config):
    """The content of the checkpoints of a supernet and of a detector, and their readers."""
    supernet = {"format": checkpoint.FORMAT, "config": config_io.to_dict(tiny_config()), "epoch": 2, "batch": 0}
    supernet |= {"classes": ["cat", "dog", "eel"], "model": dict(detector.state_dict())}
    trained = checkpoint.read(tiny_checkpoint)
    return {"last.pt": (supernet, load_supernet), "best.pt": (trained, load_detector)}


@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_no_checkpoint_ends_in_a_traceback(name, payloads, tmp_path, monkeypatch):
    content, read = payloads[name]
    path = tmp_path / name
    plain = {key: value for key, value in content.items() if key != "model"}
    tried = [
        (what, {**m, "model": content["model"]} if isinstance(m, dict) else m) for what, m in mutants(plain, 3, 80)
    ]
    first = next(key for key, tensor in content["model"].items() if tensor.ndim == 4)
    wrong = [(what, {**content, "model": changed}) for what, changed in wrong_tensors(content["model"], first)]
    for payload in (tried[0][1], wrong[0][1]):  # through a file
        torch.save(payload, path)
        accepts_or_names(lambda: read(path), name, "in a file")
    accepted = 0
    for what, payload in [*tried, *wrong]:
        monkeypatch.setattr(checkpoint, "read_any", lambda *_, payload=payload: payload)
        accepted += accepts_or_names(lambda: read(path), name, what)
    assert accepted < 20


def wrong_tensors(weights: dict, name: str) -> Iterator[tuple[str, object]]:
    """Weights of which the tensor `name` is wrong in one way, and what are no weights at all."""
    tensor = weights[name]
    yield "missing", {key: value for key, value in weights.items() if key != name}
    for wrong in (
        *(tensor[:1], tensor.flatten(), tensor.to(torch.int32), tensor.to(torch.complex64), tensor.to_sparse()),
        *(tensor.new_tensor(0.0), tensor.new_zeros(0), tensor * float("nan"), None, 3, "x", [tensor], {"x": tensor}),
    ):
        yield str(wrong)[:60], {**weights, name: wrong}
    yield from (
        ("a list", [tensor]),
        ("nothing", {}),
        ("numbers for keys", {1: tensor}),
        ("no dict", 3),
        ("none", None),
    )


@pytest.mark.parametrize("own", [True, False])
def test_no_foreign_weights_end_in_a_traceback(own, payloads, tiny_config, tiny_detector, monkeypatch):
    """Those of torchvision and of this project, of which some layers are wrong; they name the file and the layer."""
    from torchvision.models import mobilenet_v2

    if own:
        content, _ = payloads["last.pt"]
        weights, wrap = content["model"], lambda model: {**content, "model": model}
        config = tiny_config(backbone__pretrained_path="weights.pth")
    else:
        torch.manual_seed(0)
        weights, wrap = mobilenet_v2().state_dict(), dict
        expansions, groups = "[1, 6, 6, 6, 6, 6, 6]", "[1, 2, 3, 4, 3, 3, 1]"
        changes = {
            "search_space__expansions": expansions,
            "search_space__num_cell_groups": groups,
            "search_space__schedule_cfg__depth_choice__value": "[[4, 1]]",
            "backbone__backbone_type": "mbv2_backbone",
            "backbone__mult_ratio": 1.0,
        }
        config = tiny_config(backbone__pretrained_path="weights.pth", **changes)
    network = tiny_detector() if own else tiny_detector(**changes)

    def accepts(content: object, what: str) -> bool:
        monkeypatch.setattr(pretrained, "read_source", lambda name: recognise(content, name))
        return accepts_or_names(lambda: load_pretrained(network, config, ["cat", "dog", "eel"]), "weights.pth", what)

    assert accepts(wrap(weights), "as it is")
    backbone = [name for name in weights if name.startswith(("backbone", "features")) and "num_batches" not in name]
    for name in random.Random(0).sample(backbone, 3):
        for what, changed in wrong_tensors(weights, name):
            if isinstance(changed, dict):
                accepts(wrap(changed), f"{name}: {what}")
    for odd in ([], 3, None, {"model": DEEP}, {"state_dict": {"model": {"net": {}}}}, {"x": torch.zeros(1)}, {1: 2}):
        assert not accepts(odd, f"{odd}"[:60])


def test_no_metadata_of_an_exported_file_ends_in_a_traceback(detector):
    content = {
        "classes": ["cat", "dog"],
        "category_ids": [1, 2],
        "genotype": detector.space.smallest().to_dict(),
        "image_size": 64,
        "postprocess": {},
        "epoch": 3,
    }

    def read(entries: dict) -> object:
        return check_metadata({"format": "detector/1", **entries}, "other.onnx")

    assert read({key: json.dumps(value) for key, value in content.items()}).image_size == 64
    for what, mutant in mutants(content, seed=1):
        if isinstance(mutant, dict):
            entries = {key: json.dumps(value) for key, value in mutant.items()}
            accepts_or_names(lambda entries=entries: read(entries), "other.onnx", what)
    for text in ("", "{", "[" * 100_000, "NaN"):
        entries = {key: json.dumps(value) for key, value in content.items()} | {"classes": text}
        assert not accepts_or_names(lambda entries=entries: read(entries), "other.onnx", text[:20])


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        ([torch.rand(1, 5, 4), torch.rand(1, 5), torch.full((1, 5), 7)], "finds labels above 2"),
        ([torch.rand(1, 5, 4), torch.rand(1, 3), torch.ones(1, 5)], "does not run on its pictures"),
        ([torch.rand(5), torch.rand(5)], "does not run on its pictures"),
    ],
)
def test_an_exported_file_that_answers_nonsense_is_named(outputs, words, monkeypatch):
    rules = {"postprocess": PostprocessConfig(), "thresholds": []}
    metadata = SimpleNamespace(classes=["cat", "dog"], category_ids=[1, 2], image_size=64, **rules)
    named = dict(zip(("boxes", "scores", "labels"), outputs, strict=False))
    monkeypatch.setattr(inference, "open_exported", lambda path: (metadata, lambda images: named))
    with pytest.raises(UserError, match=rf"other\.onnx: {words}"):
        inference.load("other.onnx").detect(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


def test_no_log_and_no_pointer_ends_in_a_traceback(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli.POINTER.parent.mkdir()
    pointers = {"supernet": "runs", "search": "runs"}
    for _, mutant in mutants(pointers, seed=2):
        cli.POINTER.write_text(json.dumps(mutant))
        cli.last_run("supernet")
    for text in ("[" * 100_000, '{"supernet": "' + "x" * 300 + '"}', "{", '{"supernet": "\\u0000"}'):
        cli.POINTER.write_text(text)
        assert cli.last_run("supernet") is None
    records = [
        {"kind": "train", "step": 1, "losses": {"class": 1.0}},
        {"kind": "eval", "step": 1, "networks": {"largest": {"AP": 0.5}}},
    ]
    log = tmp_path / "log.jsonl"
    lines = [json.dumps(mutant) for record in records for _, mutant in mutants(record, seed=4)]
    log.write_bytes("\n".join([*lines, "[" * 100_000, "\udcff"]).encode(errors="surrogateescape"))
    assert 0 < len(read_log(log)) < len(lines)
    plot_training(log, tmp_path / "curves.png", "AP")


# The configuration: every key, by --set and in a file.

SETTINGS = [".nan", "-.inf", "-1", "1e400", "9" * 400, "", "[]", "{}", "[[[[]]]]", "[-1, .nan]", "~", "010", "x: y"]


@pytest.mark.parametrize("section", [field.name for field in dataclasses.fields(Config)])
def test_no_value_of_a_key_ends_in_a_traceback(section):
    """A wrong value names its key, or the key that it contradicts."""
    tried = [*(("--set", text) for text in SETTINGS), *(("file", wrong) for wrong in WRONG)]
    for key in config_io.KEYS:
        if key.partition(".")[0] != section:
            continue
        for where, value in tried:

            def read(where=where, value=value, key=key) -> None:
                change = config_io.parse_override(f"{key}={value}") if where == "--set" else (key, value)
                config_io.validate(config_io.from_dict(config_io.with_changes({}, [change]), "mine.yaml"))

            named = "--set" if where == "--set" and value == "010" else section
            accepts_or_names(read, named if section != "head" else "", f"{key} {where} {value!r:.60}")


@pytest.mark.parametrize(
    "text",
    [
        "- 1",
        "3",
        "a: &a [x, x]\nb: &b [*a, *a, *a, *a]\nc: &c [*b, *b, *b, *b]\n" + "d: [" + "*c, " * 3_000 + "]",
        "&a a: *a",
        "data: !!python/object/apply:os.system ['true']",
        "seed: !!bool maybe",
        "seed: !!int ''",
        "seed: !!timestamp x",
        "seed: 010",
        "seed: 1:30",
        "final: {epochs: 3, epochs: 4}",
        "final:\n\tepochs: 3",
        "? [a]\n: b",
        "[" * 500,
        "a: " * 3,
        "name: \x07",
        "data: {classes: [no, yes]}",
        "1: 2",
        f"0x{'f' * 5000}: 1",
        "seed: 0x" + "f" * 5000,
        "%YAML 9.9\n---\n{}",
        "a: 1\n---\nb: 2",
    ],
    ids=lambda text: text[:20],
)
def test_no_yaml_ends_in_a_traceback(text, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert not accepts_or_names(lambda: config_io.validate(config_io.read_config(path)), "mine.yaml", text[:40])


def test_yaml_in_other_encodings_and_sizes(tmp_path):
    path = tmp_path / "mine.yaml"
    for encoding in ("utf-16", "utf-8-sig"):
        path.write_bytes("data: {classes: [кот]}".encode(encoding))
        assert config_io.read_config(path).data.classes == ["кот"]
    path.write_text(
        "supernet: &s {epochs: 3, lr_schedule: &l {warmup_steps: 2}}\nfinal: {<<: *s, lr_schedule: *l, epochs: 4}"
    )
    settings = config_io.read_config(path)
    assert (settings.supernet.epochs, settings.final.epochs, settings.final.lr_schedule.warmup_steps) == (3, 4, 2)
    for content in (b"# " + b"x" * 5_000_000, bytes(range(256)) * 10, b"\x80\x81"):
        path.write_bytes(content)
        assert not accepts_or_names(lambda: config_io.read_config(path), "mine.yaml", str(content[:9]))
