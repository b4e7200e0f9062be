"""StreamServer: the worker's end of the data path, one TCP connection per router.

A connection carries messages of wire.py as msgpack, which holds builtins only and runs no code when it is
read. Its first message must be HELLO with the secret that the rank hands out over Ray; then SUBMIT and ABORT
come in and, once OPEN has come, STEP goes out. When a connection ends, its router is gone: the front drops it
at once. The other way round, a connection ends with the next message on it when its router was dropped or has
come again over another one. A router that does not read fills the socket, then the outbox, and is cut off
there.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import socket
from contextlib import aclosing
from typing import Any, cast

import msgpack

from ellm.worker.api import wire
from ellm.worker.front import WorkerFront

log = logging.getLogger(__name__)

OPEN_TIMEOUT_S = 10.0  # from the connection to OPEN
CLOSE_TIMEOUT_S = 1.0
MAX_HELLO_BYTES = 4096  # what a stranger may send
MAX_MESSAGE_BYTES = 64 * 2**20
SOCKET_BYTES = 16 * 1024  # beyond it steps wait in the outbox, where they merge and their age is seen


class StreamServer:
    """Serves one front on the event loop on which `start` is called."""

    def __init__(self, front: WorkerFront, secret: bytes) -> None:
        self._front = front
        self._secret = secret
        self._server: asyncio.Server | None = None
        self._sessions: set[_Session] = set()

    async def start(self, host: str) -> int:
        """Listen on a free port of `host`; returns the port."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._session, host, 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def close(self) -> None:
        """End every connection, after what was written to it has gone out."""
        if self._server is not None:
            self._server.close()
        for session in list(self._sessions):
            session.close()
        deadline = asyncio.get_running_loop().time() + CLOSE_TIMEOUT_S
        while self._sessions and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.01)

    def _session(self) -> _Session:
        return _Session(self._front, self._secret, self._sessions)


class _Session(asyncio.Protocol):
    """One connection."""

    def __init__(self, front: WorkerFront, secret: bytes, sessions: set[_Session]) -> None:
        self._front = front
        self._secret = secret
        self._sessions = sessions
        self._transport: asyncio.Transport | None = None
        self._unpacker = msgpack.Unpacker(use_list=False, max_buffer_size=MAX_MESSAGE_BYTES)
        self._router_id: str | None = None
        self._tenure = 0
        self._strange_bytes = 0
        self._stream: asyncio.Task[None] | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._impatience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not inherit from it
        self._transport.set_write_buffer_limits(high=0)
        sock = self._transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
        self._sessions.add(self)
        loop = asyncio.get_running_loop()
        self._impatience = loop.call_later(OPEN_TIMEOUT_S, self.close)

    def connection_lost(self, error: Exception | None) -> None:
        self._sessions.discard(self)
        self._be_patient()
        if self._stream is not None:
            self._stream.cancel()
        if self._router_id is not None:
            self._front.leave(self._router_id, self._tenure)

    def data_received(self, data: bytes) -> None:
        if self._router_id is None:
            self._strange_bytes += len(data)
            if self._strange_bytes > MAX_HELLO_BYTES:
                self.close()
                return
        try:
            self._unpacker.feed(data)
            for message in self._unpacker:
                self._take(message)
        except Exception as error:  # the edge: whatever a peer sends ends its own connection only
            log.warning("connection of %s ends: %r", self._router_id or "a stranger", error)
            self.close()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def close(self) -> None:
        """What was written goes out first, for as long as the peer takes it."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.close()
            self._be_patient()
            self._impatience = asyncio.get_running_loop().call_later(CLOSE_TIMEOUT_S, self._transport.abort)

    def _take(self, message: Any) -> None:
        if self._router_id is None:
            self._router_id = self._greet(message)
            self._tenure = self._front.arrive(self._router_id)
        elif not self._front.holds(self._router_id, self._tenure):
            self.close()
        elif message[1] in ("submit", "abort"):
            if message[2] != self._router_id:
                raise wire.WireError("a message in another router's name")
            (self._front.submit if message[1] == "submit" else self._front.abort)(message)
        elif message[1] == "open":
            wire.check(message, "open")
            self._be_patient()
            if self._stream is None:
                self._stream = asyncio.get_running_loop().create_task(self._send_steps(self._router_id))
        else:
            raise wire.WireError(f"a message of kind {message[1]!r}")

    def _greet(self, message: Any) -> str:
        """The router's id. Raises WireError for one who does not know the secret."""
        router_id, secret = wire.check(message, "hello")[:2]
        if not isinstance(secret, bytes) or not hmac.compare_digest(secret, self._secret):
            raise wire.WireError("the secret is wrong")
        return str(router_id)

    def _be_patient(self) -> None:
        if self._impatience is not None:
            self._impatience.cancel()

    async def _send_steps(self, router_id: str) -> None:
        transport = self._transport
        assert transport is not None
        pack = msgpack.Packer().pack
        async with aclosing(self._front.outputs(router_id, self._tenure)) as steps:
            async for message in steps:
                transport.write(pack(message))
                if not self._writable.is_set():
                    await self._writable.wait()
        self.close()
