"""Every bad request gets its typed error at once, and the next good one is served."""

from __future__ import annotations

import json
import logging
import socket
import time
from typing import Any

import httpx
import pytest
from support.router_server import MODEL, RouterServer, wait_until

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
OK = {"model": MODEL, "prompt": "fine", "max_tokens": 2}
TURN = [{"role": "user", "content": "hi"}]


def assert_error(response: httpx.Response, status: int, param: str | None, code: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["param"] == param
    assert body["error"]["code"] == code
    assert body["error"]["message"]
    assert "Traceback" not in response.text
    assert ".py" not in response.text


def assert_served(client: httpx.Client) -> None:
    response = client.post(COMPLETIONS, json=OK)
    assert response.status_code == 200
    assert response.json()["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 10**9}, "n"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"n": "2"}, "n"),
        ({"n": 1.5}, "n"),
        ({"n": 10**30}, "n"),
        ({"best_of": 3}, "best_of"),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": ["a", [1]]}, "prompt"),
        ({"prompt": [True, False]}, "prompt"),
        ({"prompt": [1, 4096]}, "prompt"),
        ({"prompt": [1, -1]}, "prompt"),
        ({"prompt": [10**20]}, "prompt"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"prompt": ["a"] * 257}, "prompt"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**12}, "max_tokens"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"min_tokens": 17, "max_tokens": 16}, "min_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 10**200}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"seed": 1.5}, "seed"),
        ({"seed": 2**70}, "seed"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"logit_bias": {"cat": 1}}, "logit_bias"),
        ({"logit_bias": {"4096": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"1": True}}, "logit_bias"),
        ({"logit_bias": {"²": 1}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"stop": ["x"] * 10_000}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a", 5]}, "stop"),
        ({"stop": 5}, "stop"),
        ({"stop": "x" * 1025}, "stop"),
        ({"stop_token_ids": [4096]}, "stop_token_ids"),
        ({"stop_token_ids": [1] * 257}, "stop_token_ids"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids[0]"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": 5}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"suffix": "end"}, "suffix"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"max_token": 5}, "max_token"),
        ({"guided_json": {}}, "guided_json"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"cache_salt": 5}, "cache_salt"),
        ({"model": 5}, "model"),
    ],
)
def test_a_bad_field_is_named(client: httpx.Client, fields: dict[str, Any], param: str) -> None:
    response = client.post(COMPLETIONS, content=json.dumps({**OK, **fields}))
    code = "context_length_exceeded" if fields.get("max_tokens") in (5000, 10**12) else "invalid_value"
    assert_error(response, 400, param, code)
    assert_served(client)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [5]}, "messages[0]"),
        ({"messages": [{}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [*TURN, {"role": "User!", "content": "x"}]}, "messages[1].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
        ({"messages": TURN * 5000}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"functions": [{}]}, "functions"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"prompt": "x"}, "prompt"),
        ({"chat_template": "{{ x }}"}, "chat_template"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ],
)
def test_a_bad_field_of_a_chat_is_named(client: httpx.Client, fields: dict[str, Any], param: str) -> None:
    response = client.post(CHAT, json={"model": MODEL, "messages": TURN, **fields})
    assert_error(response, 400, param, "invalid_value")
    assert_served(client)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"null", b"5", b"[]", b'"text"', b'{"prompt": "a",}', b"{'prompt': 'a'}",
        b'{"prompt": "a", "temperature": NaN}', b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "\xff\xfe"}', b"\xff\xfe{}", b'{"prompt": "\\ud800"}', b"[" * 100_000,
        b'{"prompt": "a", "temperature": 1e999}',
    ],
)  # fmt: skip
def test_a_body_that_is_no_json_object(client: httpx.Client, body: bytes) -> None:
    assert_error(client.post(COMPLETIONS, content=body), 400, None, "invalid_value")
    assert_served(client)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize", "/detokenize"])
