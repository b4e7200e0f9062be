"""Turns token ids into text as they come, and never shows half a character.

What the pieces add up to is what the tokenizer's own decoder makes of all ids at once. Which of the three
bodies fits is decided once per tokenizer, by `DetokenizerFactory`; a body holds one sequence's state:

- `ByteDetokenizer`: byte-level BPE. Every token is bytes; text is their UTF-8, malformed bytes replaced.
- `FallbackDetokenizer`: sentencepiece with byte fallback. A run of byte tokens is text only as a whole, so
  it is held back until it ends, and the first leading space of a text is dropped.
- `WindowDetokenizer`: any other decoder, by decoding a short window of ids twice.

Knows nothing of requests, stop strings or the wire.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Detokenizer(Protocol):
    """State of one sequence."""

    def feed(self, token_ids: Sequence[int]) -> str:
        """Text that these ids complete; "" while a character is open."""
        ...

    def flush(self) -> str:
        """What is left at the end, malformed bytes replaced. No `feed` may follow."""
        ...


def byte_alphabet() -> dict[str, int]:
    """GPT-2's map of the 256 bytes to printable characters, inverted."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    shifted = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(shifted)}


@dataclass(frozen=True, slots=True)
class TokenTable:
    """What each id stands for. A text is None where its bytes are not whole characters."""

    data: list[bytes]
    text: list[str | None]

    @classmethod
    def of(cls, data: list[bytes]) -> TokenTable:
        return cls(data, [_whole(b) for b in data])


