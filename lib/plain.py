"""Plain data that anybody may have written: JSON read strictly, and values checked against annotated types.

A type is int, float, str, bool, any other class, list[...], dict[str, ...], Literal, Annotated with Bounds, a union, or
a dataclass or NamedTuple, which stands for an object that has at least these keys.
"""

import contextlib
import functools
import json
import math
import reprlib
import types
import typing
from collections import Counter
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn

from lib import UserError

MOST_SHOWN = 80  # characters of a wrong value in an error message
MOST_BYTES = 256 * 1024**2  # of a JSON file
MOST_VALUES, DEEPEST = 1_000_000, 50  # of plain data that is copied
NAMES = {int: "an integer", float: "a number", str: "text", bool: "true or false", list: "a list"}
NAMES[dict] = "a section with keys"


class Bounds(NamedTuple):
    """The numbers that a key accepts, both ends included. NaN and infinity are never accepted."""

    low: float
    high: float = math.inf


class WrongKey(UserError):
    """A value of the wrong type or out of bounds; `key` is its dotted path."""

    def __init__(self, key: str, message: str):
        super().__init__(f"{key}: {message}" if key else message)
        self.key = key


def fail(key: str, expected: str, found: object) -> NoReturn:
    raise WrongKey(key, f"expected {expected}, found {shown(found)}")


def read_bytes(path: Path, most: int) -> bytes:
    """The content of a file. Raises UserError if it cannot be read, or is larger than `most` bytes."""
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if len(content) > most:
        raise UserError(f"{path}: larger than {most / 1024**2:g} MiB, which no file of this kind is")
    return content


def read_json(path: Path, form: str = "", hint: str = "") -> Any:
    """The content of a JSON file. With `form`, an object whose "format" is that one; `hint` ends the message."""
    data = parse_json(read_bytes(path, MOST_BYTES), str(path))
    found = data.get("format") if isinstance(data, dict) else data
    if form and found != form:
        raise UserError(f'{path}: expected a JSON object with "format": "{form}", found {shown(found)}{hint}')
    return data


def parse_json(text: str | bytes, source: str) -> Any:
    """JSON in which no key is given twice and every number is finite. The error begins with `source`."""
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:  # of the encoding, the JSON, or of a number with 5,000 digits
        raise UserError(f"{source}: cannot be read as JSON ({error})") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {shown(key)} stands there twice")
    return found


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"expected finite numbers, found {text[:MOST_SHOWN]}")
    return value


def refuse_bomb(data: object, source: str) -> None:
    """Raise UserError if plain data is nested very deeply, or grows when it is copied (YAML aliases, pickled loops)."""
    waiting = [(data, 0, source)]
    for _ in range(MOST_VALUES):
        if not waiting:
            return
        value, depth, key = waiting.pop()
        if depth > DEEPEST or len(waiting) > MOST_VALUES:
            break
        if isinstance(value, dict):
            for name, item in value.items():
                waiting.append((item, depth + 1, f"{key}: {shown(name)}" if depth < 2 else key))
        elif isinstance(value, (list, tuple, set)):
            waiting.extend((item, depth + 1, key) for item in value)
    raise UserError(f"{key}: nested too deeply, or too large")


def check(value: Any, kind: Any, key: str = "") -> Any:
    """`value` as the annotated type `kind`. Raises WrongKey, a UserError, that begins with `key`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        number, bounds = check(value, arguments[0], key), arguments[1]
        return number if bounds.low <= number <= bounds.high else fail(key, describe(kind), number)
    if origin is list:
        return [check(item, arguments[0], f"{key}[{i}]") for i, item in enumerate(check(value, list, key))]
    if origin is dict:
        items = check(value, dict, key).items()
        return {check(n, str, f"{key}: a key"): check(v, arguments[1], f"{key}[{shown(n)}]") for n, v in items}
    if origin is Literal:
        # Not `in`: True equals 1 and 3.0 equals 3, and neither is what the key means.
        if any(value == option and type(value) is type(option) for option in arguments):
            return value
        fail(key, f"one of {', '.join(map(str, arguments))}", value)
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            with contextlib.suppress(UserError):
                return check(value, option, key)
        fail(key, describe(kind), value)
    if is_dataclass(kind) or hasattr(kind, "_fields"):
        items = check(value, dict, key)
        checked = {}
        for name, expected in hints_of(kind).items():
            where = f"{key}: {name}" if key else name
            if name not in items:
                raise WrongKey(where, "is missing")
            checked[name] = check(items[name], expected, where)
        return kind(**checked)
    return _scalar(value, kind, key)


@functools.lru_cache
def hints_of(kind: type) -> dict[str, Any]:
    """The annotated type of each field of a dataclass or NamedTuple."""
    return typing.get_type_hints(kind, include_extras=True)


def _scalar(value: Any, kind: type, key: str) -> Any:
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-4 as a string
        with contextlib.suppress(ValueError):
            value = float(value)
    accepted = (int, float) if kind is float else kind  # a whole number stays one: expand ratio 6 is not 6.0
    fits = isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))
    if not fits or (isinstance(value, float) and not math.isfinite(value)):
        fail(key, describe(kind) + (", in quotes" if kind is str else ""), value)
    if kind is str and "\0" in value:  # no file name and no YAML file can hold it
        fail(key, "text without NUL", value)
    if isinstance(value, int) and value.bit_length() > 63:  # more than a float or a tensor can hold
        fail(key, "a number below 2**63", value)
    return value


def describe(kind: Any) -> str:
    """A type in words: `an integer of at least 1`, `a number from 0 to 1`."""
    if typing.get_origin(kind) is Annotated:
        base, bounds = typing.get_args(kind)
        if 0 < bounds.low < 1e-9:
            return f"{describe(base)} above 0"
        if bounds.high == math.inf:
            return f"{describe(base)} of at least {bounds.low:.7g}"
        return f"{describe(base)} from {bounds.low:.7g} to {bounds.high:.7g}"
    if (plain := typing.get_origin(kind) or kind) in NAMES:
        return NAMES[plain]
    if typing.get_origin(kind) is Literal:
        return " or ".join(repr(option) for option in typing.get_args(kind))
    return " or ".join(describe(option) for option in typing.get_args(kind)) or kind.__name__


_short = reprlib.Repr()
_short.maxlevel = 4
_short.maxstring = _short.maxother = _short.maxlong = 4 * MOST_SHOWN
_short.maxlist = _short.maxdict = _short.maxtuple = MOST_SHOWN


def shown(value: object) -> str:
    """A wrong value for an error message, cut where it is long or nested."""
    try:
        text = _short.repr(value)
    except ValueError:  # Python refuses to print an integer of thousands of digits
        return "a huge number"
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."
