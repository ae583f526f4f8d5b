"""Configurations from plain data and back: read, override, check, dump.

A configuration arrives as plain data (a YAML file, a checkpoint, a genotype file) and leaves as a `Config` whose types
and bounds were checked. Every error names the key by its dotted path, what was expected and what was found.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import types
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import yaml

from lib.config import ChoiceSchedule, Config, SearchConfig, TrainConfig, ValueSchedule
from lib.errors import UserError, did_you_mean

# Keys of earlier versions that changed nothing about a network. Checkpoints and genotype files still hold them.
RETIRED_KEYS = ("search.racing", "final.distill", "supernet.distill.teacher", "supernet.distill.priors")
MOST_SHOWN = 80  # characters of a wrong value in an error message


class WrongKey(UserError):
    """A value of the wrong type or out of bounds; `key` is its dotted path."""

    def __init__(self, key: str, message: str):
        super().__init__(f"{key}: {message}" if key else message)
        self.key = key


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
    data = copy.deepcopy(data)
    for key in RETIRED_KEYS:
        path, _, leaf = key.rpartition(".")
        section = get_key(data, path)
        if isinstance(section, dict):
            section.pop(leaf, None)
    try:
        return _section(data, Config(), "")
    except WrongKey as error:
        typed = any(error.key == key or error.key.startswith((f"{key}.", f"{key}[")) for key in overridden)
        raise UserError(f"{source}: {error}" if source and not typed else str(error)) from None


def to_dict(config: Config) -> dict:
    """Plain data; `from_dict` is its inverse."""
    return asdict(config)


def dump(config: Config) -> str:
    """The resolved configuration as YAML, in the order of the dataclasses."""
    return yaml.safe_dump(asdict(config), sort_keys=False, default_flow_style=None, width=120)


class _UniqueKeys(yaml.SafeLoader):
    """YAML lets a later section of the same name replace an earlier one without a word. This loader refuses it."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is not None and key in seen:
                line = key_node.start_mark.line + 1
                raise yaml.YAMLError(f"the key '{key}' stands there twice, again in line {line}")
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict:
    """The plain data of a YAML file, whose `name` defaults to the file's. Raises UserError that names the file."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except FileNotFoundError:
        found = sorted(str(p) for p in Path(path.parent).glob("*.yaml"))
        raise UserError(f"{path}: no such configuration file{did_you_mean(path, found)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())[:300]}") from None
    # A file without any key, or with comments only, is a valid one.
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected keys and values, found {type(data).__name__}")
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
    try:
        return key, yaml.load(text, Loader=_UniqueKeys) if text.strip() else ""
    except (yaml.YAMLError, ValueError, RecursionError):
        raise UserError(f"--set {override[:MOST_SHOWN]}: the value is not valid YAML") from None


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
    hints = typing.get_type_hints(kind, include_extras=True)
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
        _fail(path, "a section with keys", _shown(value))
    hints = typing.get_type_hints(type(default), include_extras=True)
    names = {f.name: f.name for f in fields(default)}
    names |= {f.metadata["alias"]: f.name for f in fields(default) if "alias" in f.metadata}
    prefix = f"{path}." if path else ""
    values = {}
    for key, item in value.items():
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
            values[name] = _convert(item, hints[name], where)
    return replace(default, **values)


def _convert(value: Any, kind: Any, path: str) -> Any:
    """`value` as the annotated type `kind`. Raises UserError that names `path`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        number, bounds = _convert(value, arguments[0], path), arguments[1]
        if not bounds.low <= number <= bounds.high:
            _fail(path, _describe(kind), _shown(number))
        return number
    if origin is list:
        if not isinstance(value, list):
            _fail(path, "a list", _shown(value))
        return [_convert(item, arguments[0], f"{path}[{i}]") for i, item in enumerate(value)]
    if origin is Literal:
        # Not `in`: True equals 1 and 3.0 equals 3, and neither is what the key means.
        if not any(value == option and type(value) is type(option) for option in arguments):
            _fail(path, f"one of {', '.join(map(str, arguments))}", _shown(value))
        return value
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            with contextlib.suppress(UserError):
                return _convert(value, option, path)
        _fail(path, _describe(kind), _shown(value))
    return _scalar(value, kind, path)


