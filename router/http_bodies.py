"""Reads requests' bodies within limits, and writes answers as ASGI messages. No framework in between."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from typing import Any

import orjson
from starlette.types import Receive, Scope, Send

from ellm.router.config import LimitsConfig
from ellm.router.errors import BodyTooLarge, TooManyBodies, TooSlow
from ellm.router.openai.answer import error_body
from ellm.worker.api.errors import EllmError, InvalidRequest

JSON_TYPE = b"application/json"
LINGER_S = 2.0
LINGER_BYTES = 256 * 1024 * 1024
PIECE_BYTES = 256 * 1024


class ClientLeft(Exception):
    """The client closed the connection while it sent its request."""


class BodyReader:
    """One per router: what all clients together have sent of bodies that still come is bounded, too."""

    def __init__(self, limits: LimitsConfig) -> None:
        self._limits = limits
        self.num_unread = 0  # bytes of bodies that still come

    async def json(self, scope: Scope, receive: Receive) -> Any:
        """The parsed body. Raises BodyTooLarge before it reads more than that, TooSlow,
        TooManyBodies, InvalidRequest, ClientLeft."""
        body = await self._read(scope, receive)
        try:
            return orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise InvalidRequest(_json_fault(body, error)) from None

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        most, time_s = self._limits.max_body_bytes, self._limits.receive_timeout_s
        too_large = BodyTooLarge(f"the body is larger than {most} bytes")
        length = header(scope, b"content-length")
        if length is not None and length.isdigit() and int(length[:20]) > most:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(time_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientLeft
                    part = message.get("body", b"")
                    size += len(part)
                    self.num_unread += len(part)
                    if size > most:
                        raise too_large
                    parts.append(part)
                    if not message.get("more_body", False):
                        return b"".join(parts)
                    if self.num_unread > max(most, self._limits.max_unread_bytes):
                        raise TooManyBodies("the server reads as many bodies as it can", retry_after_s=1.0)
        except TimeoutError:
            raise TooSlow(f"the body did not come within {time_s:g} s") from None
        finally:
            self.num_unread -= size


def _json_fault(body: bytes, error: orjson.JSONDecodeError) -> str:
    if not body:
        return "the body is empty; send a JSON object"
    try:
        body.decode()
    except UnicodeDecodeError:
        return "the body is not valid UTF-8"
    return f"the body is not valid JSON: line {error.lineno}, column {error.colno}"


def header(scope: Scope, name: bytes) -> str | None:
    """The first header of this lower-case name."""
    for key, value in scope["headers"]:
        if key == name:
            text: str = value.decode("latin-1")
            return text
    return None


async def send_json(send: Send, body: bytes, *, limit_s: float) -> None:
    """A whole answer. In pieces: the server takes one when the client has read about as much. Raises
    TimeoutError when that takes longer than `limit_s`."""
    await send(_start(200, JSON_TYPE, {b"content-length": b"%d" % len(body)}))
    for at in range(0, len(body), PIECE_BYTES):
        piece = body[at : at + PIECE_BYTES]
        async with asyncio.timeout(limit_s):
            more = at + PIECE_BYTES < len(body)
            await send({"type": "http.response.body", "body": piece, "more_body": more})


def unfinished(error: EllmError) -> bool:
    """Whether it may come while the client still sends its body."""
    return isinstance(error, BodyTooLarge | TooSlow | TooManyBodies)


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
