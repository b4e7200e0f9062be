"""A WorkerFront over a real engine, and a router's end of a line to it: in this process, or over TCP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from support.workers import HeldExecutor, make_front, worker_config

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
LINES = ("local", "tcp")
LINE: ContextVar[str] = ContextVar("LINE")


@contextmanager
def over(line: str) -> Iterator[None]:
    """Every worker inside is reached over this one of LINES."""
    token = LINE.set(line)
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