def _scalar(value: Any, kind: type, path: str) -> Any:
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-4 as a string
        with contextlib.suppress(ValueError):
            value = float(value)
    accepted = (int, float) if kind is float else kind  # a whole number stays one: expand ratio 6 is not 6.0
    fits = isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))
    if not fits or (isinstance(value, float) and not math.isfinite(value)):
        _fail(path, _describe(kind) + (", in quotes" if kind is str else ""), _shown(value))
    return value


def _describe(kind: Any) -> str:
    """A type in words: `an integer of at least 1`, `a number from 0 to 1`."""
    if typing.get_origin(kind) is Annotated:
        base, bounds = typing.get_args(kind)
        if 0 < bounds.low < 1e-9:
            return f"{_describe(base)} above 0"
        if bounds.high == math.inf:
            return f"{_describe(base)} of at least {bounds.low:g}"
        below = "below " if 0 < 1 - bounds.high < 1e-9 else ""
        return f"{_describe(base)} from {bounds.low:g} to {below}{bounds.high:g}"
    names = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
    if kind in names:
        return names[kind]
    if typing.get_origin(kind) is Literal:
        return " or ".join(repr(option) for option in typing.get_args(kind))
    return " or ".join(_describe(option) for option in typing.get_args(kind))


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def _fail(key: str, expected: str, found: object) -> NoReturn:
    raise WrongKey(key, f"expected {expected}, found {found}")


# What types and bounds cannot say: values that contradict each other, or that no backbone can serve.


def validate(config: Config) -> None:
    """Raise UserError for the first contradiction between keys, naming the key and what was expected."""
    schedule = config.search_space.schedule_cfg
    _check_schedule("search_space.schedule_cfg.kernel_choice", schedule.kernel_choice)
    _check_schedule("search_space.schedule_cfg.width_choice", schedule.width_choice)
    _check_schedule("search_space.schedule_cfg.depth_choice", schedule.depth_choice)
    _check_schedule("supernet.distill.weight", config.supernet.distill.weight)
    _check_space(config)
    _check_feature_maps(config)
    _check_search(config.search)
    portion = config.data.data_portion
    if len(portion) != 2 or not min(portion) > 0 or sum(portion) > 1 + 1e-9:
        _fail("data.data_portion", "two shares above 0 that sum to at most 1, for training and for scoring", portion)
    if config.loss.unmatched_threshold > config.loss.matched_threshold:
        _fail("loss.unmatched_threshold", "at most loss.matched_threshold", config.loss.unmatched_threshold)


def _check_schedule(key: str, schedule: ChoiceSchedule | ValueSchedule) -> None:
    boundary, value = schedule.boundary, schedule.value
    if len(boundary) != len(value):
        _fail(key, "as many values as boundaries", f"{len(boundary)} boundaries and {len(value)} values")
    if not boundary or boundary[0] != 1 or any(a >= b for a, b in itertools.pairwise(boundary)):
        _fail(f"{key}.boundary", "ascending epochs that begin with 1", boundary)
    if isinstance(schedule, ChoiceSchedule) and not all(value):
        _fail(f"{key}.value", "at least one choice at every boundary", value)


