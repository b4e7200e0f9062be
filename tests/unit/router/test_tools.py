"""Tools over HTTP on a model with random weights: calls that must be made are made, whole and streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from support.checkpoints import write_checkpoint
from support.events import stream
from support.model_server import NAME, model_server
from support.tools import CLOCK, MESSAGES, SCHEMAS, STRICT, TOOLS, check_calls, function

from ellm.router.openai.tools import MAX_TOOLS


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder, max_position_embeddings=4096)
    with model_server(folder) as server:
        yield server.url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=120) as made:
        yield made


def post(client: httpx.Client, **body: Any) -> httpx.Response:
    return client.post("/v1/chat/completions", json={"model": NAME, "messages": MESSAGES, **body})


NAMED = {"type": "function", "function": {"name": "clock"}}
ALLOWED = {"mode": "required", "tools": [{"type": "function", "function": {"name": "weather"}}]}


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"weather", "clock"}),
        (NAMED, {"clock"}),
        ({"type": "allowed_tools", "allowed_tools": ALLOWED}, {"weather"}),
    ],
)
def test_a_call_that_must_be_made_is_made(client: httpx.Client, choice: Any, names: set[str]) -> None:
    body = {"tools": TOOLS, "tool_choice": choice, "n": 2, "seed": 5, "parallel_tool_calls": False}
    answer = post(client, **body)
    assert answer.status_code == 200, answer.text
    events = stream(client, "/v1/chat/completions", {"messages": MESSAGES, **body})
    for i, made in enumerate(answer.json()["choices"]):
        assert made["finish_reason"] == "tool_calls"
        assert made["message"]["content"] is None
        calls = made["message"]["tool_calls"]
        assert len(calls) == 1
        check_calls(calls, names)
        choices = [c for event in events for c in event["choices"] if c["index"] == i]
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        assert choices[-1]["finish_reason"] == "tool_calls"
        parts = [part for c in choices for part in c["delta"].get("tool_calls", ())]
        assert parts[0]["id"].startswith("call_")
        assert parts[0]["function"] == {"name": calls[0]["function"]["name"], "arguments": ""}
        assert "".join(part["function"]["arguments"] for part in parts) == calls[0]["function"]["arguments"]


def test_several_calls_in_one_answer(client: httpx.Client) -> None:
    counts = set()
    for seed in range(3):
        answer = post(client, tools=TOOLS, tool_choice="required", seed=seed, max_tokens=1500).json()
        (choice,) = answer["choices"]
        check_calls(choice["message"]["tool_calls"], set(SCHEMAS))
        counts.add(len(choice["message"]["tool_calls"]))
    assert max(counts) <= 8


def test_without_a_must_the_model_may_say_anything(client: httpx.Client) -> None:
    """And the prompt says what it may call, unless it may call nothing."""
    sizes = []
    for choice in ("auto", "none"):
        answer = post(client, tools=TOOLS, tool_choice=choice, max_tokens=5)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["finish_reason"] in ("length", "stop")
        sizes.append(answer.json()["usage"]["prompt_tokens"])
    plain = post(client, max_tokens=5).json()["usage"]["prompt_tokens"]
    assert sizes[0] > plain + 300
    assert sizes[1] == plain


def test_the_official_client(url: str) -> None:
    official = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120, max_retries=0)
    with official.chat.completions.stream(
        model=NAME, messages=MESSAGES, tools=TOOLS, tool_choice="required", seed=3,  # type: ignore[arg-type]
    ) as events:  # fmt: skip
        for _ in events:
            pass
        message = events.get_final_completion().choices[0].message
    assert message.tool_calls
    for call in message.tool_calls:
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
    schema = {"name": "clock", "schema": CLOCK, "strict": True}
    strict = official.with_options(_extra_kwargs={"_strict_response_validation": True})
    called = strict.chat.completions.create(
        model=NAME, messages=MESSAGES, tools=TOOLS, tool_choice="required", seed=3,  # type: ignore[arg-type]
    )  # fmt: skip
    assert called.choices[0].message.tool_calls
    made = strict.chat.completions.create(
        model=NAME, messages=MESSAGES, max_completion_tokens=200,  # type: ignore[arg-type]
        response_format={"type": "json_schema", "json_schema": schema},  # type: ignore[arg-type, misc, list-item]
    )  # fmt: skip
    jsonschema.validate(json.loads(made.choices[0].message.content or ""), CLOCK)


DEEP: dict[str, Any] = {}
for _ in range(300):
    DEEP = {"type": "object", "properties": {"a": DEEP}}
UNMET = {
    "type": "object",
    "properties": {"a": {"minimum": 2, "maximum": 1, "type": "integer"}},
    "required": ["a"],
}
ANOTHER = {"type": "function", "function": {"name": "g"}}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"tools": {}}, "tools"),
    ({"tools": [function(f"f{i}", {}) for i in range(MAX_TOOLS + 1)]}, "tools"),
    ({"tools": [function("f", {"description": "x" * 200_000})]}, "tools"),
    ({"tools": [function("f", DEEP)]}, "tools"),
    ({"tools": [*TOOLS, TOOLS[0]]}, "tools"),
    ({"tools": [{"type": "custom", "custom": {"name": "c"}}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [function("a b", {})]}, "tools[0].function.name"),
    ({"tools": [function("f", {"type": "string"})]}, "tools[0].function.parameters"),
    ({"tools": [function("f", {}, strict=1)]}, "tools[0].function.strict"),
    ({"tools": [function("f", {}, color="red")]}, "tools[0].function.color"),
    ({"tools": [TOOLS[0], function("f", UNMET)], "tool_choice": "required"}, "tools[1].function.parameters"),
    ({"tools": TOOLS, "tool_choice": "must"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "other"}}, "tool_choice.type"),
    ({"tools": TOOLS, "tool_choice": ANOTHER}, "tool_choice.function.name"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": "required", "min_tokens": 3}, "min_tokens"),
    ({"tools": [function("f", UNMET, strict=True)]}, "tools[0].function.parameters"),
    ({"tools": [function("f", {"uniqueItems": True}, strict=True)]}, "tools[0].function.parameters"),
    ({"tools": [function("f", {}, strict=True)], "response_format": {"type": "json_object"}}, "tools"),
    ({"tools": [function("f", {}, strict=True)], "ignore_eos": True}, "ignore_eos"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"function_call": {"name": "f"}}, "function_call"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "field"), BAD, ids=[f"{field}-{i}" for i, (_, field) in enumerate(BAD)])
def test_what_cannot_be_honoured_is_refused_by_name(
    client: httpx.Client, body: dict[str, Any], field: str
) -> None:
    response = post(client, max_tokens=3, **body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == field, error


def test_a_strict_function_under_auto(client: httpx.Client) -> None:
    """A model that likes "<" above all opens no call that is none: what it says is text or a whole call."""
    ids = client.post("/tokenize", json={"prompt": "<", "add_special_tokens": False}).json()["tokens"]
    body = {"tools": STRICT, "max_tokens": 200, "temperature": 1.5, "logit_bias": {str(ids[0]): 3}, "n": 4}
    answer = post(client, **body)
    assert answer.status_code == 200, answer.text
    for choice in answer.json()["choices"]:
        for call in choice["message"].get("tool_calls", ()):
            if choice["finish_reason"] == "tool_calls":
                check_calls([call], set(SCHEMAS))
        assert "<tool_call>" not in (choice["message"]["content"] or "")


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({"role": "assistant", "tool_calls": 3}, "messages[0].tool_calls"),
        ({"role": "assistant", "tool_calls": [{"type": "custom"}]}, "messages[0].tool_calls[0].type"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "messages[0].tool_calls[0].function"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        ({"role": "assistant", "content": "a", "function_call": {}}, "messages[0].function_call"),
        ({"role": "assistant", "content": "a", "audio": {"id": "x"}}, "messages[0].audio"),
    ],
)
def test_calls_of_earlier_turns_are_checked(client: httpx.Client, message: Any, field: str) -> None:
    response = client.post("/v1/chat/completions", json={"messages": [message], "max_tokens": 1})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field
