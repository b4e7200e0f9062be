"""Schemas of what may be sent, with the limits that this server has: a body of them is taken unless its
fields contradict each other (`RELATIONS`) or do not fit this model.

Types and defaults come from the models that read the bodies (`openai.schema`); here is what those leave to
later checks. Fields that ask for nothing we do are there with the one value that is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from ellm.router.config import LimitsConfig
from ellm.router.openai.fields import MAX_STOP_TOKEN_IDS
from ellm.router.openai.messages import MAX_CALLS
from ellm.router.openai.schema import (
    HARMLESS,
    NEUTRAL,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from ellm.router.openai.structured import MAX_CHOICES
from ellm.router.openai.tools import MAX_TOOLS
from ellm.router.openapi.json_types import (
    COUNT,
    FLAG,
    NULL,
    OBJECT,
    TEXT,
    Schema,
    any_of,
    array,
    closed,
    const,
    enum,
    nullable,
    token_id_pattern,
)

MAX_INT = 2**31 - 1
RELATIONS = """\
A field that is null counts as absent. Fields go together so: `stream_options` and `stream_pace` with
`stream: true`, `stream_pace` with `tpot_slo_ms`, `top_logprobs` with `logprobs: true`, `max_tokens: 0`
with `echo`, `best_of` equal to `n`, `min_tokens` up to `max_tokens`. `response_format`,
`structured_outputs` and the `guided_*` exclude each other, and `min_tokens` and `ignore_eos` with them.
`tool_choice` names one of `tools`; a call that must be made, a strict function, or
`parallel_tool_calls: false` exclude `response_format`. Prompt and output together fit the model's
context."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Of this server and its models."""

    limits: LimitsConfig
    models: tuple[str, ...]
    vocab_size: int  # the least of the models'
    max_model_len: int  # the most of the workers that are up; MAX_INT before there are any


def completion(bounds: Bounds) -> Schema:
    limits = bounds.limits
    ids = array(_token(bounds), minItems=1, maxItems=bounds.max_model_len)
    texts = {"minItems": 1, "maxItems": limits.max_prompts}
    text = {"type": "string", "minLength": 1}
    body = _generation(CompletionRequest, bounds, COMPLETION_REFUSED)
    body["properties"] |= {
        "prompt": any_of(text, ids, array(text, **texts), array(ids, **texts)),
        "best_of": nullable({"type": "integer", "minimum": 1, "maximum": limits.max_n}),
        "logprobs": nullable(COUNT | {"maximum": limits.max_logprobs}),
        "suffix": _neutral("suffix"),
    }
    body["required"] = ["prompt"]
    return body


def chat(bounds: Bounds) -> Schema:
    limits = bounds.limits
    body = _generation(ChatRequest, bounds, ())
    room = nullable({"type": "integer", "minimum": 1, "maximum": bounds.max_model_len})
    body["properties"] |= {
        "messages": _messages(limits),
        "max_tokens": room,
        "max_completion_tokens": room,
        "top_logprobs": nullable(COUNT | {"maximum": limits.max_logprobs}),
        "response_format": nullable(_response_format()),
        "tools": nullable(array(_tool(), maxItems=MAX_TOOLS)),
        "tool_choice": nullable(any_of(enum("none", "auto", "required"), _named(), _allowed())),
        **{name: _neutral(name) for name in CHAT_NEUTRAL},
    }
    return body


def tokenize(bounds: Bounds) -> Schema:
    body = _plain(TokenizeRequest)
    body["properties"] |= {"model": _model(bounds), "messages": nullable(_messages(bounds.limits))}
    body["description"] = "One of `prompt` and `messages`."
    body["oneOf"] = [
        {"required": ["prompt"], "properties": {"prompt": TEXT, "messages": NULL}},
        {"required": ["messages"], "properties": {"messages": {"type": "array"}, "prompt": NULL}},
    ]
    return body


def detokenize(bounds: Bounds) -> Schema:
    body = _plain(DetokenizeRequest)
    body["properties"]["model"] = _model(bounds)
    return body


def headers(bounds: Bounds) -> dict[str, Schema]:
    """Of HEADERS."""
    slo, priority = _slo(bounds.limits), _priority(bounds.limits)
    return dict(zip(HEADERS, (slo, slo, priority, FLAG), strict=True))


HEADERS = ("Tpot-Slo-Ms", "Ttft-Slo-Ms", "Priority", "Stream-Pace")  # of x-ellm-...
COMPLETION_REFUSED = ("parallel_tool_calls",)
CHAT_NEUTRAL = (
    "store", "service_tier", "verbosity", "functions", "function_call", "modalities", "reasoning_effort",
)  # fmt: skip
_HINTS: dict[str, Schema] = {  # of HARMLESS, what clients send
    "user": TEXT,
    "metadata": OBJECT,
    "safety_identifier": TEXT,
    "prompt_cache_key": TEXT,
    "request_id": TEXT,
}
_GRAMMAR: Schema = {"type": "string", "minLength": 1}
_CHOICES = array({"type": "string", "minLength": 1}, minItems=1, maxItems=MAX_CHOICES)
_JSON_SCHEMA: Schema = {
    "type": "object",
    "description": "A JSON schema, as far as llguidance knows it.",
    "examples": [{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}],
}


