"""The controller's line to a worker: its beats go on whatever becomes of one of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from support.reports import INFO

from ellm.cluster import driver
from ellm.cluster.driver import Listener
from ellm.worker.api import wire
from ellm.worker.api.channel import ChannelClosed


class Flaky:
    """A channel on which the first beats come too early."""

    info = INFO

    def __init__(self, num_closed: int) -> None:
        self.num_beats = 0
        self._num_closed = num_closed

    async def submit(self, message: wire.Message) -> None:
        raise AssertionError("a controller submits nothing")

    async def abort(self, message: wire.Message) -> None:
        self.num_beats += 1
        if self.num_beats <= self._num_closed:
            raise ChannelClosed("the former line is closed")

    async def outputs(self, router_id: str) -> AsyncIterator[wire.Message]:
        yield wire.step("e0", 0, [], None)
        await asyncio.Event().wait()


def test_beats_go_on_after_one_that_found_the_line_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "HEARTBEAT_S", 0.01)

    async def test() -> int:
        channel = Flaky(num_closed=2)
        listener = Listener(channel, "controller-1")
        async with asyncio.timeout(30):
            while channel.num_beats < 5:
                await asyncio.sleep(0.005)
        await listener.close()
        return listener.num_heard

    assert asyncio.run(test()) == 1
