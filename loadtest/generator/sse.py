"""Server-sent events of an OpenAI stream, taken into a Record. Reads any line ending, comments, cut lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from ellm.loadtest.generator.record import Record

try:  # comes with the `serve` extra; the standard library does as well, at four times the cost
    import orjson
except ImportError:
    _loads: Callable[[bytes], Any] = json.loads
else:
    _loads = orjson.loads

_OUTPUT_FIELDS = ("content", "reasoning_content", "reasoning", "tool_calls", "refusal")


class EventReader:
    """Bytes in, figures into `record`. `now` gives seconds since the start of the run."""

    def __init__(self, record: Record, now: Callable[[], float], keep_text: bool = False) -> None:
        self._record = record
        self._now = now
        self._keep = keep_text
        self._rest = b""
        self._pieces: list[str] = []
        self.done = False  # [DONE] or a finish reason has come

    def feed(self, data: bytes) -> None:
        """All events of one read came at one time."""
        time = self._now()
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), time)

    def end(self) -> None:
        """The response has ended. Sets the record's outcome."""
        record = self._record
        if self._rest.startswith(b"data:"):
            self._event(self._rest[5:].strip(), self._now())
        if self._keep:
            record.text = "".join(self._pieces)
        if record.error:
            return
        if not record.chunk_times:
            record.error = "an answer without output"
        elif not self.done:
            record.error = "the stream ended without finish_reason or [DONE]"
        if not record.output_tokens:
            record.output_tokens = len(record.chunk_times)

    def whole(self, data: bytes) -> None:
        """An answer that was not streamed: its output came at once."""
        try:
            answer = _loads(data)
        except ValueError:
            self._record.error = "the answer is neither an event stream nor JSON"
            return
        self._take(answer, self._now())
        self.done = True

    def _event(self, data: bytes, time: float) -> None:
        if data == b"[DONE]":
            self.done = True
            return
        if not data:
            return
        try:
            event = _loads(data)
        except ValueError:
            self._record.error = "an event that is no JSON"
            return
        if not isinstance(event, dict):
            self._record.error = "an event that is no object"
            return
        self._take(event, time)

    def _take(self, event: dict[str, Any], time: float) -> None:
        record = self._record
        if error := event.get("error"):
            message = error.get("code") or error.get("message") if isinstance(error, dict) else error
            record.error = f"in the stream: {message}"
            return
        if choices := event.get("choices"):
            choice = choices[0]
            text = self._output(choice)
            if text is not None:
                record.chunk_times.append(time)
                if self._keep:
                    self._pieces.append(text)
            if reason := choice.get("finish_reason"):
                record.finish_reason = reason
                self.done = True
        if usage := event.get("usage"):
            record.output_tokens = usage.get("completion_tokens") or 0
            record.prompt_tokens = usage.get("prompt_tokens") or record.prompt_tokens
            details = usage.get("prompt_tokens_details") or {}
            record.cached_tokens = details.get("cached_tokens") or 0

    def _output(self, choice: dict[str, Any]) -> str | None:
        """The choice's new text; None for a chunk that carries no output: a chat's role, an empty ending."""
        if (text := choice.get("text")) is not None:
            # An empty text is a token without one (half a character), but for the chunk that only ends.
            return str(text) if text or not choice.get("finish_reason") else None
        delta = choice.get("delta") or choice.get("message")
        if not delta:
            return None
        for name in _OUTPUT_FIELDS:
            if delta.get(name):
                return str(delta[name]) if name == "content" else ""
        return "" if "role" not in delta and "content" in delta and not choice.get("finish_reason") else None
