"""The OpenAPI document says what the server does: each endpoint, each status, its headers and its body."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator
from support.described import accepts, check_answer
from support.router_server import MODEL, RouterServer, router_config, wait_until

from ellm.router.config import LimitsConfig
from ellm.router.models import Models
from ellm.router.openai.schema import (
    HARMLESS,
    NEUTRAL,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from ellm.router.openapi.description import paths_of
from ellm.router.openapi.document import endpoint
from ellm.router.openapi.json_types import token_id_pattern

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "Say {} 🎉"}]
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
TURNS = [
    {"role": "system", "content": [{"type": "text", "text": "a"}]},
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "b"},
    *MESSAGES,
]
SAMPLING: dict[str, Any] = {
    "temperature": 0.5, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "seed": -5,
    "logit_bias": {"7": -100, "4095": 1.5},
    "stop": ["zz"], "stop_token_ids": [9], "presence_penalty": -2, "n": 2, "max_tokens": 4, "min_tokens": 1,
    "user": "u", "metadata": {"a": "b"}, "cache_salt": "s", "tpot_slo_ms": 20, "priority": 1,
}  # fmt: skip
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
CONTINUOUS = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
GOOD: list[tuple[str, dict[str, Any]]] = [
    *[(COMPLETIONS, {"prompt": prompt, "max_tokens": 3}) for prompt in ("a", ["a", "b"], [5], [[5], [6, 7]])],
    (COMPLETIONS, {"prompt": "a b c", "echo": True, "logprobs": 2, **SAMPLING}),
    (COMPLETIONS, {"prompt": "a b c", "echo": True, "logprobs": 2, "max_tokens": 0}),
    (COMPLETIONS, {"prompt": "a b c", "logprobs": 2, "return_token_ids": True, **SAMPLING, **CONTINUOUS}),
    (COMPLETIONS, {"prompt": "a b c", "echo": True, "logprobs": 0, **SAMPLING, **USAGE}),
    (COMPLETIONS, {"prompt": "a b c", "best_of": 2, "return_token_ids": True, **SAMPLING, "suffix": ""}),
    (CHAT, {"messages": MESSAGES}),
    (CHAT, {"messages": TURNS, "tools": TOOLS, "store": False, "reasoning_effort": "none"}),
    (CHAT, {"messages": TURNS, "tools": TOOLS, "tool_choice": "auto", **USAGE}),
    (CHAT, {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2, **SAMPLING}),
    (CHAT, {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2, **SAMPLING, **CONTINUOUS}),
    (CHAT, {"messages": MESSAGES, "return_token_ids": True, **SAMPLING, **USAGE, "stream_pace": True}),
    (CHAT, {"messages": MESSAGES, "response_format": {"type": "text"}, "max_completion_tokens": 3}),
    ("/tokenize", {"prompt": "a b", "return_token_strs": True}),
    ("/tokenize", {"messages": MESSAGES, "add_generation_prompt": False}),
    ("/detokenize", {"tokens": [5, 6], "skip_special_tokens": True}),
]
SCHEMA_OF = {
    COMPLETIONS: "CompletionRequest", CHAT: "ChatRequest",
    "/tokenize": "TokenizeRequest", "/detokenize": "DetokenizeRequest",
}  # fmt: skip
NOT_TAKEN: list[tuple[str, dict[str, Any], int]] = [
    (COMPLETIONS, {}, 400),
    (COMPLETIONS, {"prompt": "a", "n": 1000}, 400),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"4096": 1}}, 400),
    (COMPLETIONS, {"prompt": "a", "suffix": "b"}, 400),
    (COMPLETIONS, {"prompt": "a", "unknown": 1}, 400),
    (COMPLETIONS, {"prompt": [5000]}, 400),
    (COMPLETIONS, {"prompt": "a", "model": "gpt-9"}, 404),
    (CHAT, {"messages": []}, 400),
    (CHAT, {"messages": MESSAGES, "tools": [{"type": "custom"}]}, 400),
    (CHAT, {"messages": MESSAGES, "modalities": ["audio"]}, 400),
    (CHAT, {"messages": MESSAGES, "max_tokens": 0}, 400),
    (CHAT, {"messages": MESSAGES, "response_format": {"type": "xml"}}, 400),
    (CHAT, {"messages": MESSAGES, "model": "gpt-9"}, 404),
    ("/tokenize", {}, 400),
    ("/tokenize", {"prompt": "a", "model": "gpt-9"}, 404),
    ("/detokenize", {"tokens": [-1]}, 400),
    ("/detokenize", {"tokens": [1], "model": "gpt-9"}, 404),
]


@pytest.fixture(scope="module")
def document(client: httpx.Client) -> dict[str, Any]:
    found: dict[str, Any] = client.get("/openapi.json").json()
    return found


def refs(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        yield from ([part["$ref"]] if isinstance(part.get("$ref"), str) else [])
        for value in part.values():
            yield from refs(value)
    elif isinstance(part, list):
        for value in part:
            yield from refs(value)


def test_every_endpoint_is_in_it_and_no_other(server: RouterServer, document: dict[str, Any]) -> None:
    routes = {
        (path, method.lower())
        for route in server.app.routes
        for path in [getattr(route, "path_format", None) or route.path]
        for method in (route.methods or set()) - {"HEAD"}
    }
    described = {(path, method) for path, methods in document["paths"].items() for method in methods}
    assert described == routes
    assert all(endpoint(path) is not None for path in paths_of(server.app))


def test_its_schemas_are_sound(document: dict[str, Any]) -> None:
    assert document["openapi"] == "3.1.0"
    components = document["components"]["schemas"]
    for schema in components.values():
        Draft202012Validator.check_schema(schema)
    used = set(refs(document))
    assert used <= {f"#/components/schemas/{name}" for name in components}
    operations = [one for methods in document["paths"].values() for one in methods.values()]
    assert len({one["operationId"] for one in operations}) == len(operations)
    assert all(re.fullmatch("[a-z_0-9]+", one["operationId"]) for one in operations)


@pytest.mark.parametrize("kind", [CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest])
def test_a_body_has_the_fields_that_are_read(document: dict[str, Any], kind: Any) -> None:
    described = set(document["components"]["schemas"][kind.__name__]["properties"])
    assert set(kind.model_fields) <= described
    assert described - set(kind.model_fields) <= HARMLESS | set(NEUTRAL)


@pytest.mark.parametrize(("path", "body"), GOOD)
def test_what_is_described_is_taken(
    client: httpx.Client, document: dict[str, Any], path: str, body: dict[str, Any]
) -> None:
    assert accepts(document, SCHEMA_OF[path], body)
    assert accepts(document, SCHEMA_OF[path], body | {"model": MODEL})
    assert check_answer(document, client.post(path, json=body)) == (path, 200)


@pytest.mark.parametrize(("path", "body", "status"), NOT_TAKEN)
def test_what_is_refused_is_not_described(
    client: httpx.Client, document: dict[str, Any], path: str, body: dict[str, Any], status: int
) -> None:
    assert not accepts(document, SCHEMA_OF[path], body)
    assert check_answer(document, client.post(path, json=body)) == (path, status)


def test_what_is_only_read(client: httpx.Client, document: dict[str, Any]) -> None:
    gets = [path for path, methods in document["paths"].items() if "get" in methods]
    for path in gets:
        answer = client.get(path.format(model_id=MODEL, request_id="x"))
        assert check_answer(document, answer) == (path, 404 if "{request_id}" in path else 200)
    assert check_answer(document, client.get("/v1/models/gpt-9"))[1] == 404


def answers_of(client: httpx.Client, document: dict[str, Any], **headers: str) -> dict[str, int]:
    """Every endpoint once, as checked against the document: path -> status."""
    found = {}
    for path, methods in document["paths"].items():
        for method in methods:
            body = next((body for where, body in GOOD if where == path), None)
            url = path.format(model_id=MODEL, request_id="x")
            answer = client.request(method, url, json=body, headers=headers)
            name, found_status = check_answer(document, answer)
            found[name] = found_status
    return found


def test_without_a_key_or_the_admins(document: dict[str, Any]) -> None:
    with RouterServer(config=router_config(api_keys=("k",))) as server, server.client() as client:
        own = client.get("/openapi.json", headers={"Authorization": "Bearer k"}).json()
        assert own["security"] == [{"key": []}]
        assert document["security"] == []
        found = answers_of(client, document)
        admin = {path for path in found if path.startswith(("/metrics", "/admin"))}
        free = {
            path for path, ways in own["paths"].items() if any("security" in way for way in ways.values())
        }
        assert {"/health", "/health/ready"} <= free
        assert {path for path, status in found.items() if status == 200} == free
        assert {found[path] for path in admin} == {403}
        assert {status for path, status in found.items() if path not in admin} == {200, 401}


def test_without_a_worker(document: dict[str, Any]) -> None:
    config = router_config(queue_timeout_s=0.05)
    with RouterServer([], config) as server, server.client() as client:
        found = answers_of(client, document)
        assert {path for path, status in found.items() if status == 503} == {
            COMPLETIONS, CHAT, "/health/ready"
        }  # fmt: skip
        described = client.get("/openapi.json").json()
        assert accepts(described, "CompletionRequest", {"prompt": "a", "max_tokens": 10**9})


@pytest.mark.filterwarnings("default")
def test_a_fault_of_ours(document: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(Models, "find", broken)
    monkeypatch.setattr(Models, "find_for", broken)
    with RouterServer() as server, server.client() as client:
        found = answers_of(client, document)
        assert {path for path, status in found.items() if status == 500} == {
            COMPLETIONS, CHAT, "/tokenize", "/detokenize", "/v1/models/{model_id}"
        }  # fmt: skip


def test_beyond_a_limit(document: dict[str, Any]) -> None:
    limits = LimitsConfig(max_body_bytes=300, max_inflight=1, request_deadline_s=0.3)
    with RouterServer(config=router_config(limits=limits)) as server, server.client() as client:
        for path in SCHEMA_OF:
            assert check_answer(document, client.post(path, content=b" " * 301)) == (path, 413)
        server.workers[0].executor.gate.clear()  # what comes now stays
        for path, body in ((COMPLETIONS, {"prompt": "a"}), (CHAT, {"messages": MESSAGES})):
            assert check_answer(document, client.post(path, json=body)) == (path, 408)
            assert check_answer(document, client.post(path, json=body | {"n": 2})) == (path, 429)
        server.workers[0].executor.gate.set()
        wait_until(lambda: not server.service.dispatcher.admission.num_inflight)
        body = {"prompt": "a", "max_tokens": 2000, "ignore_eos": True, "stream": True}
        stream = client.post(COMPLETIONS, json=body)
        assert '"deadline_exceeded"' in stream.text
        assert check_answer(document, stream)[1] in (200, 408)  # an event, or before the first


def test_the_document_knows_the_servers_own_limits() -> None:
    limits = LimitsConfig(max_n=3, max_stop=1, max_priority=4)
    with RouterServer(config=router_config(limits=limits)) as server, server.client() as client:
        own = client.get("/openapi.json").json()
        body = {"prompt": "a"}
        pairs: list[tuple[str, Any, Any]] = [
            ("n", 3, 4), ("stop", ["a"], ["a", "b"]), ("max_tokens", 2000, 3000), ("priority", 4, 5)
        ]  # fmt: skip
        for name, most, more in pairs:
            good, bad = {name: most}, {name: more}
            assert accepts(own, "CompletionRequest", body | good)
            assert not accepts(own, "CompletionRequest", body | bad)
            assert client.post(COMPLETIONS, json=body | bad).status_code == 400


@pytest.mark.parametrize("size", [1, 2, 10, 11, 100, 1000, 4096, 32000])
def test_the_pattern_of_token_ids(size: int) -> None:
    pattern = re.compile(token_id_pattern(size))
    assert [i for i in range(size + 2000) if bool(pattern.match(str(i))) != (i < size)] == []
