"""The ways of a token from worker to router that `data_path_cost` compares, and the reader at their end."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from ray import serve

from ellm.router.stream_channel import StreamChannel
from ellm.worker.api import wire
from ellm.worker.api.config import WorkerConfig
from ellm.worker.api.output import SequenceOutput
from ellm.worker.api.request import EngineRequest, SamplingParams
from ellm.worker.build import load_engine
from ellm.worker.loop import EngineLoop

PROMPT_TOKENS = 16
Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Load:
    """What one run asks for."""

    streams: int
    tokens: int  # of each stream
    tag: str  # request ids are fresh in each run

    def requests(self) -> list[EngineRequest]:
        sampling = SamplingParams(temperature=0.0, max_tokens=self.tokens, ignore_eos=True)
        prompt = tuple(range(1, 1 + PROMPT_TOKENS))
        return [EngineRequest(f"{self.tag}-{i}", prompt, sampling) for i in range(self.streams)]


@dataclass(frozen=True, slots=True)
class Reading:
    """What the reader's process has seen of one run."""

    num_tokens: int
    cpu_s: float
    wall_s: float
    first_token_s: tuple[float, ...]


class PerRequestWorker:
    """The engine, with a queue and a generator for each request."""

    def __init__(self, config: WorkerConfig) -> None:
        self._config = config
        self._queues: dict[str, asyncio.Queue[tuple[Tokens, bool]]] = {}
        self._engine: EngineLoop | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._discarding = self._discarded = 0
        self._all_done = asyncio.Event()

    async def start(self) -> int:
        """Returns the pid."""
        if self._engine is None:
            loaded = load_engine(self._config, lambda what, share: None)
            self._loop = asyncio.get_running_loop()
            self._engine = EngineLoop(loaded.core, loaded.executor, report_s=self._config.heartbeat_s)
            self._engine.start(self._publish)
        return os.getpid()

    async def generate(self, packed: wire.Message) -> AsyncIterator[Tokens]:
        request = wire.unpack_request(packed)
        queue = self._open(request)
        done = False
        while not done:
            tokens, done = await queue.get()
            yield tokens

    async def discard(self, load: Load) -> int:
        """Run everything and keep nothing; returns the number of tokens."""
        assert self._engine is not None
        self._discarding, self._discarded, self._all_done = load.streams, 0, asyncio.Event()
        self._engine.submit("reader", 0, load.requests())
        await self._all_done.wait()
        return self._discarded

    def _open(self, request: EngineRequest) -> asyncio.Queue[tuple[Tokens, bool]]:
        assert self._engine is not None
        queue = self._queues[request.request_id] = asyncio.Queue()
        self._engine.submit("reader", 0, [request])
        return queue

    def _publish(self, outputs: list[SequenceOutput]) -> None:
        assert self._loop is not None
        if self._discarding:
            self._discarded += sum(len(output.token_ids) for output in outputs)
            self._discarding -= sum(output.finish_reason is not None for output in outputs)
            if not self._discarding:
                self._loop.call_soon_threadsafe(self._all_done.set)
            return
        self._loop.call_soon_threadsafe(self._deliver, outputs)

    def _deliver(self, outputs: list[SequenceOutput]) -> None:
        for output in outputs:
            done = output.finish_reason is not None
            self._queues[output.request_id].put_nowait((output.token_ids, done))
            if done:
                del self._queues[output.request_id]


class Reader:
    """The router's end; each method is one run by one way."""

    async def socket(self, worker: Any, load: Load) -> Reading:
        packed, host, port, secret = await worker.describe.remote()
        channel = StreamChannel(wire.unpack_info(packed), host, port, secret)
        return await self._shared(channel.outputs(load.tag), channel.submit, load)

    async def ray_shared(self, worker: Any, load: Load) -> Reading:
        async def steps() -> AsyncIterator[wire.Message]:
            options = {"num_returns": "streaming", "_generator_backpressure_num_objects": 16}
            async for ref in worker.steps.options(**options).remote(load.tag):
                yield await ref

        return await self._shared(steps(), worker.submit.remote, load)

    async def _shared(
        self, stream: AsyncIterator[wire.Message], submit: Callable[[wire.Message], Any], load: Load
    ) -> Reading:
        """One stream of STEP messages; the clock starts when it is open."""
        await anext(stream)
        first: dict[str, float] = {}
        open_ids = {request.request_id for request in load.requests()}
        count, begin, cpu = 0, time.perf_counter(), time.process_time()
        await submit(wire.submit(load.tag, 0, load.requests()))
        async for message in stream:
            for output in wire.check(message, "step")[2]:
                first.setdefault(output[0], time.perf_counter() - begin)
                count += len(output[3])
                if len(output) > 4 and output[4] is not None:
                    open_ids.discard(output[0])
            if not open_ids:
                break
        return Reading(count, time.process_time() - cpu, time.perf_counter() - begin, tuple(first.values()))

    async def ray_each(self, worker: Any, load: Load) -> Reading:
        async def read(request: EngineRequest) -> tuple[int, float]:
            count, first = 0, 0.0
            generator = worker.generate.options(num_returns="streaming").remote(wire.pack_request(request))
            async for ref in generator:
                count += len(await ref)
                first = first or time.perf_counter() - begin
            return count, first

        begin, cpu = time.perf_counter(), time.process_time()
        found = await asyncio.gather(*map(read, load.requests()))
        return self._reading(found, begin, cpu)

    async def serve_each(self, app: str, load: Load) -> Reading:
        handle = serve.get_app_handle(app).options(stream=True)

        async def read(request: EngineRequest) -> tuple[int, float]:
            count, first = 0, 0.0
            async for tokens in handle.generate.remote(wire.pack_request(request)):
                count += len(tokens)
                first = first or time.perf_counter() - begin
            return count, first

        begin, cpu = time.perf_counter(), time.process_time()
        found = await asyncio.gather(*map(read, load.requests()))
        return self._reading(found, begin, cpu)

    def _reading(self, found: list[tuple[int, float]], begin: float, cpu: float) -> Reading:
        spent, wall = time.process_time() - cpu, time.perf_counter() - begin
        return Reading(sum(n for n, _ in found), spent, wall, tuple(first for _, first in found))
