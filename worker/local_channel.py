"""A worker in the same process as its router: the same front and engine, no Ray and no serialisation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping

from ellm.worker.api import wire
from ellm.worker.api.channel import ChannelClosed, WorkerChannel
from ellm.worker.api.report import WorkerInfo
from ellm.worker.front import WorkerFront


class LocalChannel:
    """WorkerChannel over a WorkerFront. `sever` makes it what a channel to a dead worker is."""

    def __init__(self, front: WorkerFront) -> None:
        self._front = front
        self._severed = False
        self._tenure = 0
        self._opened = asyncio.Event()  # for the first time

    @property
    def info(self) -> WorkerInfo:
        return self._front.info

    def sever(self) -> None:
        """From now on every call raises ChannelClosed, and open streams end with it at their next message."""
        self._severed = True

    async def submit(self, message: wire.Message) -> None:
        """Waits for the stream to be opened."""
        await self._hold(message)
        self._front.submit(message)

    async def abort(self, message: wire.Message) -> None:
        """Waits for the stream to be opened."""
        await self._hold(message)
        self._front.abort(message)

    async def outputs(self, router_id: str) -> AsyncIterator[wire.Message]:
        self._check()
        self._tenure = tenure = self._front.arrive(router_id)
        self._opened.set()
        try:
            async for message in self._front.outputs(router_id, tenure):
                self._check()
                yield message
        finally:
            self._front.leave(router_id, tenure)
        raise ChannelClosed(f"worker {self.info.worker_id} has ended the stream")

    async def _hold(self, message: wire.Message) -> None:
        """Raise ChannelClosed unless the front knows the router by the stream that was opened here last."""
        self._check()
        await self._opened.wait()
        self._check()
        if not self._front.holds(message[2], self._tenure):
            raise ChannelClosed(f"worker {self.info.worker_id} has ended the stream")

    def _check(self) -> None:
        if self._severed or self._front.report().state == "failed":
            raise ChannelClosed(f"worker {self.info.worker_id} is gone")


class LocalDirectory:
    """WorkerDirectory over channels that are put in and taken out by hand."""

    def __init__(self, *channels: WorkerChannel) -> None:
        self.channels: dict[str, WorkerChannel] = {c.info.epoch: c for c in channels}

    async def refresh(self) -> Mapping[str, WorkerChannel]:
        return dict(self.channels)
