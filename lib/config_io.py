"""Configurations from plain data (a YAML file, a checkpoint, a genotype file) and back: read, override, check, dump.

Every error names the key by its dotted path, what was expected and what was found.
"""

import copy
import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from lib import UserError, did_you_mean
from lib.config import ChoiceSchedule, Config, ValueSchedule
from lib.plain import Bounds, WrongKey, check, fail, hints_of, read_bytes, refuse_bomb

# Keys (None: whatever their value) that files of earlier versions may have and that count as absent.
RETIRED = dict.fromkeys(("search.racing", "final.distill", "supernet.distill.teacher", "supernet.distill.priors"))
RETIRED |= {"final.compile": None, "supernet.sampling": "sandwich"}
ALIASES = {"T_max": "T_0"}  # names of keys in other recipes
MOST_YAML = 1024**2  # bytes of a YAML file


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
    try:
        return _section(data, Config(), "")
    except WrongKey as error:
        typed = any(_is_part_of(error.key, key) for key in overridden)
        raise UserError(f"{source}: {error}" if source and not typed else str(error)) from None


def _is_part_of(key: str, other: str) -> bool:
    """Whether one of two dotted paths leads to the other."""
    shorter, longer = sorted((key, other), key=len)
    return shorter == longer or longer.startswith((f"{shorter}.", f"{shorter}["))


def to_dict(config: Config) -> dict:
    """Plain data; `from_dict` is its inverse."""
    return asdict(config)


def dump(config: Config) -> str:
    """The resolved configuration as YAML, in the order of the dataclasses."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, default_flow_style=None, width=120)


class _StrictLoader(yaml.SafeLoader):
    """YAML without what it silently turns into something else: keys given twice, 010 (8), 1:30 (90), alias bombs."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else id(key)
            if name in seen:
                problem = f"the key '{name}' stands there twice, again"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> float:
        if re.match(r"[-+]?(0[0-9]+|[0-9:]*:[0-9.]*)$", node.value.replace("_", "")):
            raise yaml.YAMLError(f"{node.value} is octal or sexagesimal in YAML: write a plain number, or quote a text")
        return self.construct_yaml_int(node) if node.tag.endswith("int") else self.construct_yaml_float(node)


for tag in ("int", "float"):
    _StrictLoader.add_constructor(f"tag:yaml.org,2002:{tag}", _StrictLoader.construct_number)


def _parse_yaml(content: str | bytes, source: str) -> object:
    """The plain data of YAML. Raises UserError that begins with `source`."""
    try:
        data = yaml.load(content, Loader=_StrictLoader)
    except Exception as error:  # PyYAML raises anything on a damaged scalar, such as !!bool maybe
        raise UserError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
    refuse_bomb(data, source)
    return data


def read_yaml(path: Path) -> dict:
    """The plain data of a YAML file, whose `name` defaults to the file's. Raises UserError that names the file."""
    if not path.exists():
        raise UserError(f"{path}: no such configuration file{did_you_mean(path, sorted(path.parent.glob('*.yaml')))}")
    # As bytes: YAML says itself how to tell UTF-8 from UTF-16.
    data = _parse_yaml(read_bytes(path, MOST_YAML), str(path))
    if not isinstance(data, dict | None):  # None: without any key, or with comments only
        raise UserError(f"{path}: expected keys and values, found {type(data).__name__}")
    return {**(data or {}), "name": (data or {}).get("name") or path.stem}