def _check_space(config: Config) -> None:
    """Settings for each stage of the backbone, and choices that some of its blocks can serve."""
    space = config.search_space
    stages = len(space.num_cell_groups)
    if not stages:
        _fail("search_space.num_cell_groups", "the number of blocks of each stage", "none")
    _check_length("search_space.expansions", space.expansions, stages, "one per stage")
    if config.backbone.kernels:
        _check_length("backbone.kernels", config.backbone.kernels, stages, "one per stage")

    # Whole numbers only: 7.0 equals 7, but a genotype with it would be written and keyed differently.
    key = "search_space.schedule_cfg"
    largest_kernel = max(config.backbone.kernels, default=7)
    kernels = [kernel for kernel in (3, 5, 7) if kernel <= largest_kernel]
    for kernel in itertools.chain(*space.schedule_cfg.kernel_choice.value):
        if kernel not in kernels or not isinstance(kernel, int):
            _fail(f"{key}.kernel_choice.value", f"kernels out of {kernels}, which the backbone can serve", kernel)
    widest = max(space.expansions)
    for width in itertools.chain(*space.schedule_cfg.width_choice.value):
        if not 0.125 <= width <= widest:
            expected = f"choices from 0.125 to {widest:g} (expansion of the widest stage)"
            _fail(f"{key}.width_choice.value", expected, width)
    deepest = max(space.num_cell_groups)
    for depth in itertools.chain(*space.schedule_cfg.depth_choice.value):
        if not 1 <= depth <= deepest or not isinstance(depth, int):
            expected = f"integers from 1 to {deepest} (blocks of the deepest stage)"
            _fail(f"{key}.depth_choice.value", expected, depth)
    for name in ("image_size_choice", "head_width_choice", "head_kernel_choice"):
        if not getattr(space, name):
            _fail(f"search_space.{name}", "at least one choice", "none")


def _check_feature_maps(config: Config) -> None:
    """As many extra blocks, lists of aspect ratios and scales as there are feature maps."""
    extras = config.search_space.num_head
    maps = len(config.backbone.feature_levels) + extras
    _check_length("head.channels", config.head.channels, extras, "one per extra block (search_space.num_head)")
    _check_length("head.aspect_ratios", config.head.aspect_ratios, maps, "one per feature map")
    _check_length("head.scales", config.head.scales, maps + 1, "one per feature map and one more")
    _check_length("head.variances", config.head.variances, 2, "for centres and sizes")
    _check_length("backbone.pixel_mean", config.backbone.pixel_mean, 3, "one per colour")
    _check_length("backbone.pixel_std", config.backbone.pixel_std, 3, "one per colour")


def _check_length(key: str, values: Sequence, expected: int, why: str) -> None:
    if len(values) != expected:
        _fail(key, f"{expected} values, {why}", f"{len(values)}")


def _check_search(config: SearchConfig) -> None:
    for low_key, low, high_key, high in (
        ("search.min_flops", config.min_flops, "search.max_flops", config.max_flops),
        ("search.min_params", config.min_params, "search.max_params", config.max_params),
        ("search.min_latency_ms", config.min_latency_ms, "search.max_latency_ms", config.max_latency_ms),
    ):
        if 0 < high < low:
            _fail(low_key, f"at most {high_key}, which is {high:g}", low)
    if not config.costs:
        _fail("search.costs", "at least one cost", "none")
    if 0 < config.resamples < 40:
        _fail("search.resamples", "0 or at least 40, since intervals leave out 1 in 40", config.resamples)
    if 0 < config.time_limit < 2:
        _fail("search.time_limit", "0 or at least 2", config.time_limit)


def validate_network(config: Config, trained: Config, sections: Sequence[str], path: Path) -> None:
    """Raise UserError where `sections` of `config` describe another network than that of the supernet in `path`.

    Where its weights came from once does not matter.
    """
    for section in sections:
        ours, theirs = (asdict(getattr(settings, section)) for settings in (config, trained))
        for key in ours:
            if ours[key] != theirs[key] and key not in ("pretrained_path", "pretrained_head"):
                expected = f"{theirs[key]} as in the supernet {path} (--load names another one)"
                _fail(f"{section}.{key}", expected, ours[key])


def validate_shares(key: str, config: TrainConfig, processes: int) -> None:
    """Every process has the same share of a batch, and BatchNorm needs two images. `key` is the stage's section."""
    if config.batch_size % processes:
        _fail(f"{key}.batch_size", f"a multiple of the {processes} processes", config.batch_size)
    if not config.sync_batch_norm and config.batch_size < 2 * processes:
        expected = f"at least 2 images for each of the {processes} processes, or {key}.sync_batch_norm"
        _fail(f"{key}.batch_size", expected, config.batch_size)
