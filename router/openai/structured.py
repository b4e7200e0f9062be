"""Structured output: which fields ask for it, and the grammar that they mean.

`response_format` is OpenAI's; `structured_outputs` and `guided_*` are vLLM's. At most one of them. Sizes are
checked before anything is read; what the grammar itself says is `GrammarCheck`'s to judge.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import orjson

from ellm.router.json_dependencies import without_dependencies
from ellm.worker.api.errors import InvalidRequest
from ellm.worker.api.grammar import MAX_GRAMMAR_BYTES

if TYPE_CHECKING:
    from llguidance import LLMatcher

MAX_CHOICES = 4096
BLANKS = 1  # in a row between JSON tokens, unless the config or the schema says otherwise
_KINDS = ("json", "json_object", "regex", "choice", "grammar")
_GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
JSON_SCHEMA_FIELDS = frozenset({"name", "description", "schema", "strict"})
FORMATS = frozenset(
    {
        *("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"),
        # Defined, and refused by the library: they must not be passed over.
        *("idn-email", "idn-hostname", "iri", "iri-reference", "uri-reference", "uri-template"),
        *("json-pointer", "relative-json-pointer", "regex"),
    }
)
_VALUES = frozenset({"enum", "const", "default", "examples"})  # no schemas in these
ANY_OBJECT: dict[str, Any] = {"type": "object"}


@dataclass(frozen=True, slots=True)
class Structure:
    """What the output must be."""

    grammar: str  # as llguidance reads it
    field: str  # that asks for it


def structure(body: Any, blanks: int = BLANKS) -> Structure | None:
    """Of a CompletionRequest or ChatRequest. Raises InvalidRequest that names the field."""
    asked = [found for found in (_response_format(body, blanks), *_additions(body, blanks)) if found]
    if len(asked) > 1:
        raise InvalidRequest(
            f"{asked[1].field} and {asked[0].field} exclude each other", param=asked[1].field
        )
    return asked[0] if asked else None


def check_company(asked: Structure, body: Any) -> None:
    """Raises InvalidRequest for a field that contradicts a grammar: its end is the output's."""
    for name in ("min_tokens", "ignore_eos"):
        if getattr(body, name):
            raise InvalidRequest(f"{name} does not go with {asked.field}", param=name)


def whitespace(blanks: int) -> str:
    """The pattern of what may stand between JSON tokens: a weak model would write blanks to the very end."""
    return rf"[\x20\x0A\x0D\x09]{{0,{blanks}}}" if blanks else ""


def json_grammar(schema: Any, field: str, blanks: int = BLANKS) -> str:
    """Of a JSON schema. Raises InvalidRequest."""
    matcher = _library(field)
    text = schema if isinstance(schema, str) else _dumped(schema, field)
    if len(text) > MAX_GRAMMAR_BYTES:
        raise InvalidRequest(f"{field}: more than {MAX_GRAMMAR_BYTES} bytes", param=field)
    if isinstance(schema, str):
        try:
            schema = orjson.loads(text)
        except orjson.JSONDecodeError as error:
            raise InvalidRequest(f"{field}: not JSON: {error}"[:200], param=field) from None
        text = _dumped(schema, field)
    if not isinstance(schema, Mapping | bool):
        raise InvalidRequest(f"{field}: a JSON schema, which is an object", param=field)
    if '"format"' in text:
        text = _dumped(schema := _known_formats(schema), field)
    if '"dependen' in text:
        text = _dumped(without_dependencies(schema), field)
    defaults: dict[str, Any] = {"whitespace_pattern": whitespace(blanks)}
    try:
        return matcher.grammar_from_json_schema(text, defaults)  # type: ignore[arg-type]
    except ValueError as error:
        raise InvalidRequest(f"{field}: {str(error)[:200]}", param=field) from None


