"""Reads a request's body within its limit, and writes answers as ASGI messages. No framework in between."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from typing import Any

import orjson
from starlette.types import Receive, Scope, Send

from ellm.router.errors import BodyTooLarge
from ellm.router.openai.answer import error_body
from ellm.worker.api.errors import EllmError, InvalidRequest

JSON_TYPE = b"application/json"
LINGER_S = 2.0
LINGER_BYTES = 256 * 1024 * 1024


class ClientLeft(Exception):
    """The client closed the connection while it sent its request."""


async def read_json(scope: Scope, receive: Receive, max_bytes: int) -> Any:
    """The parsed body. Raises BodyTooLarge before it reads more than that, InvalidRequest, ClientLeft."""
    body = await _read(scope, receive, max_bytes)
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(_json_fault(body, error)) from None


def _json_fault(body: bytes, error: orjson.JSONDecodeError) -> str:
    if not body:
        return "the body is empty; send a JSON object"
    try:
        body.decode()
    except UnicodeDecodeError:
        return "the body is not valid UTF-8"
    return f"the body is not valid JSON: line {error.lineno}, column {error.colno}"


async def _read(scope: Scope, receive: Receive, max_bytes: int) -> bytes:
    too_large = BodyTooLarge(f"the body is larger than {max_bytes} bytes")
    length = header(scope, b"content-length")
    if length is not None and length.isdigit() and int(length[:20]) > max_bytes:
        raise too_large
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        part = message.get("body", b"")
        size += len(part)
        if size > max_bytes:
            raise too_large
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


def header(scope: Scope, name: bytes) -> str | None:
    """The first header of this lower-case name."""
    for key, value in scope["headers"]:
        if key == name:
            text: str = value.decode("latin-1")
            return text
    return None


async def send_json(
    send: Send, body: bytes, status: int = 200, headers: Mapping[bytes, bytes] | None = None
) -> None:
    """A whole answer."""
    await send(_start(status, JSON_TYPE, {**(headers or {}), b"content-length": b"%d" % len(body)}))
    await send({"type": "http.response.body", "body": body})


async def send_error(send: Send, error: EllmError, receive: Receive | None = None) -> None:
    """The typed error. With `receive`, a body that the client still sends is read and dropped for a while: a
    connection that is closed on it may lose the answer on its way."""
    body = orjson.dumps(error_body(error))
    headers = {b"content-length": b"%d" % len(body)}
    if error.retry_after_s is not None:
        headers[b"retry-after"] = b"%d" % max(1, math.ceil(error.retry_after_s))
    if error.status == 401:
        headers[b"www-authenticate"] = b"Bearer"
    if receive is None:
        await send(_start(error.status, JSON_TYPE, headers))
        await send({"type": "http.response.body", "body": body})
        return
    headers[b"connection"] = b"close"
    await send(_start(error.status, JSON_TYPE, headers))
    await send({"type": "http.response.body", "body": body, "more_body": True})
    await _drop_body(receive)
    await send({"type": "http.response.body", "body": b""})


async def _drop_body(receive: Receive) -> None:
    left = LINGER_BYTES
    try:
        async with asyncio.timeout(LINGER_S):
            while left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
    except TimeoutError:
        return


def stream_start() -> dict[str, Any]:
    """Begins a stream of server-sent events; no proxy on the way may gather them."""
    headers = {b"cache-control": b"no-cache", b"x-accel-buffering": b"no"}
    return _start(200, b"text/event-stream; charset=utf-8", headers)


def _start(status: int, content_type: bytes, headers: Mapping[bytes, bytes]) -> dict[str, Any]:
    return {
        "type": "http.response.start",
        "status": status,
        "headers": [(b"content-type", content_type), *headers.items()],
    }
