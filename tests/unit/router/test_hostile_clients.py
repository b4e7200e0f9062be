"""Clients that send too much, too deep or too slowly: a typed error, bounded work, and the next is served."""

from __future__ import annotations

import json
import select
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import uvicorn
from support.router_server import MODEL, EchoWorker, RouterServer, router_config, wait_until

from ellm.router.config import LimitsConfig
from ellm.router.openai.tools import MAX_TOOLS
from ellm.router.request_heads import BoundedProtocol, bound_heads

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
LONG_S = 20.0  # on a busy machine; each takes milliseconds
LIMITS = LimitsConfig(max_body_bytes=16 * 1024 * 1024, receive_timeout_s=0.4, max_inflight=64)


@pytest.fixture(scope="module")
def server() -> Iterator[RouterServer]:
    with RouterServer([EchoWorker(0)], router_config(limits=LIMITS)) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RouterServer) -> Iterator[httpx.Client]:
    with server.client() as open_client:
        yield open_client


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text[:500]
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) < 600
    return error


def assert_served(client: httpx.Client) -> None:
    body = {"model": MODEL, "prompt": "fine", "max_tokens": 2}
    assert client.post(COMPLETIONS, json=body).json()["usage"]["completion_tokens"] == 2


def promptly(call: Callable[[], httpx.Response]) -> httpx.Response:
    begun = time.monotonic()
    answer = call()
    assert time.monotonic() - begun < LONG_S
    return answer


def connected(server: RouterServer) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=LONG_S)


def answer_of(sock: socket.socket) -> tuple[bytes, dict[str, Any]]:
    """The status line and the error."""
    received = b""
    while not received.endswith(b"}}"):
        part = sock.recv(65536)
        assert part, received
        received += part
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head.lower()
    assert b"connection: close" in head.lower()
    return head.split(b"\r\n")[0], json.loads(body)["error"]


# Too much


def schema_of(megabytes: int) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {f"p{i}": {"enum": ["x" * 1000]} for i in range(megabytes * 1000)},
    }


def test_a_schema_of_ten_megabytes(client: httpx.Client, server: RouterServer) -> None:
    asked = {"name": "n", "schema": schema_of(10)}
    body = {"messages": [{"role": "user", "content": "hi"}]}
    body["response_format"] = {"type": "json_schema", "json_schema": asked}  # type: ignore[assignment]
    error = error_of(promptly(lambda: client.post(CHAT, json=body)), 400)
    assert error["param"] == "response_format.json_schema.schema"
    assert "bytes" in error["message"]
    text = json.dumps(asked["schema"])
    error = error_of(
        promptly(lambda: client.post(COMPLETIONS, json={"prompt": "a", "guided_json": text})), 400
    )
    assert error["param"] == "guided_json"
    assert_served(client)


def test_a_schema_of_ten_megabytes_is_no_body_for_a_server_of_usual_limits() -> None:
    with RouterServer(config=router_config()) as usual, usual.client() as client:
        body = {"prompt": "a", "guided_json": json.dumps(schema_of(10))}
        assert (
            error_of(promptly(lambda: client.post(COMPLETIONS, json=body)), 413)["code"]
            == "request_too_large"
        )
        assert_served(client)


def test_ten_thousand_tools(client: httpx.Client) -> None:
    tools = [{"type": "function", "function": {"name": f"f{i}"}} for i in range(10_000)]
    body = {"messages": [{"role": "user", "content": "hi"}], "tools": tools}
    error = error_of(promptly(lambda: client.post(CHAT, json=body)), 400)
    assert error["param"] == "tools"
    assert str(MAX_TOOLS) in error["message"]
    assert_served(client)


def nested(depth: int, leaf: str = "1") -> str:
    return '{"a":' * depth + leaf + "}" * depth


DEEP = {
    "metadata": CHAT,
    "response_format": CHAT,
    "tools": CHAT,
    "tool_choice": CHAT,
    "messages": CHAT,
    "chat_template_kwargs": CHAT,
    "logit_bias": COMPLETIONS,
    "stream_options": COMPLETIONS,
    "guided_json": COMPLETIONS,
    "structured_outputs": COMPLETIONS,
    "prompt": COMPLETIONS,
    "nothing_known": COMPLETIONS,
}


@pytest.mark.parametrize("field", DEEP)
def test_what_is_nested_deeply(client: httpx.Client, field: str) -> None:
    """As deep as the reader of JSON lets through, and deeper; in every field that may take an object."""
    path = DEEP[field]
    base = '"prompt": "a"' if path == COMPLETIONS else '"messages": [{"role": "user", "content": "hi"}]'
    for depth in (200, 1000, 100_000):
        for value in (nested(depth), f"[{nested(depth)}]", "[" * depth + "]" * depth):
            rest = "" if field in ("prompt", "messages") else f"{base}, "
            body = f'{{{rest}"max_tokens": 1, "{field}": {value}}}'
            answer = promptly(lambda body=body: client.post(path, content=body))  # type: ignore[misc]
            if answer.status_code != 200:
                error_of(answer, 400)
            else:
                assert field == "metadata" or field == "chat_template_kwargs", (field, depth)
    assert_served(client)


@pytest.mark.parametrize(
    "headers",
    [
        {f"x-{i}": "a" for i in range(200)},
        {"x-long": "a" * 20_000},
        {"cookie": "a" * 10_000, "x-other": "b" * 10_000},
    ],
    ids=["many", "long", "together"],
)
def test_a_flood_of_headers(client: httpx.Client, headers: dict[str, str]) -> None:
    assert error_of(client.get("/v1/models", headers=headers), 431)["code"] == "headers_too_large"
    assert error_of(client.get("/health", headers=headers), 431)["code"] == "headers_too_large"
    assert error_of(client.get("/v1/models?" + "q" * 20_000), 431)["code"] == "headers_too_large"
    assert_served(client)