def _known_formats(schema: Any) -> Any:
    """Without the formats that nobody has defined: to them a schema says nothing (JSON Schema, 7.2.3)."""
    if isinstance(schema, list):
        return [_known_formats(one) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    return {
        key: value if key in _VALUES else _known_formats(value)
        for key, value in schema.items()
        if not (key == "format" and isinstance(value, str) and value not in FORMATS)
    }


def _library(field: str) -> type[LLMatcher]:
    """Imported where a grammar comes: a server without it serves everything else."""
    if find_spec("llguidance") is None:
        raise InvalidRequest(f"{field}: this server obeys no grammar", param=field)
    from llguidance import LLMatcher

    return LLMatcher


def _dumped(value: Any, field: str) -> str:
    try:
        return orjson.dumps(value).decode()
    except (orjson.JSONEncodeError, RecursionError):
        raise InvalidRequest(f"{field}: nested too deeply", param=field) from None


def _response_format(body: Any, blanks: int) -> Structure | None:
    asked, field = getattr(body, "response_format", None), "response_format"
    if asked is None:
        return None
    if not isinstance(asked, Mapping):
        raise InvalidRequest(f"{field}: an object with a type", param=field)
    kind = asked.get("type")
    if kind in ("text", "json_object"):
        _nothing_but(asked, {"type"}, field)
        if kind == "text":
            return None
        return Structure(json_grammar(ANY_OBJECT, field, blanks), field)
    if kind != "json_schema":
        raise InvalidRequest(f"{field}.type: one of text, json_object, json_schema", param=f"{field}.type")
    _nothing_but(asked, {"type", "json_schema"}, field)
    return _json_schema(asked.get("json_schema"), f"{field}.json_schema", blanks)


def _json_schema(asked: Any, field: str, blanks: int) -> Structure:
    if not isinstance(asked, Mapping):
        raise InvalidRequest(f"{field}: an object with name and schema", param=field)
    _nothing_but(asked, JSON_SCHEMA_FIELDS, field)
    if not isinstance(asked.get("name"), str):
        raise InvalidRequest(f"{field}.name: a text", param=f"{field}.name")
    if not isinstance(asked.get("strict"), bool | None):
        raise InvalidRequest(f"{field}.strict: true or false", param=f"{field}.strict")
    where = f"{field}.schema"
    schema = ANY_OBJECT if asked.get("schema") is None else asked["schema"]
    return Structure(json_grammar(schema, where, blanks), where)


def _nothing_but(asked: Mapping[str, Any], known: Set[str], field: str) -> None:
    for name, value in asked.items():
        if name not in known and value is not None:
            shown = f"{field}.{name[:64]}".encode("ascii", "replace").decode()
            raise InvalidRequest(f"{shown} is not a field of this request", param=shown)


def _additions(body: Any, blanks: int) -> list[Structure]:
    found = []
    for field, kind in _GUIDED.items():
        value = getattr(body, field, None)
        if value is not None:
            found.append(Structure(_grammar(kind, value, field, blanks), field))
    asked = body.structured_outputs
    if asked is None:
        return found
    field = "structured_outputs"
    if not isinstance(asked, Mapping):
        raise InvalidRequest(f"{field}: an object with one of {', '.join(_KINDS)}", param=field)
    _nothing_but(asked, set(_KINDS), field)
    given = {kind: value for kind, value in asked.items() if value is not None and value is not False}
    if len(given) != 1:
        raise InvalidRequest(f"{field}: one of {', '.join(_KINDS)}", param=field)
    ((kind, value),) = given.items()
    where = f"{field}.{kind}"
    return [*found, Structure(_grammar(kind, value, where, blanks), where)]


def _grammar(kind: str, value: Any, field: str, blanks: int) -> str:
    if kind in ("json", "json_object"):
        return json_grammar(value if kind == "json" else ANY_OBJECT, field, blanks)
    matcher = _library(field)
    if kind == "choice":
        return matcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, _choices(value, field))))
    if not isinstance(value, str) or not value:
        raise InvalidRequest(f"{field}: a text", param=field)
    if len(value) > MAX_GRAMMAR_BYTES:
        raise InvalidRequest(f"{field}: more than {MAX_GRAMMAR_BYTES} bytes", param=field)
    return matcher.grammar_from_regex(value) if kind == "regex" else matcher.grammar_from_lark(value)


def _choices(value: Any, field: str) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(c, str) and c for c in value):
        raise InvalidRequest(f"{field}: a list of texts, none empty", param=field)
    if len(value) > MAX_CHOICES or sum(map(len, value)) > MAX_GRAMMAR_BYTES:
        raise InvalidRequest(
            f"{field}: at most {MAX_CHOICES} texts and {MAX_GRAMMAR_BYTES} characters", param=field
        )
    return value
