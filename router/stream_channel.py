"""WorkerChannel over one TCP connection to the worker's StreamServer. Any end of it is ChannelClosed.

The connection is the stream: `outputs` makes it, and what is submitted goes along with it. When the reader of
`outputs` leaves, it ends, and with it the requests. It does not suspect: a worker that is silent and not dead
is for the dispatcher to judge.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import AsyncIterator
from typing import cast

import msgpack

from ellm.worker.api import wire
from ellm.worker.api.channel import ChannelClosed
from ellm.worker.api.report import WorkerInfo
from ellm.worker.api.wire import Message

CONNECT_TIMEOUT_S = 3.0
# Beyond these the worker's end fills up and sees that its router lags.
MAX_UNREAD = 64  # messages
SOCKET_BYTES = 16 * 1024


class StreamChannel:
    """One incarnation of one worker, seen from one router."""

    def __init__(self, info: WorkerInfo, host: str, port: int, secret: bytes) -> None:
        self._info = info
        self._host = host
        self._port = port
        self._secret = secret
        self._connection: _Connection | None = None
        self._num_opened = 0
        self._connected = asyncio.Event()  # `_connection` is the newest stream's

    @property
    def info(self) -> WorkerInfo:
        return self._info

    async def submit(self, message: Message) -> None:
        await self._send(message)

    async def abort(self, message: Message) -> None:
        await self._send(message)

    async def outputs(self, router_id: str) -> AsyncIterator[Message]:
        self._num_opened += 1
        newest = self._num_opened
        if self._connection is not None:
            self._connection.close()
        # What is sent while the new line is made waits for it: the end of the former one is not its end.
        self._connection = None
        self._connected.clear()
        connection = await self._connect()
        if newest != self._num_opened:  # opened again meanwhile
            connection.close()
            raise ChannelClosed(f"{self._name}: the stream was opened again")
        self._connection = connection
        try:
            await connection.send(wire.hello(router_id, self._secret))
            await connection.send(wire.open_stream(router_id))
            self._connected.set()
            while (message := await connection.receive()) is not None:
                yield message
        finally:
            connection.close()
        raise ChannelClosed(f"{self._name} has ended the stream")

    @property
    def _name(self) -> str:
        return f"worker {self._info.worker_id} ({self._info.epoch})"

    async def _send(self, message: Message) -> None:
        if self._connection is None:  # the stream is about to be opened
            try:
                await asyncio.wait_for(self._connected.wait(), CONNECT_TIMEOUT_S)
            except TimeoutError:
                raise ChannelClosed(f"{self._name}: nobody has opened the stream") from None
        connection = self._connection
        if connection is None or not await connection.send(message):  # None: opened again just now
            raise ChannelClosed(f"{self._name} has closed the connection")

    async def _connect(self) -> _Connection:
        opening = asyncio.get_running_loop().create_connection(_Connection, self._host, self._port)
        try:
            _, connection = await asyncio.wait_for(opening, CONNECT_TIMEOUT_S)
        except (OSError, TimeoutError) as error:
            raise ChannelClosed(f"{self._name} cannot be reached: {error!r}") from None
        return connection


class _Connection(asyncio.Protocol):
    """Packs and unpacks; holds what was not read yet, and stops the peer when that grows."""

    def __init__(self) -> None:
        self.closed = False
        self._transport: asyncio.Transport | None = None
        self._unpacker = msgpack.Unpacker(use_list=False, max_buffer_size=0)
        self._pack = msgpack.Packer().pack
        self._unread: deque[Message] = deque()
        self._reading = True
        self._waiter: asyncio.Future[None] | None = None
        self._writable = asyncio.Event()
        self._writable.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not inherit from it
        sock = self._transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BYTES)

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        self._writable.set()
        self._wake()

    def data_received(self, data: bytes) -> None:
        self._unpacker.feed(data)
        self._unread.extend(self._unpacker)
        if self._reading and len(self._unread) > MAX_UNREAD:
            assert self._transport is not None
            self._transport.pause_reading()
            self._reading = False
        self._wake()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    async def send(self, message: Message) -> bool:
        """False if the connection is closed."""
        if not self.closed:
            assert self._transport is not None
            self._transport.write(self._pack(message))
            await self._writable.wait()
        return not self.closed

    async def receive(self) -> Message | None:
        """The next message; None when there will be none."""
        while not self._unread:
            if self.closed:
                return None
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        message = self._unread.popleft()
        if not self._reading and len(self._unread) <= MAX_UNREAD // 2 and not self.closed:
            assert self._transport is not None
            self._transport.resume_reading()
            self._reading = True
        return message

    def close(self) -> None:
        """What has not been read is lost."""
        self.closed = True
        self._unread.clear()
        self._wake()
        if self._transport is not None:
            self._transport.close()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
