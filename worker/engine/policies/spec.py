"""A policy as one setting: `NAME` or `NAME(value, param=value, ...)`.

A parameter that is a limit of the scheduler (max_num_seqs, watermark, max_step_tokens, ...) replaces it for
this engine; the others go to the policy's constructor, whose annotations say what they may be. So the same
text names a tuned baseline on the command line, in a config file and in a table of results.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from inspect import Parameter, signature
from math import isfinite
from types import UnionType
from typing import Any, get_args, get_type_hints

from ellm.worker.api.config import SchedulerConfig
from ellm.worker.api.errors import ConfigError

Value = int | float | bool | str | None

_SETTING = "scheduler.policy"
_SPEC = re.compile(r"\s*([A-Za-z][\w-]*)\s*(?:\((.*)\)\s*)?", re.DOTALL)
_NAME = re.compile(r"[A-Za-z_]\w*")
_WORD = re.compile(r"[A-Za-z][\w-]*")
_WORDS: dict[str, Value] = {"true": True, "false": False, "none": None}
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", type(None): "none"}


@dataclass(frozen=True, slots=True)
class PolicySpec:
    """What was written, taken apart."""

    name: str
    positional: tuple[Value, ...] = ()
    named: dict[str, Value] = field(default_factory=dict)


def parse_spec(text: str) -> PolicySpec:
    """Raises ConfigError for what is not `NAME(value, param=value, ...)`."""
    match = _SPEC.fullmatch(text)
    if match is None:
        raise _refused(f"{text!r} is not of the form NAME or NAME(param=value, ...)")
    name, arguments = match.group(1), match.group(2)
    positional: list[Value] = []
    named: dict[str, Value] = {}
    for argument in arguments.split(",") if arguments and arguments.strip() else ():
        key, equals, value = (part.strip() for part in argument.partition("="))
        if not equals:
            if named:
                raise _refused(f"{text!r}: a value without a name after one with a name")
            positional.append(_value(name, key))
            continue
        if not _NAME.fullmatch(key):
            raise _refused(f"{text!r}: {key!r} is no name of a parameter")
        if key in named:
            raise _refused(f"{text!r}: {key} is given twice")
        named[key] = _value(name, value, key)
    return PolicySpec(name, tuple(positional), named)


def split_specs(text: str) -> list[str]:
    """The policies of a list with commas between them; those within parentheses separate nothing."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if char == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    parts.append(text[start:])
    return [part.strip() for part in parts]


def override(config: SchedulerConfig, spec: PolicySpec) -> tuple[SchedulerConfig, dict[str, Value]]:
    """`config` with the limits that `spec` names, and the named parameters that are left for the policy.

    Raises ConfigError for a value of the wrong type; whether it is in range, EngineState says.
    """
    limits = {f.name for f in fields(SchedulerConfig)} - {"policy"}
    hints = get_type_hints(SchedulerConfig)
    mine: dict[str, Any] = {
        key: _typed(spec.name, key, value, hints[key]) for key, value in spec.named.items() if key in limits
    }
    rest = {key: value for key, value in spec.named.items() if key not in limits}
    return replace(config, **mine) if mine else config, rest


def bind(factory: Callable[..., Any], spec: PolicySpec, named: dict[str, Value]) -> dict[str, Value]:
    """Arguments by name for `factory`, from the positional ones of `spec` and from `named`.

    Raises ConfigError, with the parameters there are, for one that is unknown, of the wrong type, given
    twice or missing.
    """
    # An object's own __init__ takes anything by signature and nothing in truth.
    own = factory.__init__ if isinstance(factory, type) else factory  # type: ignore[misc]
    if own is object.__init__:
        parameters, hints = {}, {}
    else:
        parameters, hints = dict(signature(factory).parameters), get_type_hints(own)
    by_place = [p.name for p in parameters.values() if p.kind is Parameter.POSITIONAL_OR_KEYWORD]
    if len(spec.positional) > len(by_place):
        raise _refused(f"{spec.name} takes {len(by_place)} values without a name, not {len(spec.positional)}")
    given = dict(zip(by_place, spec.positional, strict=False))
    for key, value in named.items():
        if key not in parameters:
            known = ", ".join(parameters) or "none of its own"
            limits = "and limits of the scheduler"
            raise _refused(f"{spec.name} has no parameter {key!r}; it has: {known}; {limits}")
        if key in given:
            raise _refused(f"{spec.name}: {key} is given twice")
        given[key] = value
    for key, parameter in parameters.items():
        if parameter.default is Parameter.empty and key not in given:
            raise _refused(f"{spec.name} needs {key}: {spec.name}({key}=...)")
    return {key: _typed(spec.name, key, value, hints[key]) for key, value in given.items()}


def _refused(message: str) -> ConfigError:
    return ConfigError(f"policy: {message}", param=_SETTING)


def _value(name: str, text: str, key: str = "") -> Value:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        if isfinite(number):
            return number
    if _WORD.fullmatch(text) and text.lower() not in ("inf", "infinity", "nan"):
        return text
    where = f"{name}: {key}" if key else name
    raise _refused(f"{where}: {text!r} is no value: a number, true, false, none or a word")


def _typed(name: str, key: str, value: Value, hint: Any) -> Value:
    """`value` as the type that `hint` allows; a whole number will do for any number."""
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    if type(value) in kinds:
        return value
    if type(value) is int and float in kinds:
        return float(value)
    wanted = " or ".join(_KINDS.get(kind, str(kind)) for kind in kinds)
    raise _refused(f"{name}: {key} must be {wanted}, not {value!r}")
