"""LocalChannel and LocalDirectory: a worker in the same process, and how it is made to die."""

from __future__ import annotations

import asyncio

import pytest
from support.workers import HeldExecutor, make_front, request, worker_config

from ellm.worker.api import wire
from ellm.worker.api.channel import ChannelClosed
from ellm.worker.local_channel import LocalChannel, LocalDirectory


def test_a_severed_channel_is_one_to_a_dead_worker() -> None:
    async def test() -> None:
        front, _, _ = make_front(HeldExecutor(), worker_config())
        front.start()
        channel = LocalChannel(front)
        stream = channel.outputs("r")
        await anext(stream)
        await channel.submit(wire.submit("r", 0, [request("a", 50)]))
        channel.sever()
        with pytest.raises(ChannelClosed):
            await anext(stream)
        for call in (channel.submit(wire.submit("r", 1, [])), channel.abort(wire.abort("r", 1, []))):
            with pytest.raises(ChannelClosed):
                await call
        assert front.num_live == 0
        await front.close()

    asyncio.run(test())


def test_a_directory_keeps_one_channel_per_epoch() -> None:
    async def test() -> None:
        front, _, _ = make_front(HeldExecutor(), worker_config())
        channel = LocalChannel(front)
        directory = LocalDirectory(channel)
        assert (await directory.refresh())["e0"] is channel
        assert (await directory.refresh())["e0"] is channel
        del directory.channels["e0"]
        assert await directory.refresh() == {}
        await front.close()

    asyncio.run(test())
