"""The suite of schemas: what comes out is judged; strings whose pattern noise does not find have an end."""

from __future__ import annotations

import asyncio

import pytest

from ellm.loadtest.json_endings import examples, patterns
from ellm.loadtest.json_schemas import BUNDLED, Suite, judge

DATED = {
    "type": "object",
    "properties": {"at": {"type": "string", "pattern": r"\d{4}-\d{2}-\d{2}T\d{2}"}},
    "required": ["at"],
    "additionalProperties": False,
}


def test_examples_of_patterns() -> None:
    assert list(patterns({"items": [DATED], "patternProperties": {"^x": {}}})) == [
        "^x",
        r"\d{4}-\d{2}-\d{2}T\d{2}",
    ]
    assert examples("(^Hpt_|_Armour_)") == ["Hpt_", "_Armour_"]
    assert examples("^ab+$") == ["ab"]
    assert examples(r"\p{L}(") == []  # none that Python reads


@pytest.mark.needs_module("jsonschema")
def test_an_answer_is_judged() -> None:
    assert judge(DATED, '{"at": "2026-01-01T10"}').kind == "valid"
    assert judge(DATED, '{"at": "2026-01-01"}').kind == "invalid"
    assert judge(DATED, '{"at": "2026').kind == "invalid"
    assert judge({"$ref": "nowhere"}, "1").kind == "unjudged"


@pytest.mark.needs_module("llguidance")
@pytest.mark.needs_module("jsonschema")
def test_a_string_ends_once_noise_is_told_what_it_looks_like(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ellm.loadtest.json_schemas.PATIENCE", 50)
    told = asyncio.run(Suite(BUNDLED, 150).outcome(DATED, 1))
    assert (told.kind, told.told) == ("valid", 1)
    monkeypatch.setattr("ellm.loadtest.json_schemas.PATIENCE", 1000)
    assert asyncio.run(Suite(BUNDLED, 150).outcome(DATED, 1)).kind == "cut"
    assert (
        asyncio.run(Suite(BUNDLED, 150).outcome({"type": "array", "uniqueItems": True}, 1)).kind == "refused"
    )
