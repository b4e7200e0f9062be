"""Functions that tests offer to a model with random weights."""

from __future__ import annotations

import json
from typing import Any

import jsonschema

MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": "Weather?"}]
COMPACT = {"x-guidance": {"whitespace_pattern": ""}}  # random weights like blanks
WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "place": {"$ref": "#/$defs/place"},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["place", "days"],
    "additionalProperties": False,
    "$defs": {"place": {"type": "string", "maxLength": 5}},
    **COMPACT,
}
CLOCK: dict[str, Any] = {
    "type": "object", "properties": {"utc": {"type": "boolean"}}, "required": ["utc"],
    "additionalProperties": False, **COMPACT,
}  # fmt: skip
SCHEMAS = {"weather": WEATHER, "clock": CLOCK}


def function(name: str, parameters: Any, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


TOOLS = [function(name, schema, description=f"Tells the {name}.") for name, schema in SCHEMAS.items()]
STRICT = [function(name, schema, strict=True) for name, schema in SCHEMAS.items()]


def check_calls(calls: list[Any], names: set[str]) -> None:
    assert calls
    assert len({call["id"] for call in calls}) == len(calls)
    for call in calls:
        assert call["type"] == "function"
        assert call["function"]["name"] in names
        jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMAS[call["function"]["name"]])
