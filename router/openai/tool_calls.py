"""Finds tool calls in a text that comes in pieces: the Hermes format, which Qwen shares, and Llama 3's.

    Hermes    <tool_call>\\n{"name": "f", "arguments": {...}}\\n</tool_call>    anywhere in the text
    Llama 3   {"name": "f", "parameters": {...}}                              instead of a text

A call's arguments are given out as they come, byte for byte. What looks like a call and is none comes back as
text. The result does not depend on how the text is cut into pieces.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a model writes calls."""

    name: str
    begin: str
    end: str
    between: str
    arguments: str  # the key

    @property
    def opening(self) -> str:
        return self.begin.strip()

    @property
    def closing(self) -> str:
        return self.end.strip()


HERMES = ToolFormat("hermes", "<tool_call>\n", "\n</tool_call>", "\n", "arguments")
LLAMA3 = ToolFormat("llama3", "", "", "; ", "parameters")
_TAG = "<|python_tag|>"  # may come before Llama 3's first call


@dataclass(frozen=True, slots=True)
class Said:
    """Text that is no call."""

    text: str


@dataclass(frozen=True, slots=True)
class Called:
    """New of a call: its name, once, or more of its arguments."""

    index: int
    name: str | None
    arguments: str


Event = Said | Called


class _ObjectEnd:
    """Where a JSON object ends; fed from its first brace on."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = False

    def feed(self, text: str) -> int:
        """Just behind its end, or -1 if that is yet to come."""
        for i, char in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._in_string = False
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if not self._depth:
                    return i + 1
        return -1


class _Call:
    """One call's object."""

    def __init__(self) -> None:
        self.raw = ""
        self.name: str | None = None
        self._outer, self._inner = _ObjectEnd(), _ObjectEnd()
        self._at = -1  # in `raw`: up to here arguments were given out
        self._given = False  # all of them

    def feed(self, text: str) -> tuple[str, str | None]:
        """(new arguments, what follows the object or None while it goes on)."""
        end = self._outer.feed(text)
        self.raw += text if end < 0 else text[:end]
        new = self._arguments()
        if end < 0:
            return new, None
        if self.name is None:
            new = self._read_whole()
        return new, text[end:]

    def _arguments(self) -> str:
        if self.name is None:
            head = _HEAD.match(self.raw)
            if head is None:
                return ""
            self.name, self._at = _text(head[1]), head.end()
        if self._given:
            return ""
        part = self.raw[self._at :]
        end = self._inner.feed(part)
        if end >= 0:
            self._given, part = True, part[:end]
        self._at += len(part)
        return part

    def _read_whole(self) -> str:
        """An object in another order: known when it is complete."""
        try:
            found = json.loads(self.raw)
        except ValueError:
            return ""
        name = found.get("name")
        if not isinstance(name, str):
            return ""
        self.name = name
        arguments = found.get("arguments", found.get("parameters", {}))
        return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _text(quoted: str) -> str:
    try:
        return str(json.loads(quoted))
    except ValueError:  # an escape that is none
        return quoted[1:-1]


class ToolCallParser:
    """Of one choice."""

    def __init__(self, form: ToolFormat) -> None:
        self._form = form
        self._anywhere = bool(form.opening)
        self._held = ""  # not judged yet
        self._blank = ""  # shown only if text follows
        self._call: _Call | None = None
        self._closing = False  # behind a call's object
        self._text_only = False  # Llama 3 writes calls or a text
        self.num_calls = 0

    def feed(self, text: str) -> list[Event]:
        events: list[Event] = []
        self._held += text
        while self._held and self._step(events):
            pass
        return events

    def finish(self) -> list[Event]:
        """What was held back, at the end of the text. A call that was cut off stays as it is."""
        events: list[Event] = []
        held, self._held = self._held, ""
        if self._call is not None and self._call.name is None:
            held = self._form.opening + self._call.raw + held
            self._call = None
        if self._call is None and not self._closing:
            self._say(events, held)
        return events

    def _step(self, events: list[Event]) -> bool:
        """Judge some of what is held; False: more must come first."""
        if self._call is not None:
            return self._read_call(events, self._call)
        if self._closing:
            return self._close()
        return self._find(events) if self._anywhere else self._begin_llama(events)

    def _read_call(self, events: list[Event], call: _Call) -> bool:
        held, self._held = self._held, ""
        if (call.raw + held).lstrip()[:1] not in ("{", ""):  # no call after all
            self._call, self._held = None, held
            self._say(events, self._form.opening + call.raw)
            return True
        known = call.name is not None
        arguments, rest = call.feed(held)
        if call.name is not None and not known:
            events.append(Called(self.num_calls, call.name, ""))
            self.num_calls += 1
            self._blank = ""
        if arguments and call.name is not None:
            events.append(Called(self.num_calls - 1, None, arguments))
        if rest is None:
            return False
        self._call, self._held = None, rest
        if call.name is None:
            self._say(events, self._form.opening + call.raw)
            self._text_only = not self._anywhere
        else:
            self._closing = True
        return True

    def _close(self) -> bool:
        """Skip what ends a call."""
        held, closing = self._held.lstrip(), self._form.closing or ";"
        if closing.startswith(held):
            self._held = held
            if held == closing:
                self._held, self._closing = "", False
            return False
        self._closing = False
        self._held = held.removeprefix(closing)
        return True

    def _find(self, events: list[Event]) -> bool:
        """Text up to the next call."""
        opening, held = self._form.opening, self._held
        at = held.find(opening)
        if at >= 0:
            self._say(events, held[:at])
            self._held, self._call = held[at + len(opening) :], _Call()
            return True
        keep = next((n for n in range(len(opening) - 1, 0, -1) if held.endswith(opening[:n])), 0)
        self._held = held[len(held) - keep :]
        self._say(events, held[: len(held) - keep])
        return False

    def _begin_llama(self, events: list[Event]) -> bool:
        """Calls or a text: its first character tells."""
        start = self._held.lstrip()
        if self._text_only:
            self._say(events, self._held)
            self._held = ""
            return False
        rest = start.removeprefix(_TAG).lstrip()
        if not rest or _TAG.startswith(start):
            return False
        if rest[0] == "{":
            self._held, self._call = rest, _Call()
        else:
            self._text_only = True
        return True

    def _say(self, events: list[Event], text: str) -> None:
        """Blanks around calls are no text."""
        text = self._blank + text
        shown = text.rstrip() if self._anywhere else text
        self._blank = text[len(shown) :]
        if shown:
            events.append(Said(shown))