def test_an_unknown_model(client: httpx.Client, path: str) -> None:
    body = {"model": "gpt-9", "prompt": "x", "messages": TURN, "tokens": [1]}
    keep = {COMPLETIONS: "prompt", CHAT: "messages", "/tokenize": "prompt", "/detokenize": "tokens"}[path]
    response = client.post(path, json={"model": "gpt-9", keep: body[keep]})
    assert_error(response, 404, "model", "model_not_found")
    assert_served(client)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_prompt_longer_than_the_context(client: httpx.Client, path: str) -> None:
    """The second is so long that it is refused before it is tokenised."""
    for text, limit_s in (("word " * 3000, 2.0), ("x" * 7_000_000, 2.0)):
        field = "prompt" if path == COMPLETIONS else "messages"
        value = text if path == COMPLETIONS else [{"role": "user", "content": text}]
        start = time.monotonic()
        response = client.post(path, json={"model": MODEL, field: value})
        assert time.monotonic() - start < limit_s
        assert_error(response, 400, field, "context_length_exceeded")
    assert_served(client)


def test_the_path_and_the_method(client: httpx.Client) -> None:
    assert_error(client.get("/v1/nothing"), 404, None, "not_found")
    assert_error(client.get("/nowhere"), 404, None, "not_found")
    assert_error(client.get("/v1/models/other"), 404, "model", "model_not_found")
    wrong = client.get(COMPLETIONS)
    assert_error(wrong, 405, None, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"
    assert_error(client.post("/v1/models", json={}), 405, None, "method_not_allowed")


def test_tokenize_and_detokenize(client: httpx.Client) -> None:
    assert_error(client.post("/tokenize", json={}), 400, "prompt", "invalid_value")
    assert_error(
        client.post("/tokenize", json={"prompt": "a", "messages": TURN}), 400, "prompt", "invalid_value"
    )
    assert_error(client.post("/tokenize", json={"prompt": 5}), 400, "prompt", "invalid_value")
    assert_error(client.post("/detokenize", json={"tokens": ["a"]}), 400, "tokens[0]", "invalid_value")
    assert_error(client.post("/detokenize", json={"tokens": [-1]}), 400, "tokens[0]", "invalid_value")
    assert_error(client.post("/detokenize", json={}), 400, "tokens", "invalid_value")


def raw_answer(server: RouterServer, head: str, body: bytes = b"") -> tuple[bytes, float]:
    """Send a request by hand; the typed error that comes, and how long it took."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as sock:
        start = time.monotonic()
        sock.sendall(head.encode() + b"\r\n\r\n" + body)
        answer = b""
        while not answer.endswith(b"}}"):
            received = sock.recv(65536)
            assert received, answer
            answer += received
        return answer, time.monotonic() - start


def test_a_huge_body_is_refused_before_it_is_sent(server: RouterServer, client: httpx.Client) -> None:
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {100 * 1024 * 1024}"
    answer, seconds = raw_answer(server, head)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b'"code":"request_too_large"' in answer
    assert seconds < 1.0
    assert_served(client)


@pytest.mark.parametrize("path", [COMPLETIONS, "/tokenize"])
def test_a_huge_body_is_refused_while_it_is_sent(client: httpx.Client, path: str) -> None:
    whole = client.post(path, content=b" " * (100 * 1024 * 1024))
    assert_error(whole, 413, None, "request_too_large")
    chunks = client.post(path, content=(b" " * 1024 * 1024 for _ in range(20)))
    assert_error(chunks, 413, None, "request_too_large")
    assert_served(client)


@pytest.mark.parametrize("path", [COMPLETIONS, "/tokenize"])
def test_a_request_cut_off_in_its_body_is_no_failure(
    server: RouterServer, client: httpx.Client, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ellm.router")
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as sock:
        sock.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{{".encode())
        time.sleep(0.05)
    wait_until(lambda: "499" in caplog.text)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert_served(client)


def test_request_ids_are_echoed_and_cleaned(client: httpx.Client) -> None:
    def echoed(value: str) -> str:
        return client.get("/version", headers={"X-Request-Id": value}).headers["x-request-id"]

    assert echoed("abc-1.2:3_X") == "abc-1.2:3_X"
    assert echoed("a b<script>") == "abscript"
    assert echoed("x" * 500) == "x" * 128
    assert echoed("<>").startswith("req-")
    assert len({client.get("/version").headers["x-request-id"] for _ in range(3)}) == 3