def _whole(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


class ByteDetokenizer:
    """Tokens are bytes. Ids beyond the table (padding of the vocabulary) have no text."""

    __slots__ = ("_data", "_decoder", "_open", "_text")

    def __init__(self, table: TokenTable) -> None:
        self._data = table.data
        self._text = table.text
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._open = False

    def feed(self, token_ids: Sequence[int]) -> str:
        if len(token_ids) == 1 and not self._open:
            token_id = token_ids[0]
            if token_id >= len(self._text):
                return ""
            text = self._text[token_id]
            if text is not None:  # nearly every token: no decoding at all
                return text
        data = self._data
        joined = b"".join([data[i] for i in token_ids if i < len(data)])
        text = self._decoder.decode(joined)
        self._open = bool(self._decoder.getstate()[0])
        return text

    def flush(self) -> str:
        return self._decoder.decode(b"", True)


class FallbackDetokenizer:
    """Tokens are text or single bytes; `strip` leading spaces of the whole text go.

    The decoder joins a run of byte tokens: its characters where all of it is UTF-8, else one replacement
    character per byte. Which of the two is known at its end only.
    """

    __slots__ = ("_run", "_strip", "_tokens")

    def __init__(self, tokens: Sequence[str | int], strip: int) -> None:
        self._tokens = tokens
        self._strip = strip
        self._run = bytearray()

    def feed(self, token_ids: Sequence[int]) -> str:
        parts = []
        for token_id in token_ids:
            piece = self._tokens[token_id] if token_id < len(self._tokens) else ""
            if isinstance(piece, int):
                self._run.append(piece)
            elif piece:
                if self._run:
                    parts.append(self._end_run())
                parts.append(piece)
        return self._stripped("".join(parts))

    def flush(self) -> str:
        return self._stripped(self._end_run()) if self._run else ""

    def _end_run(self) -> str:
        run = bytes(self._run)
        self._run.clear()
        text = _whole(run)
        return REPLACEMENT * len(run) if text is None else text

    def _stripped(self, text: str) -> str:
        while self._strip and text:
            if text[0] != " ":
                self._strip = 0
                break
            text = text[1:]
            self._strip -= 1
        return text


class WindowDetokenizer:
    """Decodes the ids since the last text that stood alone, and again with the new ones: the difference is
    new. Text that ends in a replacement character may be half a character, and waits."""

    __slots__ = ("_decode", "_ids", "_prefix", "_read")

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._prefix = 0
        self._read = 0

    def feed(self, token_ids: Sequence[int]) -> str:
        self._ids.extend(token_ids)
        before, after = self._texts()
        if len(after) <= len(before) or after.endswith(REPLACEMENT):
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        return after[len(before) :]

    def flush(self) -> str:
        before, after = self._texts()
        return after[len(before) :]

    def _texts(self) -> tuple[str, str]:
        before = self._decode(self._ids[self._prefix : self._read])
        return before, self._decode(self._ids[self._prefix :])


class DetokenizerFactory:
    """Chooses the body for one tokenizer, and holds the tables that all its sequences share."""

    def __init__(
        self,
        decoder: dict[str, Any] | None,
        tokens: Sequence[str | None],
        special_ids: frozenset[int],
        decode: Callable[[Sequence[int], bool], str],
    ) -> None:
        """`decoder` is the tokenizer's own, as JSON; `tokens` the raw token of each id; `decode(ids, skip
        special tokens)` the tokenizer's whole decoder."""
        self._decode = decode
        self._special_ids = special_ids
        self.table: TokenTable | None = None  # what a token stands for by itself
        self._strip = 0
        self._fallback: list[str | int] | None = None
        if _is_byte_level(decoder):
            alphabet = byte_alphabet()
            self.table = TokenTable.of([_level_bytes(token or "", alphabet) for token in tokens])
            self._shown = TokenTable(
                [b"" if i in special_ids else d for i, d in enumerate(self.table.data)],
                ["" if i in special_ids else t for i, t in enumerate(self.table.text)],
            )
        elif (rule := _fallback_rule(decoder)) is not None:
            replaced, self._strip = rule
            self._fallback = [_fallback_piece(token or "", replaced) for token in tokens]
            self._fallback_shown = ["" if i in special_ids else p for i, p in enumerate(self._fallback)]
            self.table = TokenTable.of(
                [bytes([p]) if isinstance(p, int) else p.encode() for p in self._fallback]
            )

    def make(self, *, skip_special: bool = True, after: Sequence[int] = ()) -> Detokenizer:
        """A new sequence's state. `after` is the prompt: a text that goes on keeps its leading space."""
        if self._fallback is not None:
            shown = self._fallback_shown if skip_special else self._fallback
            started = any(i < len(shown) and shown[i] != "" for i in after[:8])
            return FallbackDetokenizer(shown, 0 if started else self._strip)
        if self.table is not None:
            return ByteDetokenizer(self._shown if skip_special else self.table)
        return WindowDetokenizer(lambda ids: self._decode(ids, skip_special))

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for by itself, special tokens included."""
        if self.table is not None:
            return self.table.data[token_id] if token_id < len(self.table.data) else b""
        return self._decode([token_id], False).encode()


def _is_byte_level(decoder: dict[str, Any] | None) -> bool:
    if decoder is not None and decoder.get("type") == "Sequence":
        parts = decoder["decoders"]
        return len(parts) == 1 and _is_byte_level(parts[0])
    return decoder is not None and decoder.get("type") == "ByteLevel"


def _level_bytes(token: str, alphabet: dict[str, int]) -> bytes:
    """As the byte-level decoder reads a token: bytes by the alphabet, or its own text where a character is
    outside of it (an added token)."""
    try:
        return bytes([alphabet[c] for c in token])
    except KeyError:
        return token.encode()


def _fallback_rule(decoder: dict[str, Any] | None) -> tuple[str, int] | None:
    """(what stands for a space, leading spaces to strip) of a sentencepiece decoder with byte fallback."""
    if decoder is None or decoder.get("type") != "Sequence":
        return None
    parts = list(decoder["decoders"])
    kinds = [part["type"] for part in parts]
    if kinds[:3] != ["Replace", "ByteFallback", "Fuse"] or kinds[3:] not in ([], ["Strip"]):
        return None
    pattern = parts[0]["pattern"].get("String")
    if pattern is None or parts[0]["content"] != " ":
        return None
    if len(parts) == 3:
        return pattern, 0
    strip = parts[3]
    return (pattern, int(strip["start"])) if strip["content"] == " " and strip["stop"] == 0 else None


def _fallback_piece(token: str, replaced: str) -> str | int:
    if _BYTE_TOKEN.fullmatch(token):
        return int(token[3:5], 16)
    return token.replace(replaced, " ")


def decoder_json(decoder: Any) -> dict[str, Any] | None:
    """A tokenizer's decoder as JSON, None where it has none."""
    if decoder is None:
        return None
    state: dict[str, Any] = json.loads(decoder.__getstate__())
    return state
