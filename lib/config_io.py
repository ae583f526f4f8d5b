"""Configurations from plain data and back: read, override, check, dump.

A configuration arrives as plain data (a YAML file, a checkpoint, a genotype file) and leaves as a `Config` whose types
and bounds were checked. Every error names the key by its dotted path, what was expected and what was found.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from lib.config import ChoiceSchedule, Config, SearchConfig, TrainConfig, ValueSchedule
from lib.errors import UserError, did_you_mean
from lib.plain import MOST_SHOWN, WrongKey, check, fail, hints_of, read_bytes, refuse_bomb, shown

# Keys of earlier versions that changed nothing about a network. Checkpoints and genotype files still hold them.
RETIRED_KEYS = ("search.racing", "final.distill", "supernet.distill.teacher", "supernet.distill.priors")
MOST_YAML = 1024**2  # bytes of a YAML file
MOST_MERGED = 1000  # keys of a section of it


def read_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file (None: defaults only), apply `key.path=value` overrides, check types and bounds."""
    data = read_yaml(Path(path)) if path is not None else {}
    changes = [parse_override(text) for text in overrides]
    return from_dict(with_changes(data, changes), str(path or ""), [key for key, _ in changes])


def from_dict(data: dict, source: str = "", overridden: Collection[str] = ()) -> Config:
    """Build a Config from plain data such as `to_dict` gives.

    `source`, the file that the data comes from, opens each error message, except where the key is one of `overridden`,
    which the user gave on the command line.
    """
    refuse_bomb(data, source or "configuration")
    data = copy.deepcopy(data)
    for key in RETIRED_KEYS:
        path, _, leaf = key.rpartition(".")
        section = get_key(data, path)
        if isinstance(section, dict):
            section.pop(leaf, None)
    try:
        return _section(data, Config(), "")
    except WrongKey as error:
        typed = any(_is_part_of(error.key, key) for key in overridden)
        raise UserError(f"{source}: {error}" if source and not typed else str(error)) from None


def _is_part_of(key: str, other: str) -> bool:
    """Whether one of two dotted paths leads to the other; a very long one may have been cut."""
    shorter, longer = sorted((key, other[:MOST_SHOWN]), key=len)
    return longer.startswith(shorter) and longer[len(shorter) : len(shorter) + 1] in ("", ".", "[")


def to_dict(config: Config) -> dict:
    """Plain data; `from_dict` is its inverse."""
    return asdict(config)


def dump(config: Config) -> str:
    """The resolved configuration as YAML, in the order of the dataclasses."""
    return yaml.safe_dump(asdict(config), sort_keys=False, default_flow_style=None, width=120)


class _StrictLoader(yaml.SafeLoader):
    """YAML without what it silently turns into something else: keys given twice, 010 (8), 1:30 (90), alias bombs."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is not None and key in seen:
                line = key_node.start_mark.line + 1
                raise yaml.YAMLError(f"the key '{key}' stands there twice, again in line {line}")
            seen.add(key)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MOST_MERGED:  # merge keys of merge keys grow exponentially
            raise yaml.YAMLError(f"more than {MOST_MERGED} keys in a section")

    def construct_number(self, node: yaml.ScalarNode) -> float:
        if re.match(r"[-+]?(0[0-9]+|[0-9:]*:[0-9.]*)$", node.value.replace("_", "")):
            raise yaml.YAMLError(f"{node.value} is octal or sexagesimal in YAML: write a plain number, or quote a text")
        return self.construct_yaml_int(node) if node.tag.endswith("int") else self.construct_yaml_float(node)


for tag in ("int", "float"):
    _StrictLoader.add_constructor(f"tag:yaml.org,2002:{tag}", _StrictLoader.construct_number)


def _parse_yaml(content: str | bytes, source: str) -> object:
    """The plain data of YAML. Raises UserError that begins with `source`."""
    try:
        return yaml.load(content, Loader=_StrictLoader)
    except Exception as error:  # PyYAML raises anything on a damaged scalar, such as !!bool maybe
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        mark = getattr(error, "problem_mark", None)
        place = f" in line {mark.line + 1}" if mark else ""
        raise UserError(f"{source}: not valid YAML: {reason}{place}") from None


def read_yaml(path: Path) -> dict:
    """The plain data of a YAML file, whose `name` defaults to the file's. Raises UserError that names the file."""
    if not path.exists():
        found = sorted(str(p) for p in Path(path.parent).glob("*.yaml"))
        raise UserError(f"{path}: no such configuration file{did_you_mean(path, found)}")
    # As bytes: YAML says itself how to tell UTF-8 from UTF-16.
    data = _parse_yaml(read_bytes(path, MOST_YAML), str(path))
    # A file without any key, or with comments only, is a valid one.
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected keys and values, found {type(data).__name__}")
    refuse_bomb(data, str(path))
    data["name"] = data.get("name") or path.stem
    return data


