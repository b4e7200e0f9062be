"""One HTTP/1.1 connection that carries one request at a time, as a bare asyncio protocol.

An HTTP library costs a generator more than all the rest: this one parses what a response needs (status,
length or chunks, keep-alive), calls back with the body's bytes as they come, and makes no task and no future.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

MAX_HEAD = 65_536


class Exchange(Protocol):
    """Who is told of one response. `broken` or `finished` is called once, as the last."""

    def head(self, status: int, headers: dict[bytes, bytes]) -> None: ...
    def body(self, data: bytes) -> None: ...
    def finished(self) -> None: ...
    def broken(self, why: str) -> None: ...


class HttpConnection(asyncio.Protocol):
    """`release(self)` is called when a response has ended and the connection may carry another request."""

    def __init__(self, release: Callable[[HttpConnection], None]) -> None:
        self._release = release
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._buffer = b""
        self._in_body = False
        self._chunked = False
        self._left = 0  # bytes of the body or the chunk; -1: to the end of the connection
        self._close_after = False
        self.closed = False
        self.used = False  # has carried a whole response before

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def send(self, request: bytes, exchange: Exchange) -> None:
        """Write a request. The connection must be idle."""
        assert self._exchange is None and self._transport is not None  # noqa: PT018
        self._exchange = exchange
        self._buffer, self._in_body = b"", False
        self._transport.write(request)

    def cut(self) -> None:
        """Close at once; nobody is told any more."""
        self._exchange = None
        self.closed = True
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._exchange is None:
            self.cut()  # nobody has asked
            return
        self._buffer = self._buffer + data if self._buffer else data
        try:
            if self._in_body or self._head():
                self._body()
        except ValueError as error:
            self._end(f"not HTTP: {error}")

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        if self._exchange is None:
            return
        if self._in_body and self._left == -1 and error is None:
            self._end(None)
        else:
            self._end(f"connection lost: {error or 'closed by the server'}")

    def _head(self) -> bool:
        """Whether the head is complete; then it has been told."""
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > MAX_HEAD:
                raise ValueError("the head of the response is endless")
            return False
        lines = self._buffer[:end].split(b"\r\n")
        self._buffer = self._buffer[end + 4 :]
        parts = lines[0].split(b" ", 2)
        if not parts[0].startswith(b"HTTP/1.") or len(parts) < 2:
            raise ValueError(repr(lines[0][:40]))
        status = int(parts[1])
        if status < 200:  # 100 Continue
            return self._head()
        headers = {}
        for line in lines[1:]:
            name, _, value = line.partition(b":")
            headers[name.lower()] = value.strip()
        self._chunked = b"chunked" in headers.get(b"transfer-encoding", b"").lower()
        connection = headers.get(b"connection", b"").lower()
        self._close_after = connection == b"close" or parts[0] == b"HTTP/1.0"
        length = headers.get(b"content-length")
        self._left = 0 if self._chunked else -1 if length is None else int(length)
        self._in_body = True
        assert self._exchange is not None
        self._exchange.head(status, headers)
        return True

    def _body(self) -> None:
        if self._chunked:
            self._chunks()
            return
        data, self._buffer = self._buffer, b""
        if self._left >= 0:
            data = data[: self._left]
            self._left -= len(data)
        if data and self._exchange is not None:
            self._exchange.body(data)
        if self._left == 0:
            self._end(None)

    def _chunks(self) -> None:
        """Hand out the chunks that are here; `_left` counts the present one's bytes and its CRLF."""
        buffer, place, size = self._buffer, 0, len(self._buffer)
        whole = []
        ended = False
        while place < size:
            if self._left:
                taken = min(self._left, size - place)
                payload = min(taken, max(0, self._left - 2))
                if payload:
                    whole.append(buffer[place : place + payload])
                self._left -= taken
                place += taken
                continue
            line_end = buffer.find(b"\r\n", place)
            if line_end < 0:
                break
            length = int(buffer[place:line_end].split(b";", 1)[0], 16)
            if length == 0:
                # Trailers are as rare as they are useless: the end is the empty line behind them.
                if buffer.find(b"\r\n", line_end + 2) < 0:
                    break
                ended = True
                break
            self._left = length + 2
            place = line_end + 2
        self._buffer = buffer[place:]
        if whole and self._exchange is not None:
            self._exchange.body(b"".join(whole))
        if ended:
            self._end(None)

    def _end(self, why: str | None) -> None:
        exchange, self._exchange = self._exchange, None
        reusable = why is None and not self._close_after and not self.closed
        self.used = self.used or why is None
        if not reusable:
            self.cut()
        if exchange is None:
            return
        if why is not None:
            exchange.broken(why)
        else:
            exchange.finished()
        if reusable:
            self._release(self)
