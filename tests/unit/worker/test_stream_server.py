"""StreamServer and StreamChannel: who may speak, who is cut off, and what the end of a connection means."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import msgpack
import pytest
from support.workers import HeldExecutor, bulky, make_front, request, worker_config

from ellm.router import stream_channel
from ellm.router.stream_channel import StreamChannel
from ellm.worker import stream_server
from ellm.worker.api import wire
from ellm.worker.api.channel import ChannelClosed
from ellm.worker.api.output import SequenceOutput
from ellm.worker.engine.core import EngineCore
from ellm.worker.front import WorkerFront
from ellm.worker.stream_server import StreamServer

SECRET = b"between friends"


class Served:
    def __init__(self, front: WorkerFront, core: EngineCore, port: int) -> None:
        self.front = front
        self.core = core
        self.port = port

    def channel(self, secret: bytes = SECRET) -> StreamChannel:
        return StreamChannel(self.front.info, "127.0.0.1", self.port, secret)


@asynccontextmanager
async def served(step_s: float = 0.01) -> AsyncIterator[Served]:
    front, _, core = make_front(HeldExecutor(step_s), worker_config(router_lease_s=20.0))
    front.start()
    server = StreamServer(front, SECRET)
    port = await server.start("127.0.0.1")
    yield Served(front, core, port)
    await front.close()
    await server.close()


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 20))  # type: ignore[arg-type]


async def until(condition: Callable[[], object], timeout_s: float = 3.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.002)


def test_a_router_whose_connection_ends_is_dropped_without_waiting_for_its_lease() -> None:
    async def test() -> None:
        async with served() as s:
            gone, there = s.channel(), s.channel()
            streams = [gone.outputs("gone"), there.outputs("there")]
            for stream in streams:
                await anext(stream)
            await gone.submit(wire.submit("gone", 0, [request("a", 900), request("b", 900)]))
            await there.submit(wire.submit("there", 0, [request("c", 900)]))
            await until(lambda: s.front.num_live == 3)
            await streams[0].aclose()  # type: ignore[attr-defined]
            await until(lambda: s.front.num_live == 1)
            await until(lambda: s.front.num_streams == 1)
            assert wire.check(await anext(streams[1]), "step")

    run(test)


def test_the_end_of_a_former_line_does_not_end_a_router_that_has_come_again() -> None:
    async def test() -> None:
        async with served() as s:
            first, second = s.channel(), s.channel()
            old, new = first.outputs("r"), second.outputs("r")
            await anext(old)
            await first.submit(wire.submit("r", 0, [request("a", 900)]))
            await until(lambda: s.front.num_live == 1)
            await anext(new)
            await second.submit(wire.submit("r", 1, [request("b", 900)]))
            await old.aclose()  # type: ignore[attr-defined]  # the old line ends after the new one began
            await asyncio.sleep(0.1)
            assert s.front.num_live == 1
            for _ in range(20):
                outputs = wire.check(await anext(new), "step")[2]
                assert {o[0] for o in outputs} <= {"b"}
            assert outputs
            await new.aclose()  # type: ignore[attr-defined]

    run(test)


@pytest.mark.parametrize(
    "message",
    [
        wire.hello("r", b"a guess"),
        (wire.VERSION, "hello", "r", "between friends"),
        wire.submit("r", 0, []),
        (wire.VERSION + 2, "hello", "r", SECRET),
        7,
        b"x" * (stream_server.MAX_HELLO_BYTES + 1),
    ],
)
def test_a_stranger_is_turned_away(message: object) -> None:
    async def test() -> None:
        async with served() as s:
            reader, writer = await asyncio.open_connection("127.0.0.1", s.port)
            writer.write(msgpack.packb(message))
            writer.write(msgpack.packb(wire.submit("r", 0, [request("a")])))
            assert await asyncio.wait_for(reader.read(), 3) == b""
            assert s.front.num_live == 0
            writer.close()
            with pytest.raises(ChannelClosed):
                async for _ in s.channel(b"a guess").outputs("r"):
                    pass

    run(test)


@pytest.mark.parametrize(
    "message",
    [
        (wire.VERSION, "submit", "bad", 0, [("no", "request")]),
        (wire.VERSION, "dance", "bad"),
        (wire.VERSION,),
        wire.submit("good", 0, []),
        "nonsense",
    ],
)
def test_a_malformed_message_ends_its_own_connection_only(message: wire.Message) -> None:
    async def test() -> None:
        async with served() as s:
            good, bad = s.channel(), s.channel()
            streams = [good.outputs("good"), bad.outputs("bad")]
            for stream in streams:
                await anext(stream)
            await good.submit(wire.submit("good", 0, [request("a", 900)]))
            await bad.submit(message)
            with pytest.raises(ChannelClosed):
                async for _ in streams[1]:
                    pass
            assert wire.check(await anext(streams[0]), "step")
            assert s.front.num_live == 1

    run(test)


def test_a_connection_that_never_asks_for_the_stream_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_server, "OPEN_TIMEOUT_S", 0.2)

    async def test() -> None:
        async with served() as s:
            reader, writer = await asyncio.open_connection("127.0.0.1", s.port)
            writer.write(msgpack.packb(wire.hello("r", SECRET)))
            assert await asyncio.wait_for(reader.read(), 3) == b""
            writer.close()
            stream = s.channel().outputs("r2")
            await anext(stream)
            await asyncio.sleep(0.4)
            assert wire.check(await anext(stream), "step")

    run(test)


def test_a_line_that_was_given_up_ends_though_nobody_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_server, "CLOSE_TIMEOUT_S", 0.2)

    async def test() -> None:
        async with served(step_s=0.001) as s:
            with socket.create_connection(("127.0.0.1", s.port)) as line:
                for message in (wire.hello("r", SECRET), wire.open_stream("r")):
                    line.sendall(msgpack.packb(message))
                line.sendall(msgpack.packb(wire.submit("r", 0, [bulky("a", 990)])))
                await until(lambda: s.front.num_streams == 1 and s.front.num_live == 1)
                await until(lambda: s.front.num_live == 0, 15.0)  # far more than the sockets hold
                s.front.arrive("r")
                line.sendall(msgpack.packb(wire.abort("r", 0, [])))
                await until(lambda: s.front.num_streams == 0)

    run(test)


def test_the_last_tokens_of_a_drained_worker_arrive() -> None:
    async def test() -> None:
        async with served(step_s=0.002) as s:
            channel = s.channel()
            outputs: list[SequenceOutput] = []

            async def read() -> None:
                async for message in channel.outputs("r"):
                    outputs.extend(map(wire.unpack_output, wire.check(message, "step")[2]))

            reading = asyncio.create_task(read())
            await channel.submit(wire.submit("r", 0, [request(f"a{i}", 60) for i in range(20)]))
            await until(lambda: len({o.request_id for o in outputs}) == 20)  # all run: none is handed back
            assert await s.front.drain(5)
            s.front.end_streams()
            with pytest.raises(ChannelClosed):
                await reading
            assert len([o for o in outputs if o.finish_reason == "length"]) == 20

    run(test)


def test_a_stream_that_is_opened_again_at_once_ends_the_former() -> None:
    async def test() -> None:
        async with served() as s:
            channel = s.channel()
            streams = [channel.outputs("r"), channel.outputs("r")]
            first, second = await asyncio.gather(*map(anext, streams), return_exceptions=True)
            assert isinstance(first, ChannelClosed)
            assert wire.check(second, "step")  # type: ignore[arg-type]
            await until(lambda: s.front.num_streams == 1)
            await streams[1].aclose()  # type: ignore[attr-defined]

    run(test)


def test_nobody_at_the_other_end_is_a_closed_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with served() as s:
            info = s.front.info
        channel = StreamChannel(info, "127.0.0.1", s.port, SECRET)
        with pytest.raises(ChannelClosed):
            await anext(channel.outputs("r"))
        monkeypatch.setattr(stream_channel, "CONNECT_TIMEOUT_S", 0.1)
        with pytest.raises(ChannelClosed):
            await channel.abort(wire.abort("r", 0, []))

    run(test)


def test_what_is_sent_while_the_line_is_made_anew_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A heartbeat must not find the former line closed and take the new one for lost."""

    async def test() -> None:
        async with served() as s:
            channel = s.channel()
            former = channel.outputs("r")
            await anext(former)
            await former.aclose()  # type: ignore[attr-defined]
            await until(lambda: s.front.num_streams == 0)
            connect = StreamChannel._connect

            async def late(self: StreamChannel) -> object:
                await asyncio.sleep(0.2)
                return await connect(self)

            monkeypatch.setattr(StreamChannel, "_connect", late)
            stream = channel.outputs("r")
            opening = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0.05)
            assert not opening.done()
            await channel.abort(wire.abort("r", 0, []))
            await opening
            await channel.submit(wire.submit("r", 1, [request("a", 900)]))
            await until(lambda: s.front.num_live == 1)
            await stream.aclose()  # type: ignore[attr-defined]

    run(test)


@pytest.mark.needs_module("uvloop")
def test_it_works_on_the_event_loop_that_ray_uses() -> None:
    import uvloop

    async def test() -> None:
        async with served() as s:
            channel = s.channel()
            stream = channel.outputs("r")
            await anext(stream)
            await channel.submit(wire.submit("r", 0, [request("a", 3)]))
            async for message in stream:
                if any(o[0] == "a" for o in wire.check(message, "step")[2]):
                    break

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(test(), 10))  # type: ignore[arg-type]
