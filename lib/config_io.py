"""Plain data to typed dataclasses: unknown keys and wrong types are errors that name the key's dotted path.

What types cannot say: values of a configuration that contradict each other or that no backbone can serve.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from lib.config import ChoiceSchedule, Config, SearchConfig, TrainConfig, ValueSchedule
from lib.errors import UserError, did_you_mean


def read_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file (None: defaults only), apply `key.path=value` overrides, check types. Raises UserError."""
    data: dict = {}
    if path is not None:
        data = read_yaml(Path(path))
        data["name"] = data.get("name") or Path(path).stem
    return from_dict(with_overrides(data, overrides), str(path) if path else "configuration")


def from_dict(data: dict, source: str = "configuration") -> Config:
    """Build a Config from plain data such as `to_dict` gives. `source` opens each error message."""
    try:
        return build(Config, data)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def to_dict(config: Config) -> dict:
    return asdict(config)


def dump(config: Config) -> str:
    """The resolved configuration as YAML, in the order of the dataclasses."""
    return yaml.safe_dump(asdict(config), sort_keys=False, default_flow_style=None, width=120)


def read_yaml(path: Path) -> dict:
    """The plain data of a YAML file. Raises UserError that names it."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        found = sorted(str(p) for p in Path(path.parent).glob("*.yaml"))
        raise UserError(f"{path}: no such configuration file{did_you_mean(path, found)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected keys and values, found {type(data).__name__}")
    return data


def with_overrides(data: dict, overrides: Sequence[str]) -> dict:
    """A copy of plain configuration data with `key.path=value` applied."""
    data = copy.deepcopy(data)
    for override in overrides:
        _apply_override(data, override)
    return data


def _apply_override(data: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {override}: expected key.path=value, e.g. supernet.epochs=10")
    try:
        value = yaml.safe_load(text) if text.strip() else ""
    except yaml.YAMLError:
        raise UserError(f"--set {override}: the value is not valid YAML") from None
    *path, leaf = key.strip().split(".")
    node = data
    for part in path:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise UserError(f"--set {override}: '{part}' is a value, not a section")
    node[leaf] = value


T = TypeVar("T")


def build(kind: type[T], data: object) -> T:
    """`data` (dicts, lists, scalars) as the dataclass `kind`, whose defaults fill in what `data` lacks.

    A field's metadata may give one `alias` for its name.
    """
    return _Builder(kind).section(data, kind(), "")


def leaf_paths(kind: type, prefix: str = "") -> list[str]:
    """Every key of a dataclass of dataclasses as a dotted path, aliases among them."""
    hints = typing.get_type_hints(kind)
    paths = []
    for f in fields(kind):
        if is_dataclass(hints[f.name]):
            paths += leaf_paths(hints[f.name], f"{prefix}{f.name}.")
        else:
            paths += [prefix + name for name in (f.name, *f.metadata.values())]
    return paths


class _Builder:
    """Converts values; knows the whole tree of keys, to suggest the right one."""

    def __init__(self, root: type):
        self.paths = leaf_paths(root)

    def section(self, value: Any, default: Any, path: str) -> Any:
        """`default`, an instance of a dataclass, with the keys of `value` set."""
        if not isinstance(value, Mapping):
            raise UserError(f"{path or 'configuration'}: expected a section with keys, found {value!r}")
        kind = type(default)
        hints = typing.get_type_hints(kind)
        names = {f.metadata.get("alias", f.name): f.name for f in fields(kind)} | {f.name: f.name for f in fields(kind)}
        prefix = f"{path}." if path else ""
        values = {}
        for key, item in value.items():
            if key not in names:
                raise UserError(f"{prefix}{key}: unknown key{self._nearest(str(key), prefix, hints)}")
            name, where = names[key], f"{prefix}{key}"
            if is_dataclass(hints[name]):
                values[name] = self.section(item, getattr(default, name), where)
            else:
                values[name] = self.convert(item, hints[name], where)
        return replace(default, **values)

    def _nearest(self, key: str, prefix: str, names: Mapping[str, Any]) -> str:
        """A hint: the same leaf elsewhere in the tree, else the nearest key of this section."""
        elsewhere = [path for path in self.paths if path.rsplit(".", 1)[-1] == key]
        if elsewhere:
            return f" (did you mean '{elsewhere[0]}'?)"
        return did_you_mean(prefix + key, [prefix + name for name in names])

    def convert(self, value: Any, kind: Any, path: str) -> Any:
        """`value` as the annotated type `kind`, or UserError naming `path`."""
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if origin is list:
            if not isinstance(value, list):
                raise UserError(f"{path}: expected a list, found {value!r}")
            return [self.convert(v, arguments[0], f"{path}[{i}]") for i, v in enumerate(value)]
        if origin is Literal:
            if value not in arguments:
                raise UserError(f"{path}: expected one of {', '.join(map(str, arguments))}, found {value!r}")
            return value
        if origin in (typing.Union, types.UnionType):
            for option in arguments:
                with contextlib.suppress(UserError):
                    return self.convert(value, option, path)
            raise UserError(f"{path}: expected {' or '.join(map(_describe, arguments))}, found {value!r}")
        return _scalar(value, kind, path)


def _scalar(value: Any, kind: type, path: str) -> Any:
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-4 as a string
        with contextlib.suppress(ValueError):
            value = float(value)
    accepted = (int, float) if kind is float else kind  # a whole number stays one: expand ratio 6 is not 6.0
    if isinstance(value, accepted) and (kind is bool or not isinstance(value, bool)):
        return value
    raise UserError(f"{path}: expected {_describe(kind)}, found {value!r}")


def _describe(kind: Any) -> str:
    names = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
    return names.get(kind) or " or ".join(map(repr, typing.get_args(kind)))


def validate(config: Config) -> None:
    """Raise UserError for the first contradiction, naming its key and what was expected."""
    space = config.search_space
    schedules = vars(space.schedule_cfg)
    for name, schedule in schedules.items():
        _check_schedule(f"search_space.schedule_cfg.{name}", schedule)
    _check_choices(config)
    _check_maps(config)
    for name in ("supernet", "final"):
        _check_schedule(f"{name}.distill.weight", getattr(config, name).distill.weight)
        _check_training(name, getattr(config, name))
    for name in ("num_epochs", "steps", "population_size", "tournament_size", "batch_size", "bn_images"):
        _at_least(f"search.{name}", getattr(config.search, name), 1)
    _check_budgets(config.search)
    if config.search.resamples and config.search.resamples < 40:
        _fail("search.resamples", "0 or at least 40, since intervals leave out 1 in 40", config.search.resamples)
    if config.search.time_limit and config.search.time_limit < 2:
        _fail("search.time_limit", "0 or at least 2", config.search.time_limit)
    for name in ("top_k", "pre_nms_top_k"):
        _at_least(f"postprocess.{name}", getattr(config.postprocess, name), 1)
    _at_least("supernet.samples", config.supernet.samples, 1)
    _at_least("data.workers", config.data.workers, 0)
    _check_portion(config.data.data_portion)
    if config.loss.unmatched_threshold > config.loss.matched_threshold:
        _fail("loss.unmatched_threshold", "at most loss.matched_threshold", config.loss.unmatched_threshold)


def _fail(key: str, expected: str, found: object) -> None:
    raise UserError(f"{key}: expected {expected}, found {found}")


def _at_least(key: str, value: float, minimum: float) -> None:
    if value < minimum:
        _fail(key, f"at least {minimum}", value)


def _check_schedule(key: str, schedule: ChoiceSchedule | ValueSchedule) -> None:
    boundary, value = schedule.boundary, schedule.value
    if len(boundary) != len(value):
        _fail(key, "as many values as boundaries", f"{len(boundary)} boundaries and {len(value)} values")
    if not boundary or boundary[0] != 1 or any(a >= b for a, b in itertools.pairwise(boundary)):
        _fail(f"{key}.boundary", "ascending epochs that begin with 1", boundary)
    if isinstance(schedule, ChoiceSchedule) and not all(value):
        _fail(f"{key}.value", "at least one choice at every boundary", value)


def _check_choices(config: Config) -> None:
    space = config.search_space
    if not space.num_cell_groups:
        _fail("search_space.num_cell_groups", "the number of blocks of each stage", "none")
    for blocks in space.num_cell_groups:
        _at_least("search_space.num_cell_groups", blocks, 1)
    for expansion in space.expansions:
        _at_least("search_space.expansions", expansion, 1)
    if len(space.expansions) != len(space.num_cell_groups):
        _fail("search_space.expansions", f"{len(space.num_cell_groups)} values, one per stage", space.expansions)
    kernels = config.backbone.kernels
    if kernels and len(kernels) != len(space.num_cell_groups):
        _fail("backbone.kernels", f"{len(space.num_cell_groups)} values, one per stage", kernels)
    schedule = space.schedule_cfg
    key = "search_space.schedule_cfg"
    _whole(f"{key}.depth_choice.value", _flat(schedule.depth_choice))
    _whole(f"{key}.kernel_choice.value", _flat(schedule.kernel_choice))
    most, widest = max(space.num_cell_groups), max(space.expansions)
    _within(f"{key}.depth_choice.value", _flat(schedule.depth_choice), 1, most, "blocks of the deepest stage")
    _within(f"{key}.width_choice.value", _flat(schedule.width_choice), 0.125, widest, "expansion of the widest stage")
    _within("search_space.head_width_choice", space.head_width_choice, 0.125, 8, "largest expand ratio")
    _odd_kernels(f"{key}.kernel_choice.value", [*_flat(schedule.kernel_choice)], max(kernels, default=7))
    _odd_kernels("search_space.head_kernel_choice", space.head_kernel_choice, 7)
    _odd_kernels("backbone.kernels", kernels, 7)
    for stride in config.backbone.strides:
        if stride not in (1, 2):
            _fail("backbone.strides", "strides of 1 and 2", stride)
    for size in space.image_size_choice:
        _at_least("search_space.image_size_choice", size, 32)
    for name in ("image_size_choice", "head_width_choice", "head_kernel_choice"):
        if not getattr(space, name):
            _fail(f"search_space.{name}", "at least one choice", "none")


def _flat(schedule: ChoiceSchedule) -> list[float]:
    return [choice for value in schedule.value for choice in value]


def _within(key: str, values: Iterable[float], low: float, high: float, what: str) -> None:
    for value in values:
        if not low <= value <= high:
            _fail(key, f"choices from {low:g} to {high:g} ({what})", value)


def _whole(key: str, values: Iterable[float]) -> None:
    for value in values:
        if not isinstance(value, int):
            _fail(key, "integers", value)


def _odd_kernels(key: str, kernels: Iterable[float], largest: int) -> None:
    options = [k for k in (3, 5, 7) if k <= largest]
    for kernel in kernels:
        if kernel not in options:
            _fail(key, f"kernels out of {', '.join(map(str, options))}, which the backbone can serve", kernel)


def _check_maps(config: Config) -> None:
    """As many extra blocks, lists of aspect ratios and scales as there are feature maps."""
    extras = config.search_space.num_head
    maps = len(config.backbone.feature_levels) + extras
    _length("head.channels", config.head.channels, extras, "one per extra feature block (search_space.num_head)")
    _length("head.aspect_ratios", config.head.aspect_ratios, maps, "one per feature map")
    _length("head.scales", config.head.scales, maps + 1, "one per feature map and one more")
    _length("head.variances", config.head.variances, 2, "for centres and sizes")


def _length(key: str, values: Sequence, expected: int, why: str) -> None:
    if len(values) != expected:
        _fail(key, f"{expected} values, {why}", f"{len(values)}")


def _check_training(name: str, config: TrainConfig) -> None:
    _at_least(f"{name}.epochs", config.epochs, 1)
    _at_least(f"{name}.eval_every", config.eval_every, 1)
    _at_least(f"{name}.batch_size", config.batch_size, 2)
    _at_least(f"{name}.accumulate", config.accumulate, 1)
    _at_least(f"{name}.backbone_learning_rate", config.backbone_learning_rate, 0)
    if not config.learning_rate > 0:
        _fail(f"{name}.learning_rate", "a positive number", config.learning_rate)
    if not 0 <= config.ema_decay < 1:
        _fail(f"{name}.ema_decay", "a number from 0 to below 1", config.ema_decay)
    _at_least(f"{name}.lr_schedule.warmup_steps", config.lr_schedule.warmup_steps, 0)
    if config.lr_schedule.T_0 != "auto":
        _at_least(f"{name}.lr_schedule.T_0", config.lr_schedule.T_0, 1)


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


def validate_shares(name: str, config: TrainConfig, processes: int) -> None:
    """Every process has the same share of a batch, and BatchNorm needs two images."""
    if config.batch_size % processes:
        _fail(f"{name}.batch_size", f"a multiple of the {processes} processes", config.batch_size)
    if not config.sync_batch_norm and config.batch_size < 2 * processes:
        expected = f"at least 2 images for each of the {processes} processes, or {name}.sync_batch_norm"
        _fail(f"{name}.batch_size", expected, config.batch_size)


def _check_budgets(config: SearchConfig) -> None:
    for cost in ("flops", "params", "latency_ms"):
        low, high = getattr(config, f"min_{cost}"), getattr(config, f"max_{cost}")
        _at_least(f"search.min_{cost}", low, 0)
        _at_least(f"search.max_{cost}", high, 0)
        if 0 < high < low:
            _fail(f"search.min_{cost}", f"at most search.max_{cost}, which is {high:g}", low)
    if not config.costs:
        _fail("search.costs", "at least one cost", "none")
    _at_least("search.latency_threads", config.latency_threads, 1)


def _check_portion(portion: Sequence[float]) -> None:
    if len(portion) != 2 or not all(0 < p < 1 for p in portion) or sum(portion) > 1 + 1e-9:
        _fail("data.data_portion", "two shares above 0 that sum to at most 1, for training and for scoring", portion)
