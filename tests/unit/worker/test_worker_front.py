"""WorkerFront over a real engine: one merged stream per router, idempotence, leases, lag, draining.

Every test runs over both lines: in the same process, and over a TCP connection.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import pytest
from support.workers import HeldExecutor, bulky, expected_tokens, make_front, request, worker_config

from ellm.router.stream_channel import StreamChannel
from ellm.worker.api import wire
from ellm.worker.api.channel import ChannelClosed, WorkerChannel
from ellm.worker.api.config import WorkerConfig
from ellm.worker.api.output import SequenceOutput
from ellm.worker.api.report import WorkerReport
from ellm.worker.api.request import EngineRequest
from ellm.worker.engine.core import EngineCore
from ellm.worker.front import WorkerFront
from ellm.worker.local_channel import LocalChannel
from ellm.worker.loop import EngineLoop
from ellm.worker.stream_server import StreamServer

SECRET = b"between friends"
LINE: ContextVar[str] = ContextVar("LINE")


@pytest.fixture(params=["local", "tcp"], autouse=True)
def _line(request: pytest.FixtureRequest) -> Iterator[None]:
    token = LINE.set(request.param)
    yield
    LINE.reset(token)


@dataclass
class Worker:
    front: WorkerFront
    engine: EngineLoop
    core: EngineCore
    executor: HeldExecutor
    port: int

    def connect(self) -> WorkerChannel:
        """Each router process has a channel of its own."""
        if LINE.get() == "local":
            return LocalChannel(self.front)
        return StreamChannel(self.front.info, "127.0.0.1", self.port, SECRET)


@asynccontextmanager
async def worker(config: WorkerConfig | None = None, step_s: float = 0.002) -> AsyncIterator[Worker]:
    executor = HeldExecutor(step_s)
    front, engine, core = make_front(executor, config or worker_config())
    front.start()
    server = StreamServer(front, SECRET)
    port = await server.start("127.0.0.1")
    yield Worker(front, engine, core, executor, port)
    executor.gate.set()
    await front.close()
    await server.close()
    assert engine.state in ("stopped", "failed")


@dataclass
class Router:
    """A router's end of a channel: reads its stream and keeps what came."""

    worker: Worker
    name: str = "r0"
    outputs: list[SequenceOutput] = field(default_factory=list)
    reports: list[WorkerReport] = field(default_factory=list)
    steps: list[tuple[float, int, int]] = field(default_factory=list)  # (when, message number, outputs in it)
    closed: bool = False
    seq: int = 0
    task: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        self.channel = self.worker.connect()

    def read(self) -> Router:
        self.task = asyncio.create_task(self._read())
        return self

    async def _read(self) -> None:
        try:
            async for message in self.channel.outputs(self.name):
                epoch, seq, packed, report = wire.check(message, "step")[:4]
                assert epoch == "e0"
                self.steps.append((time.monotonic(), seq, len(packed)))
                self.outputs += map(wire.unpack_output, packed)
                if report is not None:
                    self.reports.append(wire.unpack_report(report))
        except ChannelClosed:
            self.closed = True

    async def submit(self, *requests: EngineRequest) -> None:
        self.seq += 1
        await self.channel.submit(wire.submit(self.name, self.seq, requests))

    async def abort(self, *ids: tuple[str, int]) -> None:
        await self.channel.abort(wire.abort(self.name, self.seq, ids))

    def tokens(self, request_id: str, attempt: int = 0) -> tuple[int, ...]:
        found: tuple[int, ...] = ()
        for output in self.outputs:
            if (output.request_id, output.attempt) == (request_id, attempt):
                assert output.output_index == len(found)
                found += output.token_ids
        return found

    def reasons(self) -> dict[str, str | None]:
        return {o.request_id: o.finish_reason for o in self.outputs if o.finish_reason is not None}


async def until(condition: Callable[[], object], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.002)


async def exhaust(stream: AsyncIterator[wire.Message]) -> None:
    async for _ in stream:
        pass


def all_blocks_free(w: Worker) -> bool:
    report = w.engine.report
    return report.num_running == report.num_waiting == 0 and (
        report.free_blocks + report.cached_blocks == report.num_blocks
    )


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 30))  # type: ignore[arg-type]


