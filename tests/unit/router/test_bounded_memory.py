"""What hostile requests take at most: memory of the process, and time. Each is refused with a typed error,
and the next request is served."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from support.router_server import MODEL, EchoWorker, RouterServer, router_config
from support.rpc import Client, rpc_client

from ellm.router.config import LimitsConfig
from ellm.router.rpc import ellm_inference_pb2 as pb

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MIB = 1 << 20
LONG_S = 20.0  # on a busy machine
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
HI = [{"role": "user", "content": "hi"}]
LIMITS = LimitsConfig(max_body_bytes=16 * MIB)


@pytest.fixture(scope="module")
def server() -> Iterator[RouterServer]:
    with RouterServer([EchoWorker(0)], router_config(limits=LIMITS), grpc=True) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RouterServer) -> Iterator[httpx.Client]:
    with server.client() as open_client:
        yield open_client


def served(client: httpx.Client) -> None:
    body = {"model": MODEL, "prompt": "fine", "max_tokens": 2}
    assert client.post(COMPLETIONS, json=body).json()["usage"]["completion_tokens"] == 2


def status_bytes(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def growth(call: Callable[[], None]) -> int:
    """Bytes by which this process, server and client together, grew at most while `call` ran."""
    with contextlib.suppress(OSError):  # where it cannot be reset, only what is above all before it is seen
        CLEAR_REFS.write_text("5")  # the highest resident size counts from now on
    before = status_bytes("VmHWM")
    call()
    return status_bytes("VmHWM") - before


def schema_of(megabytes: int) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {f"p{i}": {"enum": ["x" * 1000]} for i in range(megabytes * 1000)},
    }


def chat(**fields: Any) -> bytes:
    return json.dumps({"messages": HI, "max_tokens": 1, **fields}).encode()


def form(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}


TOOLS = [
    {"type": "function", "function": {"name": f"f{i}", "parameters": {"type": "object"}}}
    for i in range(10_000)
]
BODIES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "a schema of 10 MB": (CHAT, lambda: chat(response_format=form(schema_of(10)))),
    "a schema of 10 MB as text": (CHAT, lambda: chat(guided_json=json.dumps(schema_of(10)))),
    "10,000 tools": (CHAT, lambda: chat(tools=TOOLS)),
    "nested objects": (
        CHAT,
        lambda: b'{"messages": ' + b'{"a":' * 1_000_000 + b"1" + b"}" * 1_000_000 + b"}",
    ),
    "nested lists": (CHAT, lambda: b'{"messages": ' + b"[" * 4_000_000 + b"]" * 4_000_000 + b"}"),
    "ten million numbers": (COMPLETIONS, lambda: b'{"prompt": [' + b"1," * 7_000_000 + b"1]}"),
    "a long text": (COMPLETIONS, lambda: b'{"prompt": "' + b"x" * (15 * MIB) + b'"}'),
    "repeated repetitions": (COMPLETIONS, lambda: regex("((a{1,1000}){1,1000}){1,1000}")),
    "many states": (COMPLETIONS, lambda: regex("(.*a.{200}|.*b.{300}){50}")),
    "a long run": (COMPLETIONS, lambda: regex("(a|aa)*.{0,50000}x")),
}
OBEYED = ("many states", "a long run")  # until they grow beyond the limit of one sequence, if they do


def regex(pattern: str) -> bytes:
    return json.dumps({"prompt": "a", "max_tokens": 60, "guided_regex": pattern}).encode()


@pytest.mark.needs_module("llguidance")
@pytest.mark.parametrize("name", BODIES)
def test_a_hostile_body(client: httpx.Client, name: str) -> None:
    path, make = BODIES[name]
    body = make()
    served(client)
    begun = time.monotonic()

    def ask() -> None:
        answer = client.post(path, content=body)
        if name in OBEYED and answer.status_code == 200:
            return
        assert answer.status_code == 400, answer.text[:300]
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    # Read, parsed and looked through: a multiple of the body, and what a grammar may take.
    assert growth(ask) < 64 * MIB + 24 * len(body)
    assert time.monotonic() - begun < LONG_S
    served(client)


def test_a_body_without_an_end_takes_no_more_than_the_limit(client: httpx.Client) -> None:
    piece = b" " * MIB

    def ask() -> None:
        answer = client.post(CHAT, content=(piece for _ in range(400)))
        assert answer.status_code == 413

    assert growth(ask) < 64 * MIB + 2 * LIMITS.max_body_bytes
    served(client)


def test_headers_without_an_end_take_no_more_than_the_limit(
    server: RouterServer, client: httpx.Client
) -> None:
    piece = b"x-a: b\r\n" * 10_000
    host, port = server.url.removeprefix("http://").split(":")

    def ask() -> None:
        with socket.create_connection((host, int(port)), timeout=LONG_S) as sock:
            sock.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n")
            try:
                for _ in range(5000):
                    sock.sendall(piece)
            except OSError:
                return
        raise AssertionError("400 MB of headers were taken")

    assert growth(ask) < 64 * MIB
    served(client)


def test_a_grpc_message_over_the_limit(server: RouterServer, client: httpx.Client) -> None:
    """Plain, and packed so that it is small on the wire."""
    message = pb.GenerateRequest(text="x" * (64 * MIB))
    begun = time.monotonic()
    with rpc_client(server) as rpc:

        def ask(compression: grpc.Compression = grpc.Compression.NoCompression) -> None:
            assert ended(rpc, message, compression) is grpc.StatusCode.RESOURCE_EXHAUSTED

        # The client itself holds the message once or twice.
        assert growth(ask) < 64 * MIB + 3 * 64 * MIB
        assert growth(lambda: ask(grpc.Compression.Gzip)) < 64 * MIB + 3 * 64 * MIB
    assert time.monotonic() - begun < 2 * LONG_S
    served(client)


def ended(rpc: Client, message: pb.GenerateRequest, compression: grpc.Compression) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        list(rpc.inference.Generate(message, compression=compression, timeout=60))
    code: grpc.StatusCode = caught.value.code()
    return code


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (b"Authorization: Bearer sec\nret", 401),  # the second half is no header
        (b"Authorization: Bearer sec\r\n ret", 401),  # folded, as headers once could be
        (b"Authorization: Bearer sec\rret", 401),
        (b"Authorization: Bearer secret\x00", 401),
    ],
    ids=["newline", "folded", "carriage return", "nul"],
)
def test_a_key_with_a_newline_on_the_wire(line: bytes, status: int) -> None:
    """Opens nothing, be it that the line is no HTTP (400) or that the key is none of ours (401)."""
    with RouterServer(config=router_config(api_keys=("secret",))) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=LONG_S) as sock:
            sock.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n" + line + b"\r\nConnection: close\r\n\r\n")
            answer = b""
            while part := sock.recv(65536):
                answer += part
        assert answer.split(b" ")[1] in (b"400", str(status).encode()), answer
        assert b"pydoc-5m" not in answer
        with server.client(headers={"Authorization": "Bearer secret"}) as client:
            assert client.get("/v1/models").status_code == 200
