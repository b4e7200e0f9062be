"""A chat's messages, checked and made plain: what a template may see of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from ellm.worker.api.errors import InvalidRequest

# Of OpenAI's message types. What is refused changes a prompt in ways that no template here knows; all else, a
# client's own fields included, reaches the template.
READ_BY_TEMPLATE = frozenset({"role", "content", "name", "refusal", "tool_calls", "tool_call_id"})
REFUSED = ("audio", "function_call")
MAX_CALLS = 256  # of one message
_ROLE = re.compile(r"[a-z_]{1,32}")


def plain_messages(messages: Sequence[Mapping[str, Any]], max_messages: int) -> list[dict[str, Any]]:
    """Each with a role and, as one text, its content. Raises InvalidRequest that names the message."""
    if not messages:
        raise InvalidRequest("messages: at least one", param="messages")
    if len(messages) > max_messages:
        raise InvalidRequest(f"messages: at most {max_messages}", param="messages")
    return [_plain(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _plain(message: Mapping[str, Any], path: str) -> dict[str, Any]:
    role = message.get("role")
    if not isinstance(role, str) or not _ROLE.fullmatch(role):
        raise InvalidRequest(
            f"{path}.role: one of system, developer, user, assistant, tool", param=f"{path}.role"
        )
    for name in REFUSED:
        if message.get(name) is not None:
            raise InvalidRequest(f"{path}.{name} is not supported", param=f"{path}.{name}")
    content = message.get("content")
    if message.get("tool_calls"):
        calls = _calls(message["tool_calls"], f"{path}.tool_calls")
        text = None if content is None else _text(content, f"{path}.content")
        return {**message, "content": text, "tool_calls": calls}
    return {**message, "content": _text(content, f"{path}.content")}


def _calls(calls: Any, path: str) -> list[dict[str, Any]]:
    """Templates want a call's arguments as an object, clients send them as its text."""
    if not isinstance(calls, list) or len(calls) > MAX_CALLS:
        raise InvalidRequest(f"{path}: a list of at most {MAX_CALLS}", param=path)
    made = []
    for i, call in enumerate(calls):
        where = f"{path}[{i}]"
        if not isinstance(call, Mapping) or call.get("type", "function") != "function":
            raise InvalidRequest(f"{where}.type: function; others are not supported", param=f"{where}.type")
        function = call.get("function")
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise InvalidRequest(
                f"{where}.function: an object with name and arguments", param=f"{where}.function"
            )
        field = f"{where}.function.arguments"
        arguments = _arguments(function.get("arguments"), field)
        made.append({**call, "type": "function", "function": {**function, "arguments": arguments}})
    return made


def _arguments(arguments: Any, field: str) -> Any:
    try:
        read = orjson.loads(arguments or "{}") if isinstance(arguments, str | None) else arguments
    except orjson.JSONDecodeError:
        raise InvalidRequest(f"{field}: an object as JSON", param=field) from None
    if not isinstance(read, Mapping):
        raise InvalidRequest(f"{field}: an object as JSON", param=field)
    return read


def _text(content: Any, path: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise InvalidRequest(f"{path}: a text, or a list of text parts", param=path)
    texts = []
    for i, part in enumerate(content):
        where = f"{path}[{i}]"
        if not isinstance(part, Mapping):
            raise InvalidRequest(f"{where}: an object with type and text", param=where)
        if part.get("type") != "text":
            raise InvalidRequest(f"{where}.type: this model reads text alone", param=f"{where}.type")
        if not isinstance(part.get("text"), str):
            raise InvalidRequest(f"{where}.text: a text", param=f"{where}.text")
        texts.append(part["text"])
    return "\n".join(texts)