def test_one_message_per_step_carries_all_requests_of_a_router_and_no_others() -> None:
    async def test() -> None:
        async with worker() as w:
            a, b = Router(w, "a").read(), Router(w, "b").read()
            await a.submit(*(request(f"a{i}", 20) for i in range(6)))
            await b.submit(request("b0", 20))
            await until(lambda: len(a.reasons()) == 6 and b.reasons() == {"b0": "length"})
            for i in range(6):
                assert a.tokens(f"a{i}") == expected_tokens(request(f"a{i}", 20))
            assert b.tokens("b0") == expected_tokens(request("b0", 20))
            assert {o.request_id for o in b.outputs} == {"b0"}
            assert len([n for _, _, n in a.steps if n]) <= 22  # 20 steps, however many requests
            assert [seq for _, seq, _ in a.steps] == list(range(len(a.steps)))
            assert w.front.num_live == 0

    run(test)


def test_an_idle_stream_says_every_heartbeat_how_the_worker_is() -> None:
    async def test() -> None:
        async with worker() as w:
            router = Router(w).read()
            for _ in range(4):
                await router.abort()  # says only that the router is there
                await asyncio.sleep(0.15)
            gaps = [b[0] - a[0] for a, b in zip(router.steps, router.steps[1:], strict=False)]
            assert len(router.reports) == len(router.steps) >= 5
            assert sorted(gaps)[len(gaps) // 2] < 0.1  # the heartbeat is 0.05
            assert max(gaps) < 0.5
            assert {r.state for r in router.reports} == {"ready"}
            assert [r.seq for r in router.reports] == sorted(r.seq for r in router.reports)

    run(test)


def test_a_busy_stream_carries_reports_too_but_not_with_every_step() -> None:
    async def test() -> None:
        async with worker(worker_config(heartbeat_s=0.2)) as w:
            router = Router(w).read()
            await router.submit(request("a", 200))
            await until(lambda: router.reasons())
            assert 2 <= len(router.reports) <= len(router.steps) / 3
            assert dict(router.reports[-1].last_submit_seq) == {"r0": 1}
            assert max(r.num_running for r in router.reports) == 1

    run(test)


def test_a_submission_is_taken_once_also_after_its_end() -> None:
    async def test() -> None:
        async with worker() as w:
            router = Router(w).read()
            await router.submit(request("a", 10), request("a", 10))
            await router.submit(request("a", 10))
            await until(lambda: router.reasons())
            await router.submit(request("a", 10))
            await router.submit(request("b", 10))
            await until(lambda: "b" in router.reasons())
            assert router.tokens("a") == expected_tokens(request("a", 10))
            assert w.engine.report.generation_tokens <= 20

    run(test)


def test_an_abort_that_overtook_its_submission_still_counts() -> None:
    async def test() -> None:
        async with worker() as w:
            router = Router(w).read()
            await router.abort(("a", 1))
            await router.submit(request("a", 10, attempt=1), request("b", 10))
            await until(lambda: "b" in router.reasons())
            assert router.tokens("a", 1) == ()
            await router.submit(request("a", 10, attempt=2))  # a newer attempt is another matter
            await until(lambda: "a" in router.reasons())
            assert router.tokens("a", 2) == expected_tokens(request("a", 10))

    run(test)


def test_a_newer_attempt_takes_the_place_of_an_older_one() -> None:
    async def test() -> None:
        async with worker() as w:
            router = Router(w).read()
            await router.submit(request("a", 500))
            await until(lambda: len(router.tokens("a")) > 3)
            await router.submit(request("a", 30, attempt=1))
            seen = len(router.tokens("a"))
            await router.submit(request("a", 500))  # a late copy of the first
            await router.abort(("a", 0))  # and its late abort
            await until(lambda: router.reasons())
            assert router.tokens("a", 1) == expected_tokens(request("a", 30))
            assert len(router.tokens("a")) <= seen + 2  # what was on its way
            await until(lambda: all_blocks_free(w))

    run(test)


def test_an_abort_is_idempotent_and_only_for_ones_own() -> None:
    async def test() -> None:
        async with worker() as w:
            a, b = Router(w, "a").read(), Router(w, "b").read()
            await a.submit(request("x", 900))
            await b.submit(request("y", 40))
            await until(lambda: len(a.tokens("x")) > 3)
            for _ in range(3):
                await a.abort(("x", 0), ("y", 0))
            seen = len(a.tokens("x"))
            await until(lambda: b.reasons() == {"y": "length"})
            assert len(a.tokens("x")) <= seen + 1
            assert w.front.num_live == 0
            await until(lambda: all_blocks_free(w))
            w.core.check()

    run(test)


def test_a_silent_router_loses_its_requests_and_its_stream_and_a_speaking_one_does_not() -> None:
    async def test() -> None:
        async with worker(worker_config(router_lease_s=0.6), step_s=0.01) as w:
            silent, speaking = Router(w, "silent").read(), Router(w, "speaking").read()
            await silent.submit(request("a", 900), request("b", 900))  # 9 s
            await speaking.submit(request("c", 150))
            while not silent.closed:
                await speaking.abort()
                await asyncio.sleep(0.05)
            assert w.front.num_live == 1
            assert silent.reasons() == {}
            while not speaking.reasons():
                await speaking.abort()
                await asyncio.sleep(0.05)
            assert speaking.tokens("c") == expected_tokens(request("c", 150))
            await until(lambda: all_blocks_free(w), 1.0)
            assert "silent" not in dict(w.engine.report.last_submit_seq)

    run(test)


def test_outputs_that_nobody_takes_are_not_kept_for_longer_than_a_lease() -> None:
    async def test() -> None:
        async with worker(worker_config(router_lease_s=0.3)) as w:
            router = Router(w)
            router.channel = LocalChannel(w.front)  # over TCP there is nothing before the stream
            await router.submit(request("a", 5))
            for _ in range(12):
                await router.abort()
                await asyncio.sleep(0.05)
            router.read()
            await until(lambda: router.steps)
            assert router.outputs == []

    run(test)


def test_output_of_an_older_attempt_that_was_on_its_way_is_dropped() -> None:
    async def test() -> None:
        async with worker(worker_config()) as w:
            router = Router(w).read()
            w.executor.gate.clear()
            await router.submit(request("a", 10))
            await router.submit(request("a", 10, attempt=1))
            await until(lambda: dict(w.engine.report.last_submit_seq) == {"r0": 2})
            w.front.publish([SequenceOutput("a", 0, 0, (7,), "length"), SequenceOutput("b", 0, 0, (7,))])
            await asyncio.sleep(0.05)
            assert w.front.num_live == 1
            w.executor.gate.set()
            await until(lambda: router.reasons())
            assert {o.attempt for o in router.outputs} == {1}

    run(test)


def test_a_router_that_does_not_read_is_cut_off_and_the_others_go_on() -> None:
    async def test() -> None:
        async with worker(worker_config(router_lease_s=1.0), step_s=0.004) as w:
            slow, quick = Router(w, "slow"), Router(w, "quick").read()
            stream = slow.channel.outputs("slow")
            await anext(stream)  # and then no more
            await slow.submit(bulky("a", 990))  # 4 s
            await quick.submit(request("b", 400))
            await until(lambda: w.front.num_live == 2)
            start = time.monotonic()
            while not w.front.num_dropped:
                await slow.abort()  # it lives, its stream does not
                await quick.abort()
                await asyncio.sleep(0.02)
            assert time.monotonic() - start > 0.8
            with pytest.raises(ChannelClosed):
                await exhaust(stream)
            while not quick.reasons():
                await quick.abort()
                await asyncio.sleep(0.02)
            assert quick.tokens("b") == expected_tokens(request("b", 400))
            assert w.front.num_dropped == 1
            await until(lambda: all_blocks_free(w), 1.0)

    run(test)


def test_opening_a_stream_again_ends_the_former_and_goes_on_where_it_was() -> None:
    async def test() -> None:
        async with worker(worker_config()) as w:
            first = Router(w).read()
            await first.submit(request("a", 200))
            await until(lambda: len(first.tokens("a")) > 20)
            second = Router(w).read()
            await until(lambda: first.closed)
            await until(lambda: second.reasons())
            assert first.outputs + second.outputs == sorted(
                first.outputs + second.outputs, key=lambda o: o.output_index
            )
            together = [t for o in first.outputs + second.outputs for t in o.token_ids]
            assert tuple(together) == expected_tokens(request("a", 200))
            assert w.front.num_streams == 1

    run(test)


def test_what_came_before_the_stream_was_opened_is_not_lost() -> None:
    async def test() -> None:
        async with worker() as w:
            router = Router(w)
            router.channel = LocalChannel(w.front)  # over TCP there is nothing before the stream
            await router.submit(request("a", 10))
            await until(lambda: w.front.num_live == 0)
            router.read()
            await until(lambda: router.reasons())
            assert router.tokens("a") == expected_tokens(request("a", 10))

    run(test)


def test_draining_finishes_what_runs_and_refuses_what_comes() -> None:
    async def test() -> None:
        async with worker(worker_config()) as w:
            router = Router(w).read()
            await router.submit(request("a", 100))
            await until(lambda: len(router.tokens("a")) > 3)
            draining = asyncio.create_task(w.front.drain(10))
            await until(lambda: router.reports and router.reports[-1].state == "draining", 0.5)
            await router.submit(request("late", 10))
            await until(lambda: "late" in router.reasons())
            late = next(o for o in router.outputs if o.request_id == "late")
            assert late.error is not None
            assert late.error[0] == "unavailable"
            assert await draining
            await until(lambda: router.closed)
            assert router.tokens("a") == expected_tokens(request("a", 100))

    run(test)


def test_draining_hands_back_what_does_not_end_in_time() -> None:
    async def test() -> None:
        async with worker(worker_config()) as w:
            router = Router(w).read()
            await router.submit(request("a", 900))
            await until(lambda: router.outputs)
            start = time.monotonic()
            assert not await w.front.drain(0.2)
            assert time.monotonic() - start < 2
            await until(lambda: router.closed)
            assert router.reasons() == {}
            await until(lambda: all_blocks_free(w))

    run(test)


def test_a_failed_engine_closes_the_channel() -> None:
    async def test() -> None:
        async with worker() as w:
            router = Router(w).read()
            await router.submit(request("a", 900))
            await until(lambda: router.outputs)
            w.executor.error = RuntimeError("device lost")
            await until(lambda: router.closed)
            assert w.front.report().state == "failed"
            assert router.reasons() == {}

    run(test)


def test_a_stall_shows_in_the_report() -> None:
    async def test() -> None:
        async with worker(worker_config()) as w:
            router = Router(w).read()
            w.executor.gate.clear()
            await router.submit(request("a", 4))
            await until(lambda: router.reports and router.reports[-1].since_last_step_s > 0.2)
            w.executor.gate.set()
            await until(lambda: router.reasons() and router.reports[-1].since_last_step_s == 0.0)

    run(test)


def test_a_message_of_another_kind_or_version_is_refused() -> None:
    async def test() -> None:
        async with worker() as w:
            with pytest.raises(wire.WireError):
                w.front.submit(wire.abort("r", 0, []))
            with pytest.raises(wire.WireError):
                w.front.submit((wire.VERSION + 2, "submit", "r", 0, []))
            newer = (wire.VERSION + 1, "submit", "r", 0, [], "a field of the future")
            w.front.submit(newer)

    run(test)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_routers_do_no_block_is_lost(seed: int) -> None:
    async def test() -> None:
        rng = random.Random(seed)
        async with worker(worker_config(router_lease_s=0.8), step_s=0.001) as w:
            routers = [Router(w, f"r{i}").read() for i in range(3)]
            mine: dict[str, list[EngineRequest]] = {r.name: [] for r in routers}
            for i in range(250):
                router = rng.choice(routers)
                known = mine[router.name]
                match rng.randrange(6):
                    case 0 | 1 | 2:
                        new = request(f"{router.name}-{i}", rng.choice((1, 5, 60)), rng.randint(1, 200))
                        known.append(new)
                        await router.submit(new, *rng.sample(known, min(2, len(known))))
                    case 3:
                        await router.abort(
                            *((r.request_id, 0) for r in rng.sample(known, min(3, len(known))))
                        )
                    case 4:
                        await router.abort((f"{router.name}-{i + 1}", 0))  # perhaps before its submission
                    case 5 if (
                        i % 9 == 0 and LINE.get() == "local"
                    ):  # a new connection loses what is on its way
                        router.read()
                await asyncio.sleep(rng.choice((0, 0, 0.002, 0.01)))
            await until(lambda: w.front.num_live == 0)  # those who fall silent lose what is left
            await until(lambda: all_blocks_free(w))
            w.core.check()
            for router in routers:
                for done in router.reasons():
                    first = next(r for r in mine[router.name] if r.request_id == done)
                    assert router.tokens(done) == expected_tokens(first)

    run(test)