@pytest.mark.parametrize("piece", [b"x-a: b\r\n" * 1000, b"a" * 8000], ids=["many", "one"])
def test_headers_without_an_end(server: RouterServer, client: httpx.Client, piece: bytes) -> None:
    """The server stops to take them long before the client is done."""
    sent = 0
    with connected(server) as sock:
        sock.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nx-b: ")
        try:
            while sent < 500_000_000:
                sock.sendall(piece)
                sent += len(piece)
        except OSError:  # closed on us
            pass
    assert sent < 100_000_000
    assert_served(client)


# Too slowly


def test_headers_that_do_not_come(server: RouterServer, client: httpx.Client) -> None:
    with connected(server) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nx-slow:")
        line, error = answer_of(sock)
    assert line == b"HTTP/1.1 408 Request Timeout"
    assert error["code"] == "request_timeout"
    assert_served(client)


@pytest.mark.parametrize("path", [COMPLETIONS, "/tokenize"])
def test_a_body_that_does_not_come(server: RouterServer, client: httpx.Client, path: str) -> None:
    """A byte now and then does not help."""
    with connected(server) as sock:
        sock.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n".encode())
        for _ in range(5):
            sock.sendall(b" ")
            time.sleep(0.02)
        line, error = answer_of(sock)
    assert line.startswith(b"HTTP/1.1 408 ")
    assert error["code"] == "request_timeout"
    assert_served(client)


def test_a_timely_client_is_not_bound_by_the_time_of_an_answer(server: RouterServer) -> None:
    """On one connection, with a longer pause than headers may take; then an answer that takes longer."""
    with server.client() as client:
        for _ in range(2):
            assert_served(client)
            time.sleep(0.5)
        body = {"prompt": [9, 8, 7], "max_tokens": 1200, "ignore_eos": True}
        assert client.post(COMPLETIONS, json=body).json()["usage"]["completion_tokens"] == 1200


def test_many_bodies_at_once_are_bounded_together() -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 90000\r\n\r\n"
    limits = LimitsConfig(max_body_bytes=100_000, max_unread_bytes=100_000)
    with RouterServer(config=router_config(limits=limits)) as server, server.client() as client:
        bodies = [connected(server) for _ in range(3)]
        for sock in bodies:
            sock.sendall(head + b" " * 40_000)
        _, *others = select.select(bodies, [], [], LONG_S)[0]
        assert not others  # the third was too much
        (line, error), *_ = [answer_of(sock) for sock in bodies if select.select([sock], [], [], 0)[0]]
        assert line.startswith(b"HTTP/1.1 429 ")
        assert error["code"] == "too_many_bodies"
        for sock in bodies:
            sock.close()
        assert_served(client)
        assert client.post(COMPLETIONS, content=b" " * 90_000).status_code == 400  # nothing is kept of them


def small_sockets(limits: LimitsConfig) -> RouterServer:
    """The kernel takes little of what nobody reads."""
    server = RouterServer([EchoWorker(0)], router_config(limits=limits))
    server._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)  # its connections inherit it
    return server


def ask_and_not_read(server: RouterServer, streamed: bool) -> socket.socket:
    """For some hundred kilobytes."""
    sock = connected(server)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    body = {"prompt": [7] * 64, "max_tokens": 300, "ignore_eos": True, "stream": streamed, "n": 8}
    data = json.dumps({**body, "logprobs": 20}).encode()
    sock.sendall(
        f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data
    )
    return sock


def test_a_slow_reader_is_counted_by_its_reason() -> None:
    with small_sockets(LimitsConfig(max_client_buffer_bytes=20_000)) as server:
        metrics = server.service.metrics
        with ask_and_not_read(server, True):
            wait_until(lambda: metrics.errors["client_too_slow"] == 1, 60)
        wait_until(lambda: metrics.finished["abort"] == 8)  # once its streams are down
        assert metrics.rejections["client_too_slow"] == 1
        with server.client() as client:
            text = client.get("/metrics").text
            assert 'ellm_request_errors_total{code="client_too_slow"' in text
            assert 'ellm_admission_rejections_total{model_name="pydoc-5m",reason="client_too_slow"' in text
            assert_served(client)


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_stops_to_read_at_the_end_is_cut_off(streamed: bool) -> None:
    """Nothing comes any more that could wait for it: the time that one piece takes is what tells."""
    limits = LimitsConfig(max_client_buffer_bytes=1 << 30, receive_timeout_s=0.5)
    with small_sockets(limits) as server:
        metrics, admission = server.service.metrics, server.service.dispatcher.admission
        with ask_and_not_read(server, streamed):
            wait_until(lambda: metrics.errors["client_too_slow"] == 1, 60)
            wait_until(lambda: admission.num_inflight == 0)
        if not streamed:
            wait_until(lambda: metrics.finished["length"] == 8)
        with server.client() as client:
            assert_served(client)


def test_every_server_of_a_routers_process_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Serve makes its servers: by uvicorn's own choice of a protocol."""
    monkeypatch.setattr(uvicorn.config, "HTTP_PROTOCOLS", dict(uvicorn.config.HTTP_PROTOCOLS))
    bound_heads(LIMITS)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        """Never called."""

    config = uvicorn.Config(app)
    config.load()
    assert issubclass(config.http_protocol_class, BoundedProtocol)
    assert config.http_protocol_class.limits is LIMITS
