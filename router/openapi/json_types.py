"""Small parts of JSON schemas, and the schemas of our own dataclasses.

Everything here is JSON Schema 2020-12, as OpenAPI 3.1 has it.
"""

from __future__ import annotations

import typing
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "number"}
INTEGER: Schema = {"type": "integer"}
COUNT: Schema = {"type": "integer", "minimum": 0}
FLAG: Schema = {"type": "boolean"}
NULL: Schema = {"type": "null"}
OBJECT: Schema = {"type": "object"}


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def const(value: Any) -> Schema:
    return {"const": value}


def enum(*values: Any) -> Schema:
    return {"enum": list(values)}


def array(items: Schema, **limits: int) -> Schema:
    return {"type": "array", "items": items, **limits}


def any_of(*schemas: Schema) -> Schema:
    return {"anyOf": list(schemas)}


def nullable(schema: Schema) -> Schema:
    return any_of(schema, NULL)


def closed(optional: Schema | None = None, /, **properties: Schema) -> Schema:
    """An object of these properties and no others; all but the `optional` ones are there."""
    return {
        "type": "object",
        "properties": {**properties, **(optional or {})},
        "required": list(properties),
        "additionalProperties": False,
    }


def token_id_pattern(vocab_size: int) -> str:
    """A regular expression of the decimal numbers below `vocab_size`."""
    digits = str(vocab_size - 1)
    options = [f"[0-9]{{1,{len(digits) - 1}}}"] if len(digits) > 1 else []
    for i, digit in enumerate(digits):
        below = int(digit) - (1 if i < len(digits) - 1 else 0)
        lowest = 1 if i == 0 and len(digits) > 1 else 0
        if below >= lowest:
            left = len(digits) - i - 1
            options.append(digits[:i] + f"[{lowest}-{below}]" + (f"[0-9]{{{left}}}" if left else ""))
    return f"^({'|'.join(options)})$"


def of_type(type_: Any) -> Schema:
    """Of what a field of a dataclass holds when it is written as JSON."""
    if is_dataclass(type_):
        assert isinstance(type_, type)
        return of_dataclass(type_)
    origin, args = typing.get_origin(type_), typing.get_args(type_)
    if origin is Literal:
        return enum(*args)
    if origin in (UnionType, typing.Union):
        return any_of(*(of_type(one) for one in args))
    if origin is tuple:
        if args[-1] is Ellipsis:
            return array(of_type(args[0]))
        return {"type": "array", "prefixItems": [of_type(one) for one in args]}
    if origin is dict:
        return {"type": "object", "additionalProperties": of_type(args[1])}
    return {str: TEXT, bool: FLAG, int: INTEGER, float: NUMBER, NoneType: NULL}[type_]


def of_dataclass(kind: type, *, without: tuple[str, ...] = ()) -> Schema:
    """An object with all fields of the dataclass but some; others may be beside them."""
    assert is_dataclass(kind)
    hints = typing.get_type_hints(kind)
    names = [field.name for field in fields(kind) if field.name not in without]
    return {
        "type": "object",
        "properties": {name: of_type(hints[name]) for name in names},
        "required": names,
    }
