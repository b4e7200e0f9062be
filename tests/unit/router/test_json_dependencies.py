"""Schemas with dependencies, said in other words: the same objects are valid, and the grammar obeys them."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ellm.router.json_dependencies import MAX_CLAUSES, without_dependencies
from ellm.router.openai.structured import json_grammar

PROPERTIES = {"a": {"type": "integer"}, "b": {"type": "integer"}, "c": {"type": "integer"}}
SCHEMAS: list[dict[str, Any]] = [
    {"dependencies": {"a": ["b"]}},
    {"dependencies": {"a": ["b", "c"], "b": ["c"], "c": []}},
    {"dependencies": {"a": "b"}},
    {"dependencies": {"a": {"required": ["b"], "properties": {"b": {"minimum": 5}}}}},
    {"dependencies": {"a": {"dependencies": {"b": ["c"]}}}},
    {"dependencies": {"a": False, "b": True}},
    {"dependentRequired": {"a": ["b"]}, "dependentSchemas": {"c": {"required": ["a"]}}},
    {"dependencies": {"a": ["b"]}, "allOf": [{"required": ["a"]}]},
    {"dependencies": {"a": ["b"]}, "anyOf": [{"required": ["c"]}, {"required": ["a"]}]},
]
KEYS = st.sampled_from("abcd")


@pytest.mark.parametrize("number", range(len(SCHEMAS)))
@settings(max_examples=40, deadline=None)
@given(st.dictionaries(KEYS, st.integers(0, 9)))
def test_the_same_objects_are_valid(number: int, value: dict[str, int]) -> None:
    schema = {"type": "object", "properties": PROPERTIES, **SCHEMAS[number]}
    drafts = (
        [jsonschema.Draft201909Validator] if "dependentRequired" in schema else [jsonschema.Draft7Validator]
    )
    if schema.get("dependencies", {}).get("a") == "b":
        drafts = [jsonschema.Draft3Validator]
    made = without_dependencies(schema)
    for draft in drafts:
        assert draft(schema).is_valid(value) == jsonschema.Draft201909Validator(made).is_valid(value)
    assert "dependen" not in json.dumps(made)


@pytest.mark.parametrize("number", range(len(SCHEMAS)))
def test_the_grammar_is_made(number: int) -> None:
    schema = {"type": "object", "properties": PROPERTIES, **SCHEMAS[number]}
    assert json_grammar(schema, "schema")
    nested = {"type": "array", "items": {"$ref": "#/definitions/x"}, "definitions": {"x": schema}}
    assert json_grammar(nested, "schema")
    assert "dependen" not in json_grammar(nested, "schema")


def test_names_and_values_are_left_alone() -> None:
    schema = {
        "properties": {
            "dependencies": {"type": "object", "properties": {"dependentRequired": {"type": "string"}}},
            "kind": {"enum": [{"dependencies": {"a": ["b"]}}], "default": {"dependencies": {"a": ["b"]}}},
        }
    }
    assert without_dependencies(schema) == schema


def test_too_many_are_left_to_be_refused() -> None:
    schema = {"dependencies": {f"p{i}": ["q"] for i in range(MAX_CLAUSES + 1)}}
    assert without_dependencies(schema) == schema
