"""From a model's text to the parts of an assistant's message: reasoning, content, tool calls.

One parser serves one choice, streamed or not; the parts do not depend on how the text is cut into pieces.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ellm.router.openai.tool_calls import Called, Event, Said, ToolCallParser, ToolFormat

BEGIN, END = "<think>", "</think>"
_BEGIN, _END = BEGIN.encode(), END.encode()


@dataclass(frozen=True, slots=True)
class Parsing:
    """What a request's answers are parsed for."""

    tools: ToolFormat | None = None
    reasoning: bool = False  # the model thinks aloud first
    opened: bool = False  # the prompt has begun that already
    include_reasoning: bool = True


def reasons(template: str) -> bool:
    """Models whose chat template knows the mark think aloud."""
    return END in template


class _Place(Enum):
    START = "start"  # nothing but blanks and the beginning of a mark
    INSIDE = "inside"
    AFTER = "after"


class _Reasoning:
    """Splits off what stands between <think> and </think> at the start, without the blanks around it."""

    def __init__(self, opened: bool) -> None:
        self._place = _Place.INSIDE if opened else _Place.START
        self._held = ""
        self._bare = opened  # nothing of this part was shown: its leading blanks go

    @property
    def inside(self) -> bool:
        return self._place is _Place.INSIDE

    def feed(self, text: str) -> list[tuple[bool, str]]:
        """(it is reasoning, text) in order."""
        self._held += text
        parts: list[tuple[bool, str]] = []
        if self._place is _Place.START:
            self._begin()
        if self._place is _Place.INSIDE:
            self._think(parts)
        if self._place is _Place.AFTER:
            held, self._held = self._held, ""
            self._show(parts, False, held)
        return parts

    def finish(self) -> list[tuple[bool, str]]:
        """What was held back."""
        held, self._held = self._held.rstrip() if self.inside else self._held, ""
        parts: list[tuple[bool, str]] = []
        self._show(parts, self.inside, held)
        return parts

    def _begin(self) -> None:
        start = self._held.lstrip()
        if start.startswith(BEGIN):
            self._place, self._bare, self._held = _Place.INSIDE, True, start[len(BEGIN) :]
        elif not BEGIN.startswith(start):
            self._place = _Place.AFTER

    def _think(self, parts: list[tuple[bool, str]]) -> None:
        held = self._held
        at = held.find(END)
        if at >= 0:
            self._show(parts, True, held[:at].rstrip())
            self._place, self._bare, self._held = _Place.AFTER, True, held[at + len(END) :]
            return
        keep = next((n for n in range(len(END) - 1, 0, -1) if held.endswith(END[:n])), 0)
        shown = held[: len(held) - keep].rstrip()
        self._held = held[len(shown) :]
        self._show(parts, True, shown)

    def _show(self, parts: list[tuple[bool, str]], reasoning: bool, text: str) -> None:
        if self._bare:
            text = text.lstrip()
        if text:
            self._bare = False
            parts.append((reasoning, text))


class _ReasoningTokens:
    """How many tokens the reasoning took, its marks included; by the tokens' own bytes, so that it does not
    matter how many of them come at once."""

    def __init__(self, opened: bool) -> None:
        self._begun = opened
        self._over = False
        self._seen = b""
        self._count = 0

    @property
    def count(self) -> int:
        return self._count if self._begun else 0

    def add(self, tokens: Iterable[bytes]) -> None:
        for token in tokens:
            if self._over:
                return
            self._seen += token
            self._count += 1
            start = self._seen.lstrip()
            if not self._begun and not _BEGIN.startswith(start):
                self._begun = start.startswith(_BEGIN)
                self._over = not self._begun
            if self._begun:
                self._over = _END in self._seen
                self._seen = self._seen[-len(_END) :]


class ChatParser:
    """Of one choice. `feed` and `finish` return deltas of a stream; `message` says all that there was."""

    def __init__(self, parsing: Parsing) -> None:
        self._parsing = parsing
        self._reasoning = _Reasoning(parsing.opened) if parsing.reasoning else None
        self._tools = ToolCallParser(parsing.tools) if parsing.tools is not None else None
        self._content: list[str] = []
        self._thoughts: list[str] = []
        self._calls: list[dict[str, Any]] = []
        self._count = _ReasoningTokens(parsing.opened)

    @property
    def called(self) -> bool:
        return bool(self._calls)

    @property
    def reasoning_tokens(self) -> int:
        return self._count.count

    def feed(self, text: str, tokens: Iterable[bytes] = ()) -> list[dict[str, Any]]:
        """New text, and the bytes of the new tokens each by itself."""
        if self._reasoning is None:
            return self._plain(text)
        self._count.add(tokens)
        return [delta for part in self._reasoning.feed(text) for delta in self._part(*part)]

    def finish(self) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        if self._reasoning is not None:
            deltas += [delta for part in self._reasoning.finish() for delta in self._part(*part)]
        if self._tools is not None:
            deltas += self._deltas(self._tools.finish())
        return deltas

    def message(self) -> dict[str, Any]:
        """The assistant's message, at the end."""
        content = "".join(self._content)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self._thoughts and self._parsing.include_reasoning:
            message["reasoning_content"] = "".join(self._thoughts)
        if self._calls:
            message["content"] = content or None
            message["tool_calls"] = [
                {
                    "id": call["id"], "type": "function",
                    "function": {"name": call["name"], "arguments": "".join(call["arguments"])},
                }
                for call in self._calls
            ]  # fmt: skip
        return message

    def _part(self, reasoning: bool, text: str) -> list[dict[str, Any]]:
        if not reasoning:
            return self._plain(text)
        self._thoughts.append(text)
        return [{"reasoning_content": text}] if self._parsing.include_reasoning else []

    def _plain(self, text: str) -> list[dict[str, Any]]:
        if self._tools is not None:
            return self._deltas(self._tools.feed(text))
        return self._deltas([Said(text)] if text else [])

    def _deltas(self, events: list[Event]) -> list[dict[str, Any]]:
        return [self._called(event) if isinstance(event, Called) else self._said(event) for event in events]

    def _said(self, event: Said) -> dict[str, Any]:
        self._content.append(event.text)
        return {"content": event.text}

    def _called(self, event: Called) -> dict[str, Any]:
        if event.name is None:
            self._calls[event.index]["arguments"].append(event.arguments)
            return {"tool_calls": [{"index": event.index, "function": {"arguments": event.arguments}}]}
        call = {"id": "call_" + uuid.uuid4().hex[:24], "name": event.name, "arguments": []}
        self._calls.append(call)
        return {
            "tool_calls": [
                {
                    "index": event.index, "id": call["id"], "type": "function",
                    "function": {"name": event.name, "arguments": ""},
                }
            ]
        }  # fmt: skip
