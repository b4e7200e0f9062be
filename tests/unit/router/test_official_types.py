"""Every field of the official client's types is known here: honoured, a hint that changes no result, or
refused by name. A release of the client that has another one fails these tests."""

from __future__ import annotations

import typing
from typing import Any

import openai.types.chat as chat_types
import pytest
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.chat.chat_completion_stream_options_param import ChatCompletionStreamOptionsParam
from openai.types.shared_params.function_definition import FunctionDefinition
from openai.types.shared_params.response_format_json_schema import JSONSchema

from ellm.router.openai.messages import READ_BY_TEMPLATE, REFUSED, plain_messages
from ellm.router.openai.schema import (
    HARMLESS,
    NEUTRAL,
    ChatRequest,
    CompletionRequest,
    StreamOptions,
    parse,
)
from ellm.router.openai.structured import JSON_SCHEMA_FIELDS, structure
from ellm.router.openai.tools import FUNCTION_FIELDS, tool_use
from ellm.worker.api.errors import InvalidRequest

MESSAGES = [{"role": "user", "content": "Hi"}]
KINDS: list[tuple[Any, Any, dict[str, Any]]] = [
    (chat_params.CompletionCreateParamsBase, ChatRequest, {"messages": MESSAGES}),
    (completion_params.CompletionCreateParamsBase, CompletionRequest, {"prompt": "Hi"}),
]
MESSAGE_TYPES = [getattr(chat_types, n) for n in dir(chat_types) if n.endswith("MessageParam")]
PART_TYPES = typing.get_args(
    typing.get_type_hints(chat_types.ChatCompletionUserMessageParam)["content"].__args__[1].__args__[0]
)


def keys(type_: Any) -> set[str]:
    return set(getattr(type_, "__annotations__", {}))


@pytest.mark.parametrize(("official", "ours", "body"), KINDS, ids=["chat", "completion"])
def test_every_field_is_honoured_or_refused_by_name(official: Any, ours: Any, body: dict[str, Any]) -> None:
    names = keys(official) | {"stream"}
    assert len(names) > 16
    honoured = set(ours.model_fields)
    assert not honoured & HARMLESS - {"parallel_tool_calls"}  # of completions it is none
    for name in sorted(names - honoured - HARMLESS):
        with pytest.raises(InvalidRequest) as refused:
            parse(ours, body | {name: {"something": "else"}})
        assert refused.value.param == name
        assert refused.value.message == f"{name} is not supported"  # not: is not a field
        for value in (None, *NEUTRAL.get(name, ())):
            parse(ours, body | {name: value})


def test_stream_options() -> None:
    assert keys(ChatCompletionStreamOptionsParam) <= set(StreamOptions.model_fields)
    body = {"messages": MESSAGES, "stream": True}
    for options, field in (
        ({"include_obfuscation": True}, "stream_options.include_obfuscation"),
        ({"include_everything": True}, "stream_options.include_everything"),
    ):
        with pytest.raises(InvalidRequest) as refused:
            parse(ChatRequest, body | {"stream_options": options})
        assert refused.value.param == field
    parse(ChatRequest, body | {"stream_options": {"include_usage": None, "include_obfuscation": False}})


def test_messages() -> None:
    assert len(MESSAGE_TYPES) > 5
    assert set().union(*map(keys, MESSAGE_TYPES)) <= READ_BY_TEMPLATE | set(REFUSED)
    for name in REFUSED:
        with pytest.raises(InvalidRequest) as refused:
            plain_messages([{"role": "assistant", "content": "a", name: {"id": "x"}}], 9)
        assert refused.value.param == f"messages[0].{name}"


def test_parts_of_a_content() -> None:
    """Text is read; pictures, sounds and files are refused by their type."""
    assert len(PART_TYPES) >= 4
    for part in PART_TYPES:
        (kind,) = typing.get_args(typing.get_type_hints(part)["type"])
        message = {"role": "user", "content": [{"type": kind, kind: {}} | {"text": "a"}]}
        if kind == "text":
            assert plain_messages([message], 9)[0]["content"] == "a"
            continue
        with pytest.raises(InvalidRequest) as refused:
            plain_messages([message], 9)
        assert refused.value.param == "messages[0].content[0].type"


def test_response_formats() -> None:
    assert keys(JSONSchema) == JSON_SCHEMA_FIELDS
    formats = typing.get_args(typing.get_type_hints(KINDS[0][0])["response_format"])
    kinds = {typing.get_args(typing.get_type_hints(one)["type"])[0] for one in formats}
    assert kinds == {"text", "json_object", "json_schema"}
    spec = {"name": "a", "description": "b", "strict": True, "schema": {"type": "null"}}
    for kind in kinds:
        asked = {"type": kind} | ({"json_schema": spec} if kind == "json_schema" else {})
        found = structure(parse(ChatRequest, {"messages": MESSAGES, "response_format": asked}))
        assert (found is None) == (kind == "text")


def test_tools() -> None:
    assert keys(FunctionDefinition) == FUNCTION_FIELDS
    function = {"type": "function", "function": {"name": "f"}}
    (choices,) = (typing.get_type_hints(KINDS[0][0])["tool_choice"],)
    assert len(typing.get_args(choices)) == 4  # a word, allowed tools, a function, a custom tool
    body = {"messages": MESSAGES, "tools": [function]}
    for choice in ("none", "auto", "required", function):
        use = tool_use(parse(ChatRequest, body | {"tool_choice": choice}))
        assert (use is None) == (choice == "none")
    for changed, field in (
        ({"tool_choice": {"type": "custom", "custom": {"name": "f"}}}, "tool_choice.type"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
    ):
        with pytest.raises(InvalidRequest) as refused:
            tool_use(parse(ChatRequest, body | changed))
        assert refused.value.param == field
