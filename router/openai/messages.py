"""A chat's messages, checked and made plain: what a template may see of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ellm.worker.api.errors import InvalidRequest

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
    content = message.get("content")
    if content is None and role == "assistant" and message.get("tool_calls"):
        return {**message, "content": None}
    return {**message, "content": _text(content, f"{path}.content")}


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
