"""A router's end of a channel to a worker on Ray, in the test's own process or in one that can be killed."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable

import ray
from support.cluster import workers
from support.workers import request

from ellm.router.replicas import RayDirectory
from ellm.router.stream_channel import StreamChannel
from ellm.worker.api import wire
from ellm.worker.api.channel import ChannelClosed
from ellm.worker.api.output import SequenceOutput
from ellm.worker.api.report import WorkerReport
from ellm.worker.api.request import EngineRequest


class Router:
    """One router's end of a channel."""

    def __init__(self, channel: StreamChannel, name: str = "r0") -> None:
        self.channel = channel
        self.name = name
        self.outputs: list[SequenceOutput] = []
        self.reports: list[WorkerReport] = []
        self.closed_at: float | None = None
        self.seq = 0
        self.tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._keep_alive())]

    async def _read(self) -> None:
        try:
            async for message in self.channel.outputs(self.name):
                epoch, _, packed, report = wire.check(message, "step")[:4]
                assert epoch == self.channel.info.epoch
                self.outputs += map(wire.unpack_output, packed)
                if report is not None:
                    self.reports.append(wire.unpack_report(report))
        except ChannelClosed:
            self.closed_at = time.monotonic()

    async def _keep_alive(self) -> None:
        try:
            while self.closed_at is None:
                await self.channel.abort(wire.abort(self.name, self.seq, []))
                await asyncio.sleep(0.2)
        except ChannelClosed:
            pass

    async def submit(self, *requests: EngineRequest) -> None:
        self.seq += 1
        await self.channel.submit(wire.submit(self.name, self.seq, requests))

    def tokens(self, request_id: str) -> tuple[int, ...]:
        return tuple(t for o in self.outputs if o.request_id == request_id for t in o.token_ids)

    def finished(self) -> set[str]:
        return {o.request_id for o in self.outputs if o.finish_reason is not None}

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


async def until(condition: Callable[[], object], timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.005)


async def until_replaced(directory: RayDirectory, old: set[str], number: int) -> list[StreamChannel]:
    deadline = time.monotonic() + 90
    while True:
        found = await workers(directory)
        if len(found) == number and not old & {c.info.epoch for c in found}:
            return found
        assert time.monotonic() < deadline, "the group did not come back"
        await asyncio.sleep(0.1)


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 240))  # type: ignore[arg-type]


@ray.remote(num_cpus=0)
class RouterProcess:
    """A router in a process of its own, which a test can kill."""

    async def begin(self, number: int) -> int:
        """Its pid, once it reads the streams of `number` long requests."""
        channel = (await workers(RayDirectory()))[0]
        self.router = Router(channel, "doomed")
        await self.router.submit(*(request(f"x{i}", 3000) for i in range(number)))
        await until(lambda: len({o.request_id for o in self.router.outputs}) == number, 10)
        return os.getpid()
