"""Plain data to typed dataclasses: unknown keys and wrong types are errors that name the key's dotted path."""

from __future__ import annotations

import contextlib
import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, TypeVar

from lib.errors import UserError, did_you_mean

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
