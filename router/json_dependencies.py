"""`dependencies` of a JSON schema, said in words that the grammar library knows.

It obeys `anyOf`, `required` and `properties`, but not `dependencies` and its heirs, `dependentRequired` and
`dependentSchemas`. "With `a` there must be `b`" is "there is no `a`, or there is `b`": the same objects,
nothing more or less. Names of properties are left alone, whatever they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KEYWORDS = ("dependencies", "dependentRequired", "dependentSchemas")
MAX_CLAUSES = 12  # of one object: each may double the grammar. Beyond, the library refuses the keyword
_NAMED = frozenset({"properties", "patternProperties", "definitions", "$defs"})  # name -> schema
_VALUES = frozenset({"enum", "const", "default", "examples"})  # no schemas in these


def without_dependencies(schema: Any) -> Any:
    """An equivalent schema; parts without the keywords are as they were."""
    if isinstance(schema, list):
        return [without_dependencies(one) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    clauses = [
        clause
        for keyword in KEYWORDS
        for name, needed in _entries(schema.get(keyword))
        for clause in _clause(name, needed)
    ]
    dropped = KEYWORDS if len(clauses) <= MAX_CLAUSES else ()
    made = {key: _inner(key, value) for key, value in schema.items() if key not in dropped}
    if dropped and clauses:
        made["allOf"] = [*made.get("allOf", ()), *clauses]
    return made


def _inner(key: str, value: Any) -> Any:
    if key in _VALUES:
        return value
    if key in _NAMED and isinstance(value, Mapping):
        return {name: without_dependencies(one) for name, one in value.items()}
    return without_dependencies(value)


def _entries(value: Any) -> list[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, Mapping) else []


def _clause(name: str, needed: Any) -> list[dict[str, Any]]:
    """`needed` are names, or a schema for the whole object; older schemas have one name."""
    if isinstance(needed, str):
        needed = [needed]
    if isinstance(needed, list):
        if not needed:
            return []
        needed = {"required": needed}
    return [{"anyOf": [{"properties": {name: False}}, without_dependencies(needed)]}]