def _generation(kind: type[BaseModel], bounds: Bounds, without: tuple[str, ...]) -> Schema:
    limits, body = bounds.limits, _plain(kind)
    room = nullable(COUNT | {"maximum": bounds.max_model_len})
    stop = {"type": "string", "minLength": 1, "maxLength": limits.max_stop_chars}
    body["description"] = RELATIONS
    body["properties"] |= {
        "model": _model(bounds),
        "n": nullable({"type": "integer", "minimum": 1, "maximum": limits.max_n}),
        "max_tokens": room,
        "min_tokens": room,
        "stream_options": nullable(closed(_stream_options())),
        "logit_bias": nullable(_logit_bias(bounds)),
        "stop": nullable(any_of(stop, array(stop, maxItems=limits.max_stop))),
        "stop_token_ids": nullable(array(_token(bounds), maxItems=MAX_STOP_TOKEN_IDS)),
        "tpot_slo_ms": nullable(_slo(limits)),
        "ttft_slo_ms": nullable(_slo(limits)),
        "priority": nullable(_priority(limits)),
        "structured_outputs": nullable(_structured()),
        "guided_json": nullable(any_of(_JSON_SCHEMA, FLAG)),
        "guided_regex": nullable(_GRAMMAR),
        "guided_choice": nullable(_CHOICES),
        "guided_grammar": nullable(_GRAMMAR),
        **{name: nullable(hint) for name, hint in _HINTS.items() if name not in without},
    }
    assert set(_HINTS) <= HARMLESS
    return body


def _slo(limits: LimitsConfig) -> Schema:
    return {"type": "number", "minimum": limits.min_slo_ms, "maximum": limits.max_slo_ms}


def _priority(limits: LimitsConfig) -> Schema:
    return {"type": "integer", "minimum": limits.min_priority, "maximum": limits.max_priority}


def _plain(kind: type[BaseModel]) -> Schema:
    """What pydantic says of the model, without references; no field is taken that it does not know."""
    found = kind.model_json_schema()
    properties = {name: _bare(field) for name, field in found["properties"].items()}
    return {
        "type": "object",
        "properties": properties,
        "required": found.get("required", []),
        "additionalProperties": False,
    }


def _bare(field: Any) -> Schema:
    return {
        key: value for key, value in field.items() if key != "title" and (key, value) != ("default", None)
    }


def _neutral(name: str) -> Schema:
    """The values that ask for what happens anyway."""
    return enum(None, *NEUTRAL[name])


def _model(bounds: Bounds) -> Schema:
    """It may be left out where there is one."""
    return enum(*bounds.models, *([None] if len(bounds.models) == 1 else []))


def _token(bounds: Bounds) -> Schema:
    return COUNT | {"maximum": bounds.vocab_size - 1}


def _logit_bias(bounds: Bounds) -> Schema:
    return {
        "type": "object",
        "propertyNames": {"pattern": token_id_pattern(bounds.vocab_size)},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        "maxProperties": bounds.limits.max_logit_bias,
    }


def _stream_options() -> Schema:
    return {
        "include_usage": nullable(FLAG),
        "continuous_usage_stats": nullable(FLAG),
        "include_obfuscation": enum(False, None),
    }


def _structured() -> Schema:
    """Exactly one kind."""
    kinds = {
        "json": any_of(_JSON_SCHEMA, FLAG),
        "json_object": const(True),
        "regex": _GRAMMAR,
        "choice": _CHOICES,
        "grammar": _GRAMMAR,
    }
    return any_of(*(closed(**{kind: schema}) for kind, schema in kinds.items()))


def _response_format() -> Schema:
    spec = closed(
        {"schema": _JSON_SCHEMA, "strict": nullable(FLAG), "description": nullable(TEXT)}, name=TEXT
    )
    return any_of(
        closed(type=enum("text", "json_object")), closed(type=const("json_schema"), json_schema=spec)
    )


_NAME: Schema = {"type": "string", "pattern": "^[a-zA-Z0-9_.-]{1,64}$"}


def _tool() -> Schema:
    parameters = {
        "type": "object",
        "description": "A JSON schema of an object.",
        "properties": {"type": const("object"), "properties": OBJECT},
    }
    function = closed(
        {"description": nullable(TEXT), "parameters": nullable(parameters), "strict": nullable(FLAG)},
        name=_NAME,
    )
    return closed(type=const("function"), function=function)


def _named() -> Schema:
    return closed(type=const("function"), function=closed(name=_NAME))


def _allowed() -> Schema:
    allowed = closed(mode=enum("auto", "required"), tools=array(_named(), minItems=1, maxItems=MAX_TOOLS))
    return closed(type=const("allowed_tools"), allowed_tools=allowed)


def _messages(limits: LimitsConfig) -> Schema:
    """Fields of a client's own reach the model's template; these are the ones with a meaning."""
    part = closed(type=const("text"), text=TEXT)
    content = any_of(TEXT, array(part, minItems=1))
    arguments = {**TEXT, "contentMediaType": "application/json", "contentSchema": OBJECT}
    call = closed({"id": TEXT}, type=const("function"), function=closed(name=TEXT, arguments=arguments))
    said = closed({"name": TEXT}, role=enum("system", "developer", "user", "assistant"), content=content)
    called = closed(
        {"name": TEXT, "content": nullable(content)},
        role=const("assistant"),
        tool_calls=array(call, minItems=1, maxItems=MAX_CALLS),
    )
    result = closed(role=const("tool"), tool_call_id=TEXT, content=content)
    return array(any_of(said, called, result), minItems=1, maxItems=limits.max_messages)