def parse_override(override: str) -> tuple[str, object]:
    """`key.path=value` as key and value. The value of a key that holds text is taken as typed, any other is YAML."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserError(f"--set {override}: expected key.path=value, e.g. supernet.epochs=10")
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if key in TEXT_KEYS and not quoted:
        return key, text
    value = _parse_yaml(text, f"--set {override[:MOST_SHOWN]}") if text.strip() else ""
    refuse_bomb(value, f"--set {override[:MOST_SHOWN]}")
    return key, value


def with_changes(data: dict, changes: Iterable[tuple[str, object]]) -> dict:
    """A copy of plain configuration data with the values of some dotted keys set."""
    data = copy.deepcopy(data)
    for key, value in changes:
        *path, leaf = key.split(".")
        node = data
        for part in path:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise UserError(f"--set {key}: '{part}' is a value, not a section")
        node[leaf] = value
    return data


def get_key(data: object, key: str) -> object | None:
    """The value of a dotted `key` in plain configuration data; None where it is not given."""
    for part in key.split("."):
        data = data.get(part) if isinstance(data, dict) else None
    return data


# Plain data to typed dataclasses.


def leaf_types(kind: type, prefix: str = "") -> dict[str, Any]:
    """The annotated type of every key of a dataclass of dataclasses, by dotted path, aliases among them."""
    hints = hints_of(kind)
    types_by_path = {}
    for f in fields(kind):
        if is_dataclass(hints[f.name]):
            types_by_path |= leaf_types(hints[f.name], f"{prefix}{f.name}.")
        else:
            types_by_path |= {prefix + name: hints[f.name] for name in (f.name, *f.metadata.values())}
    return types_by_path


KEYS = leaf_types(Config)
TEXT_KEYS = {path for path, kind in KEYS.items() if kind is str}


def _section(value: Any, default: Any, path: str) -> Any:
    """`default`, an instance of a dataclass, with the keys of `value` set."""
    if not isinstance(value, Mapping):
        fail(path, "a section with keys", shown(value))
    hints = hints_of(type(default))
    names = {f.name: f.name for f in fields(default)}
    names |= {f.metadata["alias"]: f.name for f in fields(default) if "alias" in f.metadata}
    prefix = f"{path}." if path else ""
    values = {}
    for key, item in value.items():
        if not isinstance(key, str):
            fail(path, "keys that are text", shown(key))
        where = f"{prefix}{key}"
        if key not in names:
            # The same key in another section is a better hint than a similar one in this section.
            elsewhere = [known for known in KEYS if known.rpartition(".")[2] == key]
            nearest = did_you_mean(where[:MOST_SHOWN], [prefix + name for name in hints])
            hint = f" (did you mean '{elsewhere[0]}'?)" if elsewhere else nearest
            raise WrongKey(where[:MOST_SHOWN], f"unknown key{hint}")
        name = names[key]
        if is_dataclass(hints[name]):
            values[name] = _section(item, getattr(default, name), where)
        else:
            values[name] = check(item, hints[name], where)
    return replace(default, **values)


# What types and bounds cannot say: values that contradict each other, or that no backbone can serve.


def validate(config: Config) -> None:
    """Raise UserError for the first contradiction between keys, naming the key and what was expected."""
    validate_structure(config)
    _check_search(config.search)
    for key, training in (("supernet", config.supernet), ("final", config.final)):
        _check_rate(f"{key}.lr_schedule", training)
    portion = config.data.data_portion
    if len(portion) != 2 or not min(portion) > 0 or sum(portion) > 1 + 1e-9:
        fail("data.data_portion", "two shares above 0 that sum to at most 1, for training and for scoring", portion)
    if len(set(config.data.classes)) < len(config.data.classes) or "" in config.data.classes:
        fail("data.classes", "names, each once", shown(config.data.classes))
    if config.loss.unmatched_threshold > config.loss.matched_threshold:
        fail("loss.unmatched_threshold", "at most loss.matched_threshold", config.loss.unmatched_threshold)


def validate_structure(config: Config) -> None:
    """The part of `validate` that a network can be built by."""
    schedule = config.search_space.schedule_cfg
    _check_schedule("search_space.schedule_cfg.kernel_choice", schedule.kernel_choice)
    _check_schedule("search_space.schedule_cfg.width_choice", schedule.width_choice)
    _check_schedule("search_space.schedule_cfg.depth_choice", schedule.depth_choice)
    _check_schedule("supernet.distill.weight", config.supernet.distill.weight)
    _check_space(config)
    _check_feature_maps(config)


def _check_schedule(key: str, schedule: ChoiceSchedule | ValueSchedule) -> None:
    boundary, value = schedule.boundary, schedule.value
    if len(boundary) != len(value):
        fail(key, "as many values as boundaries", f"{len(boundary)} boundaries and {len(value)} values")
    if not boundary or boundary[0] != 1 or any(a >= b for a, b in itertools.pairwise(boundary)):
        fail(f"{key}.boundary", "ascending epochs that begin with 1", boundary)
    if isinstance(schedule, ChoiceSchedule) and not all(value):
        fail(f"{key}.value", "at least one choice at every boundary", value)


def fit_schedules(config: Config, stage: str, planned: int, typed: Collection[str]) -> list[str]:
    """Bring what begins after the last epoch of `stage` ("supernet" or "final") before it, and say so.

    A schedule for `planned` epochs keeps its proportions; of boundaries that coincide, the last one counts. Raises
    UserError if it does not fit these either, or is among the keys that the user gave, `typed`.
    """
    settings = getattr(config, stage)
    choices = vars(config.search_space.schedule_cfg) if stage == "supernet" else {}
    schedules = {f"search_space.schedule_cfg.{name}": choice for name, choice in choices.items()}
    if stage == "supernet":
        schedules["supernet.distill.weight"] = settings.distill.weight
    rate, rate_key = settings.lr_schedule, f"{stage}.lr_schedule.milestones"
    begins = {f"{key}.boundary": schedule.boundary for key, schedule in schedules.items()}
    begins |= {rate_key: rate.milestones} if rate.type == "multistep" else {}
    late = next((key for key, epochs in begins.items() if max(epochs, default=0) > settings.epochs), None)
    if late is None:
        return []
    given = any(_is_part_of(key, other) for key in typed for other in begins)
    if given or planned <= settings.epochs or max(itertools.chain(*begins.values())) > planned:
        fail(late, f"epochs up to {stage}.epochs, which is {settings.epochs}", begins[late])
    factor = settings.epochs / planned
    for schedule in schedules.values():
        moved = {1 + int((b - 1) * factor): v for b, v in zip(schedule.boundary, schedule.value, strict=True)}
        schedule.boundary, schedule.value = list(moved), list(moved.values())
    rate.milestones = sorted({max(1, int(milestone * factor)) for milestone in rate.milestones})
    if isinstance(rate.T_0, int):
        rate.T_0 = max(1, round(rate.T_0 * factor))
    return [f"note: {late} is for {planned} epochs; this and all other schedules are scaled to {settings.epochs}"]


def _check_space(config: Config) -> None:
    """Settings for each stage of the backbone, and choices that some of its blocks can serve."""
    space = config.search_space
    stages = len(space.num_cell_groups)
    if not stages:
        fail("search_space.num_cell_groups", "the number of blocks of each stage", "none")
    _check_length("search_space.expansions", space.expansions, stages, "one per stage")
    if config.backbone.kernels:
        _check_length("backbone.kernels", config.backbone.kernels, stages, "one per stage")

    # Whole numbers only: 7.0 equals 7, but a genotype with it would be written and keyed differently.
    key = "search_space.schedule_cfg"
    largest_kernel = max(config.backbone.kernels, default=7)
    kernels = [kernel for kernel in (3, 5, 7) if kernel <= largest_kernel]
    for kernel in itertools.chain(*space.schedule_cfg.kernel_choice.value):
        if kernel not in kernels or not isinstance(kernel, int):
            fail(f"{key}.kernel_choice.value", f"kernels out of {kernels}, which the backbone can serve", kernel)
    widest = max(space.expansions)
    for width in itertools.chain(*space.schedule_cfg.width_choice.value):
        if not 0.125 <= width <= widest:
            expected = f"choices from 0.125 to {widest:g} (expansion of the widest stage)"
            fail(f"{key}.width_choice.value", expected, width)
    deepest = max(space.num_cell_groups)
    for depth in itertools.chain(*space.schedule_cfg.depth_choice.value):
        if not 1 <= depth <= deepest or not isinstance(depth, int):
            expected = f"integers from 1 to {deepest} (blocks of the deepest stage)"
            fail(f"{key}.depth_choice.value", expected, depth)
    for name in ("image_size_choice", "head_width_choice", "head_kernel_choice"):
        choices = getattr(space, name)
        if not choices or len(set(choices)) < len(choices):
            fail(f"search_space.{name}", "at least one choice, each once", choices or "none")


def _check_feature_maps(config: Config) -> None:
    """As many extra blocks, lists of aspect ratios and scales as there are feature maps."""
    extras = config.search_space.num_head
    maps = len(config.backbone.feature_levels) + extras
    if not config.backbone.feature_levels:
        fail("backbone.feature_levels", "at least one level", "none")
    _check_length("head.channels", config.head.channels, extras, "one per extra block (search_space.num_head)")
    _check_length("head.aspect_ratios", config.head.aspect_ratios, maps, "one per feature map")
    if not config.head.squares and not all(config.head.aspect_ratios):
        fail(
            "head.aspect_ratios", "a ratio for each feature map, since head.squares is false", config.head.aspect_ratios
        )
    _check_length("head.scales", config.head.scales, maps + 1, "one per feature map and one more")
    _check_length("head.variances", config.head.variances, 2, "for centres and sizes")
    _check_length("backbone.pixel_mean", config.backbone.pixel_mean, 3, "one per colour")
    _check_length("backbone.pixel_std", config.backbone.pixel_std, 3, "one per colour")


def _check_length(key: str, values: Sequence, expected: int, why: str) -> None:
    if len(values) != expected:
        fail(key, f"{expected} values, {why}", f"{len(values)}")


def _check_rate(key: str, config: TrainConfig) -> None:
    schedule = config.lr_schedule
    if schedule.type == "multistep" and schedule.milestones != sorted(set(schedule.milestones)):
        fail(f"{key}.milestones", "ascending epochs", schedule.milestones)
    if schedule.type.startswith("cosine") and schedule.eta_min > config.learning_rate:
        fail(f"{key}.eta_min", f"at most the learning rate, {config.learning_rate:g}", schedule.eta_min)


def _check_search(config: SearchConfig) -> None:
    for low_key, low, high_key, high in (
        ("search.min_flops", config.min_flops, "search.max_flops", config.max_flops),
        ("search.min_params", config.min_params, "search.max_params", config.max_params),
        ("search.min_latency_ms", config.min_latency_ms, "search.max_latency_ms", config.max_latency_ms),
    ):
        if 0 < high < low:
            fail(low_key, f"at most {high_key}, which is {high:g}", low)
    if not config.costs or len(set(config.costs)) < len(config.costs):
        fail("search.costs", "at least one cost, each once", config.costs or "none")
    if config.controller == "evo" and config.tournament_size > config.population_size:
        expected = f"at most search.population_size, which is {config.population_size}"
        fail("search.tournament_size", expected, config.tournament_size)
    if 0 < config.resamples < 40:
        fail("search.resamples", "0 or at least 40, since intervals leave out 1 in 40", config.resamples)
    if 0 < config.time_limit < 2:
        fail("search.time_limit", "0 or at least 2", config.time_limit)


def validate_network(config: Config, trained: Config, sections: Sequence[str], path: Path) -> None:
    """Raise UserError where `sections` of `config` describe another network than that of the supernet in `path`.

    Where its weights came from once does not matter.
    """
    for section in sections:
        ours, theirs = (asdict(getattr(settings, section)) for settings in (config, trained))
        for key in ours:
            if ours[key] != theirs[key] and key not in ("pretrained_path", "pretrained_head"):
                expected = f"{theirs[key]} as in the supernet {path} (--load names another one)"
                fail(f"{section}.{key}", expected, ours[key])


def validate_shares(key: str, config: TrainConfig, processes: int) -> None:
    """Every process has the same share of a batch, and BatchNorm needs two images. `key` is the stage's section."""
    if config.batch_size % processes:
        fail(f"{key}.batch_size", f"a multiple of the {processes} processes", config.batch_size)
    if not config.sync_batch_norm and config.batch_size < 2 * processes:
        expected = f"at least 2 images for each of the {processes} processes, or {key}.sync_batch_norm"
        fail(f"{key}.batch_size", expected, config.batch_size)
