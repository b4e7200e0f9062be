"""A tree of frozen dataclasses as the schema of plain data: which keys exist, and what type each value has.

Decides whether a value fits a field's annotation and what to say when it does not. Knows nothing of files,
flags or the environment, and nothing of any particular field.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from ellm.worker.api.errors import ConfigError

Leaves = dict[str, Any]  # dotted path -> value of a leaf


APART = "apart"  # in a field's metadata: not a part of the schema


def fields_of(cls: Any) -> list[Field[Any]]:
    """The fields of a dataclass that are part of the schema."""
    return [item for item in fields(cls) if not item.metadata.get(APART)]


@cache
def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls)


def leaf_types(cls: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, annotation) of every leaf of the tree, in the order of its fields."""
    for item in fields_of(cls):
        hint = _hints(cls)[item.name]
        if is_dataclass(hint):
            yield from leaf_types(hint, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", hint


def unknown_key(key: str, known: list[str]) -> ConfigError:
    """The error for a key that does not exist, with the nearest one that does."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not near:  # the right leaf in the wrong place
        near = [path for path in known if path.rpartition(".")[2] == key.rpartition(".")[2]][:1]
    hint = f"; did you mean {near[0]}?" if near else ""
    return ConfigError(f"unknown key {key}{hint}", param=key)


def flatten(cls: Any, data: Any, prefix: str = "") -> Leaves:
    """Nested mappings as leaves, every key and every value checked. Raises ConfigError."""
    if not isinstance(data, Mapping):
        where = prefix.rstrip(".") or "the file"
        raise ConfigError(f"{where}: expected keys and values, got {_show(data)}", param=where)
    leaves: Leaves = {}
    hints = _hints(cls)
    known = [f"{prefix}{item.name}" for item in fields_of(cls)]
    for key, value in data.items():
        path = f"{prefix}{key}"
        if path not in known:
            raise unknown_key(path, known)
        if is_dataclass(hints[key]):
            leaves.update(flatten(hints[key], value, f"{path}."))
        else:
            leaves[path] = coerce(hints[key], value, path)
    return leaves


def build(cls: Any, leaves: Mapping[str, Any], prefix: str = "") -> Any:
    """The tree with these leaves set and all others at their defaults."""
    values: dict[str, Any] = {}
    for item in fields_of(cls):
        path, hint = f"{prefix}{item.name}", _hints(cls)[item.name]
        if is_dataclass(hint):
            values[item.name] = build(hint, leaves, f"{path}.")
        elif path in leaves:
            values[item.name] = leaves[path]
        elif not _has_default(item):
            raise ConfigError(f"{path} is required", param=path)
    return cls(**values)


def unbuild(tree: Any, prefix: str = "") -> Leaves:
    """Every leaf of a tree by its path."""
    leaves: Leaves = {}
    for item in fields_of(tree):
        value = getattr(tree, item.name)
        if is_dataclass(value):
            leaves.update(unbuild(value, f"{prefix}{item.name}."))
        else:
            leaves[f"{prefix}{item.name}"] = value
    return leaves


def _has_default(item: Field[Any]) -> bool:
    return item.default is not MISSING or item.default_factory is not MISSING


def from_text(hint: Any, text: str, path: str) -> Any:
    """A leaf written as text (a flag, a variable): a YAML scalar, or the text itself where a string fits."""
    try:
        parsed = yaml.safe_load(text)
    except yaml.YAMLError:
        parsed = text
    try:
        return coerce(hint, parsed, path)
    except ConfigError:
        if _accepts(hint, text):
            return text
        raise


def coerce(hint: Any, value: Any, path: str) -> Any:
    """`value` as the annotation wants it (lists become tuples, 1 becomes 1.0, "1e3" becomes 1000.0)."""
    value = _as_switch(hint, value)
    if not _accepts(hint, value):
        raise ConfigError(f"{path}: expected {describe(hint)}, got {_show(value)}", param=path)
    return _convert(hint, value)


def _options(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union; the hint alone where it is none."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _accepts(hint: Any, value: Any) -> bool:
    return any(_accepts_one(option, value) for option in _options(hint))


def _accepts_one(hint: Any, value: Any) -> bool:
    if hint is type(None) or value is None:
        return hint is type(None) and value is None
    if get_origin(hint) is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(hint))
    if get_origin(hint) is tuple:
        inner, *rest = get_args(hint)
        assert rest == [Ellipsis], f"only tuple[X, ...] is known, not {hint}"
        return isinstance(value, list | tuple) and all(_accepts(inner, x) for x in value)
    if hint is float:
        return _is_number(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    assert hint in (str, bool), f"no rule for the annotation {hint}"
    return isinstance(value, hint)


def _is_number(value: Any) -> bool:
    """YAML 1.1 reads 1e3 as text; it is a number all the same."""
    if isinstance(value, str):
        try:
            float(value)
        except ValueError:
            return False
        return True
    return isinstance(value, int | float) and not isinstance(value, bool)


def _as_switch(hint: Any, value: Any) -> Any:
    """YAML 1.1 reads on and off as true and false."""
    if isinstance(value, bool) and get_origin(hint) is Literal and {"on", "off"} <= set(get_args(hint)):
        return "on" if value else "off"
    return value


def _convert(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    option = next(x for x in _options(hint) if _accepts_one(x, value))
    if get_origin(option) is tuple:
        inner = get_args(option)[0]
        return tuple(_convert(inner, x) for x in value)
    return float(value) if option is float else value


def describe(hint: Any) -> str:
    """An annotation in words: "an integer or null"."""
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a string", type(None): "null"}
    words = []
    for option in _options(hint):
        if get_origin(option) is Literal:
            words.append("one of " + ", ".join(str(x) for x in get_args(option)))
        elif get_origin(option) is tuple:
            words.append(f"a list, each item {describe(get_args(option)[0])}")
        else:
            words.append(names[option])
    return " or ".join(words)


def _show(value: Any) -> str:
    text = repr(value) if not isinstance(value, Mapping) else "a mapping"
    return text if len(text) <= 60 else text[:57] + "..."