def parse_override(override: str) -> tuple[str, object]:
    """`key.path=value` as key and value. The value of a key that holds text is taken as typed, any other is YAML."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserError(f"--set {override}: expected key.path=value, e.g. supernet.epochs=10")
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if KEYS.get(key) is str and not quoted:
        return key, text
    return key, _parse_yaml(text, f"--set {key}") if text.strip() else ""


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


def differences(config: Config, other: Config) -> Iterator[tuple[str, object, object]]:
    """Each key whose values differ, with both values."""
    ours, theirs = to_dict(config), to_dict(other)
    for key in KEYS:
        if get_key(ours, key) != get_key(theirs, key):
            yield key, get_key(ours, key), get_key(theirs, key)


def leaf_types(kind: type, prefix: str = "") -> dict[str, Any]:
    """The annotated type of every key of a dataclass of dataclasses, by dotted path."""
    types_by_path = {}
    for name, hint in hints_of(kind).items():
        types_by_path |= leaf_types(hint, f"{prefix}{name}.") if is_dataclass(hint) else {prefix + name: hint}
    return types_by_path


KEYS = leaf_types(Config)


def _section(value: Any, default: Any, path: str) -> Any:
    """`default`, an instance of a dataclass, with the keys of `value` set."""
    if not isinstance(value, Mapping):
        fail(path, "a section with keys", value)
    hints = hints_of(type(default))
    prefix = f"{path}." if path else ""
    values = {}
    for key, item in value.items():
        where = prefix + check(key, str, f"{path}: a key" if path else "a key")
        if where in RETIRED and RETIRED[where] in (None, item):
            continue
        name = ALIASES.get(key, key)
        if name not in hints:
            # The same key in another section is a better hint than a similar one in this section.
            elsewhere = [f" (did you mean '{known}'?)" for known in KEYS if known.rpartition(".")[2] == name]
            hint = elsewhere[0] if elsewhere else did_you_mean(where, [prefix + known for known in hints])
            raise WrongKey(where, f"unknown key{hint}")
        nested = is_dataclass(hints[name])
        values[name] = _section(item, getattr(default, name), where) if nested else check(item, hints[name], where)
    return replace(default, **values)


# What types and bounds cannot say: values that contradict each other, or that no backbone can serve.


def _require(config: Config, met: bool, key: str, expected: str) -> None:
    """Unless the condition is `met`, raise UserError with the value of `key`."""
    if not met:
        fail(key, expected, get_key(to_dict(config), key))


def validate(config: Config) -> None:
    """Raise UserError for the first contradiction between keys, naming the key and what was expected."""
    validate_structure(config)
    require = partial(_require, config)
    search, data, loss = config.search, config.data, config.loss
    for cost in ("flops", "params", "latency_ms"):
        low, high = getattr(search, f"min_{cost}"), getattr(search, f"max_{cost}")
        require(not 0 < high < low, f"search.min_{cost}", f"at most search.max_{cost}, which is {high:g}")
    require(not 0 < search.time_limit < 2, "search.time_limit", "0 or at least 2")
    for stage, training in (("supernet", config.supernet), ("final", config.final)):
        rate, highest = training.lr_schedule, training.learning_rate
        falls = not rate.type.startswith("cosine") or rate.eta_min <= highest
        require(falls, f"{stage}.lr_schedule.eta_min", f"at most {stage}.learning_rate, {highest:g}")
    portion = data.data_portion
    shares = len(portion) == 2 and min(portion) > 0 and sum(portion) <= 1 + 1e-9
    require(shares, "data.data_portion", "two shares above 0 that sum to at most 1, for training and for scoring")
    require(len({*data.classes, ""}) == len(data.classes) + 1, "data.classes", "names, each once")
    ordered = loss.unmatched_threshold <= loss.matched_threshold
    require(ordered, "loss.unmatched_threshold", "at most loss.matched_threshold")


def validate_structure(config: Config) -> None:
    """The part of `validate` that a network can be built by."""
    require = partial(_require, config)
    space, backbone, head = config.search_space, config.backbone, config.head
    stages = len(space.num_cell_groups)
    maps = len(backbone.feature_levels) + space.num_head
    require(stages > 0, "search_space.num_cell_groups", "the number of blocks of each stage")
    require(maps > space.num_head, "backbone.feature_levels", "at least one level")
    plain = to_dict(config)
    for key, length, why in (
        ("search_space.expansions", stages, "one per stage"),
        ("backbone.kernels", stages if backbone.kernels else 0, "one per stage"),
        ("backbone.pixel_mean", 3, "one per colour"),
        ("backbone.pixel_std", 3, "one per colour"),
        ("head.channels", space.num_head, "one per extra block (search_space.num_head)"),
        ("head.aspect_ratios", maps, "one per feature map"),
        ("head.scales", maps + 1, "one per feature map and one more"),
        ("head.variances", 2, "for centres and sizes"),
    ):
        require(len(get_key(plain, key)) == length, key, f"{length} values, {why}")
    ratios = head.squares or all(head.aspect_ratios)
    require(ratios, "head.aspect_ratios", "a ratio for each feature map, since head.squares is false")
    split = backbone.feature_taps == "expansion" and head.predictor != "ssdlite"
    require(not split, "head.predictor", "ssdlite, since backbone.feature_taps is expansion")
    choices = ("search_space.image_size_choice", "search_space.head_width_choice", "search_space.head_kernel_choice")
    for key in (*choices, "search.costs"):
        values = get_key(plain, key)
        require(0 < len(values) == len(set(values)), key, "at least one choice, each once")
    _check_schedules(config)


def _check_schedules(config: Config) -> None:
    """Epochs in order, and choices that the backbone can serve."""
    require, space = partial(_require, config), config.search_space
    largest_kernel = max(config.backbone.kernels, default=7)
    kinds = {
        "kernel_choice": Literal[tuple(kernel for kernel in (3, 5, 7) if kernel <= largest_kernel)],
        "width_choice": Annotated[float, Bounds(0.125, max(space.expansions))],
        "depth_choice": Annotated[int, Bounds(1, max(space.num_cell_groups))],
        "image_size_choice": Literal[tuple(space.image_size_choice)],
    }
    for key, schedule in _schedules(config).items():
        begins, values, name = schedule.boundary, schedule.value, key.rpartition(".")[2]
        if name == "image_size_choice" and not begins:
            continue  # all sizes are open from the first epoch on
        require(len(begins) == len(values), f"{key}.value", f"as many values as boundaries, {len(begins)}")
        ascends = begins[:1] == [1] and all(a < b for a, b in itertools.pairwise(begins))
        require(ascends, f"{key}.boundary", "ascending epochs that begin with 1")
        if name in kinds:
            require(all(values), f"{key}.value", "at least one choice at every boundary")
            check(values, list[list[kinds[name]]], f"{key}.value")


def _schedules(config: Config) -> dict[str, ChoiceSchedule | ValueSchedule]:
    """What changes in the course of the supernet's training, by key."""
    choices = vars(config.search_space.schedule_cfg).items()
    schedules = {f"search_space.schedule_cfg.{name}": schedule for name, schedule in choices}
    return {**schedules, "supernet.distill.weight": config.supernet.distill.weight}


