"""Chats whose answer is more than its text, over HTTP: the worker says the prompt again, and the template
lets the prompt be what the model would say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.events import stream
from support.router_server import FOLDER, MODEL, RouterServer

TEMPLATE = "{# tools <tool_call> </think> #}{% for m in messages %}{{ m.content }}{% endfor %}"
CALL = '<tool_call>\n{"name": "clock", "arguments": {"utc": true, "zone": "ä"}}\n</tool_call>'
ARGUMENTS = '{"utc": true, "zone": "ä"}'
TOOLS = [{"type": "function", "function": {"name": "clock"}}]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder: Path = tmp_path_factory.mktemp("echo")
    (folder / "tokenizer.json").write_bytes((FOLDER / "tokenizer.json").read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    with RouterServer(folder=folder) as server, server.client() as made:
        yield made


def body(said: str, **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": said}], **more}


def whole(client: httpx.Client, said: str, **more: Any) -> dict[str, Any]:
    response = client.post("/v1/chat/completions", json=body(said, **more))
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def parts(client: httpx.Client, said: str, **more: Any) -> tuple[dict[str, str], str | None]:
    """(what the deltas of the first choice add up to, the reason)."""
    found: dict[str, str] = {"reasoning_content": "", "content": "", "names": "", "arguments": ""}
    reasons = []
    for event in stream(client, "/v1/chat/completions", body(said, **more)):
        for choice in event["choices"]:
            if choice["index"]:
                continue
            delta = choice["delta"]
            for name in ("reasoning_content", "content"):
                found[name] += delta.get(name) or ""
            for call in delta.get("tool_calls", ()):
                found["names"] += call["function"].get("name", "")
                found["arguments"] += call["function"]["arguments"]
            reasons.append(choice["finish_reason"])
    assert reasons[:-1] == [None] * (len(reasons) - 1)
    return found, reasons[-1]


def test_calls_are_found_in_what_a_model_says_freely(client: httpx.Client) -> None:
    said = f"Let me see.\n{CALL}"
    for more in ({}, {"n": 2}, {"logprobs": True, "top_logprobs": 1}, {"return_token_ids": True}):
        answer = whole(client, said, tools=TOOLS, **more)
        for choice in answer["choices"]:
            assert choice["finish_reason"] == "tool_calls"
            assert choice["message"]["content"] == "Let me see."
            (call,) = choice["message"]["tool_calls"]
            assert call["function"] == {"name": "clock", "arguments": ARGUMENTS}
            assert ("logprobs" in more) == (choice["logprobs"] is not None)
        found, reason = parts(client, said, tools=TOOLS, **more)
        assert found == {
            "reasoning_content": "", "content": "Let me see.", "names": "clock", "arguments": ARGUMENTS
        }  # fmt: skip
        assert reason == "tool_calls"


def test_every_scored_token_of_a_call_is_streamed(client: httpx.Client) -> None:
    more = {"tools": TOOLS, "seed": 1, "logprobs": True, "return_token_ids": True}
    choice = whole(client, CALL, **more)["choices"][0]
    events = stream(client, "/v1/chat/completions", body(CALL, **more))
    choices = [c for event in events for c in event["choices"]]
    assert [x for c in choices if c["logprobs"] for x in c["logprobs"]["content"]] == choice["logprobs"][
        "content"
    ]
    assert [i for c in choices for i in c.get("token_ids", ())] == choice["token_ids"]


def test_a_text_that_ends_early_is_no_call(client: httpx.Client) -> None:
    answer = whole(client, CALL, tools=TOOLS, max_tokens=3)["choices"][0]
    assert answer["finish_reason"] == "length"
    assert answer["message"]["content"].startswith("<tool")
    found, reason = parts(client, CALL, tools=TOOLS, max_tokens=3)
    assert (found["content"], reason) == (answer["message"]["content"], "length")


def test_without_tools_a_call_is_text(client: httpx.Client) -> None:
    for more in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        choice = whole(client, CALL, **more)["choices"][0]
        assert choice["finish_reason"] == "stop"
        assert choice["message"] == {"role": "assistant", "content": CALL, "refusal": None}


def test_reasoning_comes_apart(client: httpx.Client) -> None:
    said = f"<think>\nHm, ä.\n</think>\n\nSo. {CALL}"
    answer = whole(client, said, tools=TOOLS)
    message = answer["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm, ä.", "So.")
    details = answer["usage"]["completion_tokens_details"]
    assert 3 < details["reasoning_tokens"] < answer["usage"]["completion_tokens"] - 5
    found, reason = parts(client, said, tools=TOOLS, stream_options={"include_usage": True})
    assert found == {
        "reasoning_content": "Hm, ä.", "content": "So.", "names": "clock", "arguments": ARGUMENTS
    }  # fmt: skip
    assert reason == "tool_calls"
    events = stream(client, "/v1/chat/completions", body(said, stream_options={"include_usage": True}))
    assert events[-1]["usage"]["completion_tokens_details"] == details
    hidden = whole(client, said, include_reasoning=False)["choices"][0]["message"]
    assert "reasoning_content" not in hidden
    assert hidden["content"] == f"So. {CALL}"


def test_a_prompt_that_has_begun_to_think(client: httpx.Client) -> None:
    """The answer goes on inside: here the worker says the prompt again."""
    message = whole(client, "Why?</think>So. <think>\n")["choices"][0]["message"]
    assert message["reasoning_content"] == "Why?"
    assert message["content"] == "So. <think>\n"


def test_a_paced_stream_is_parsed_like_any_other(client: httpx.Client) -> None:
    found, reason = parts(client, CALL, tools=TOOLS, tpot_slo_ms=2, stream_pace=True)
    assert (found["names"], found["arguments"], reason) == ("clock", ARGUMENTS, "tool_calls")


def test_a_worker_without_grammars_is_not_asked_for_one(client: httpx.Client) -> None:
    for more, field in (
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": TOOLS, "tool_choice": "required"}, "tools[0].function.parameters"),
    ):
        response = client.post("/v1/chat/completions", json=body("a", **more))
        assert response.status_code == 400
        assert response.json()["error"]["param"] == field
