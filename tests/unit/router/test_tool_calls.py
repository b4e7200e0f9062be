"""Reasoning and tool calls found in a text, however it is cut into pieces."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from ellm.router.openai.chat_parser import ChatParser, Parsing
from ellm.router.openai.tool_calls import HERMES, LLAMA3

ARGS = '{"place": "São \\"Paulo\\" } ]", "days": [1, {"a": "</tool_call>"}]}'
CALL = '<tool_call>\n{"name": "weather", "arguments": ' + ARGS + "}\n</tool_call>"
LLAMA = '{"name": "weather", "parameters": ' + ARGS + "}"


def read(parsing: Parsing, pieces: list[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(the message, the deltas of the stream)."""
    parser, deltas = ChatParser(parsing), []
    for piece in pieces:
        deltas += parser.feed(piece)
    deltas += parser.finish()
    return parser.message(), deltas


def joined(deltas: list[dict[str, Any]]) -> tuple[str, str, list[tuple[str, str]]]:
    """(reasoning, content, (name, arguments) of each call) as a client puts a stream together."""
    reasoning = "".join(d.get("reasoning_content", "") for d in deltas)
    content = "".join(d.get("content", "") for d in deltas)
    calls: list[list[str]] = []
    for delta in deltas:
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                assert call["index"] == len(calls)
                assert call["type"] == "function"
                calls.append([call["function"]["name"], ""])
            assert call["index"] == len(calls) - 1
            calls[-1][1] += call["function"]["arguments"]
    return reasoning, content, [(name, arguments) for name, arguments in calls]


WEATHER = ("weather", ARGS)
CASES = [
    (HERMES, "Just a text, a < b.", "Just a text, a < b.", []),
    (HERMES, CALL, "", [WEATHER]),
    (HERMES, f"Let me see.\n{CALL}\n{CALL}\n", "Let me see.", [WEATHER, WEATHER]),
    (HERMES, f"{CALL} and more", " and more", [WEATHER]),
    (HERMES, "<tool_call>no object</tool_call>", "<tool_call>no object</tool_call>", []),
    (HERMES, '<tool_call>{"nom": 1}</tool_call>', '<tool_call>{"nom": 1}</tool_call>', []),
    (HERMES, "a <tool_cal", "a <tool_cal", []),
    (HERMES, '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [("f", '{"a": 1}')]),
    (HERMES, '<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
    (HERMES, '<tool_call>{"name": "f", "arguments": "{}"}</tool_call>', "", [("f", "{}")]),
    (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": [1', "", [("f", '{"a": [1')]),
    (HERMES, '<tool_call>\n{"name": "f', '<tool_call>\n{"name": "f', []),
    (LLAMA3, "A text with {braces}.", "A text with {braces}.", []),
    (LLAMA3, LLAMA, "", [WEATHER]),
    (LLAMA3, f"<|python_tag|>{LLAMA}; {LLAMA}", "", [WEATHER, WEATHER]),
    (LLAMA3, '{"answer": 42} is it.', '{"answer": 42} is it.', []),
    (LLAMA3, "  <|python", "  <|python", []),
    (LLAMA3, "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
]


@pytest.mark.parametrize(("form", "text", "content", "calls"), CASES)
def test_calls_are_found_in_any_cut(form: Any, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    rng = random.Random(text)
    cuts = [[text], list(text)]
    for _ in range(20):
        marks = sorted(rng.choices(range(len(text) + 1), k=rng.randint(1, 6)))
        cuts.append([text[a:b] for a, b in zip([0, *marks], [*marks, len(text)], strict=True)])
    for pieces in cuts:
        message, deltas = read(Parsing(form), pieces)
        assert joined(deltas) == ("", content, calls), pieces
        assert (message["content"] or "") == content
        found = [(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls", ())]
        assert found == calls
    if calls and calls[0] == WEATHER:
        assert json.loads(calls[0][1])["days"] == [1, {"a": "</tool_call>"}]


def test_arguments_are_streamed_as_they_come() -> None:
    parser = ChatParser(Parsing(HERMES))
    head = parser.feed('<tool_call>\n{"name": "f", "arguments": {"text": "abc')
    assert joined(head) == ("", "", [("f", '{"text": "abc')])
    (more,) = parser.feed(' def"')
    assert more == {"tool_calls": [{"index": 0, "function": {"arguments": ' def"'}}]}


THOUGHTS = [
    (False, "<think>\nWhy? </thin no\n</think>\n\nSo.", "Why? </thin no", "So."),
    (False, "So.", "", "So."),
    (False, " <thin air", "", " <thin air"),
    (True, "\nWhy?\n</think>\n\nSo. <think>", "Why?", "So. <think>"),
    (True, "still at it </thi", "still at it </thi", ""),
    (False, "<think></think>So.", "", "So."),
]


@pytest.mark.parametrize(("opened", "text", "reasoning", "content"), THOUGHTS)
def test_reasoning_is_split_off(opened: bool, text: str, reasoning: str, content: str) -> None:
    for size in (1, 2, 3, 5, 100):
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        message, deltas = read(Parsing(None, True, opened), pieces)
        assert joined(deltas) == (reasoning, content, []), size
        assert message["content"] == content
        assert message.get("reasoning_content", "") == reasoning
        hidden, deltas = read(Parsing(None, True, opened, include_reasoning=False), pieces)
        assert joined(deltas) == ("", content, [])
        assert "reasoning_content" not in hidden


def test_reasoning_comes_before_calls() -> None:
    text = f"<think>A call: {CALL}</think>\n{CALL}"
    for size in (1, 4, 1000):
        parser, deltas = ChatParser(Parsing(HERMES, True)), []
        for i in range(0, len(text), size):
            deltas += parser.feed(text[i : i + size])
        deltas += parser.finish()
        assert joined(deltas) == (f"A call: {CALL}", "", [WEATHER])
        assert parser.called
        assert parser.message()["content"] is None


@pytest.mark.parametrize(
    ("opened", "tokens", "count"),
    [
        (False, [b"<th", b"ink>", b"\xc3", b"\xa4", b"b </", b"think>", b"So", b"</think>"], 6),
        (False, [b" ", b"<think>", b"a", b"b"], 4),
        (False, [b"So", b"<think>", b"</think>"], 0),
        (True, [b"Why?", b"</think>", b"So"], 2),
        (False, [b" ", b"\n"], 0),
    ],
)
def test_reasoning_tokens_are_counted(opened: bool, tokens: list[bytes], count: int) -> None:
    """As they come: one by one, or several at once."""
    for size in (1, 2, 3, 10):
        parser = ChatParser(Parsing(None, True, opened))
        for i in range(0, len(tokens), size):
            parser.feed("", tokens[i : i + size])
        assert parser.reasoning_tokens == count