def validate_network(config: Config, trained: Config, sections: Sequence[str], path: Path) -> None:
    """Raise UserError where `sections` of `config` describe another network than that of the supernet in `path`."""
    for key, ours, theirs in differences(config, trained):
        # Where the weights came from once does not matter.
        if key.partition(".")[0] in sections and not key.startswith("backbone.pretrained_"):
            fail(key, f"{theirs} as in the supernet {path} (--load names another one)", ours)


def validate_shares(config: Config, stage: str, processes: int) -> None:
    """Every process has the same share of a batch of the stage, and BatchNorm needs two images."""
    training, key = getattr(config, stage), f"{stage}.batch_size"
    _require(config, training.batch_size % processes == 0, key, f"a multiple of the {processes} processes")
    expected = f"at least 2 images for each of the {processes} processes, or {stage}.sync_batch_norm"
    _require(config, training.sync_batch_norm or training.batch_size >= 2 * processes, key, expected)


def limited(config: Config, stage: str, pictures: int) -> tuple[Config, list[str]]:
    """`config` with fewer epochs of `stage` if they would take more optimizer steps than `max_steps`, and a note on it.

    All schedules keep their proportions. `config` itself stays as it is: it is what a resumed run derives this from.
    """
    settings = getattr(config, stage)
    steps = -(-max(1, pictures // settings.batch_size) // settings.accumulate)
    limit, planned = settings.max_steps, settings.epochs
    if not limit or planned <= (most := max(1, limit // steps)):
        return config, []
    config = copy.deepcopy(config)
    getattr(config, stage).epochs = most
    fit_schedules(config, stage, planned, (), always=True)
    why = f"since {planned} epochs of {steps} steps are more than {stage}.max_steps, {limit}"
    lift = f"--set {stage}.max_steps=0, when a run begins, lifts the limit"
    return config, [f"note: {stage}.epochs is {most}, and all schedules are scaled to it, {why}; {lift}"]


def fit_schedules(config: Config, stage: str, planned: int, typed: Collection[str], always: bool = False) -> list[str]:
    """Bring what begins after the last epoch of `stage` ("supernet" or "final") before it, and say so.

    A schedule for `planned` epochs keeps its proportions; `always` scales it also where nothing begins too late. Raises
    UserError if it does not fit these either, or is among the keys that the user gave, `typed`.
    """
    settings = getattr(config, stage)
    rate = settings.lr_schedule
    schedules = _schedules(config) if stage == "supernet" else {}
    begins = {f"{key}.boundary": schedule.boundary for key, schedule in schedules.items()}
    if rate.type == "multistep":
        begins[f"{stage}.lr_schedule.milestones"] = rate.milestones
    late = next((key for key, epochs in begins.items() if max(epochs, default=0) > settings.epochs), None)
    if late is None and not always:
        return []
    given = any(_is_part_of(key, other) for key in typed for other in begins)
    if not always and (given or planned <= settings.epochs or max(itertools.chain(*begins.values())) > planned):
        fail(late, f"epochs up to {stage}.epochs, which is {settings.epochs}", begins[late])
    factor = settings.epochs / planned
    # Of boundaries that fall on one epoch, the last stays: what opens later includes what was open before.
    for schedule in schedules.values():
        moved = {1 + int((b - 1) * factor): v for b, v in zip(schedule.boundary, schedule.value, strict=True)}
        schedule.boundary, schedule.value = list(moved), list(moved.values())
    rate.milestones = sorted({max(1, int(milestone * factor)) for milestone in rate.milestones})
    if isinstance(rate.T_0, int):
        rate.T_0 = max(1, round(rate.T_0 * factor))
    return [f"note: {late} is for {planned} epochs; this and all other schedules are scaled to {settings.epochs}"]
