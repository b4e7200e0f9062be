"""What it costs to bring a token from a worker to a router: one stream for all requests, or one for each.

    python -m ellm.loadtest.data_path_cost [--streams 32] [--step-ms 5] [--tokens 400] [--rounds 5]

The same engine (EngineLoop on the simulated executor) runs in a process of its own, the reader in another;
only the way between them differs:

    socket        the product: StreamServer and StreamChannel, one connection for all
    ray-shared    the same front behind one Ray streaming generator for all
    ray-each      a Ray streaming generator for each request
    serve-each    a streaming call of a Serve handle for each request
    none          tokens are dropped where they are made: the engine's own cost, taken off the others'

CPU is each process's own clock over all its threads; first-token latency is wall time and suffers from other
load on the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import ray
from ray import serve

from ellm.loadtest.result import Result, command_line
from ellm.router.stream_channel import StreamChannel
from ellm.worker.actor import CONCURRENCY_GROUPS, RankActor
from ellm.worker.api import wire
from ellm.worker.api.config import ModelConfig, WorkerConfig
from ellm.worker.api.output import SequenceOutput
from ellm.worker.api.request import EngineRequest, SamplingParams
from ellm.worker.build import load_engine
from ellm.worker.loop import EngineLoop

PROMPT_TOKENS = 16
LEASE_S = 600.0
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

    async def cpu_s(self) -> float:
        return time.process_time()

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


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one way."""

    way: str
    num_tokens: int
    reader_us: float  # CPU of the reader's process per token
    worker_us: float  # of the worker's process, the engine included
    wall_s: float
    first_token_ms: float  # median over the streams
    first_token_max_ms: float


class RayStreamRank(RankActor):
    """The product's rank with a Ray stream instead of its socket."""

    async def submit(self, message: wire.Message) -> None:
        assert self._front is not None
        self._front.submit(message)

    async def steps(self, router_id: str) -> AsyncIterator[wire.Message]:
        assert self._front is not None
        async for message in self._front.outputs(router_id):
            yield message


class Bench:
    """Holds the processes of every way; a run uses those of one."""

    def __init__(self, config: WorkerConfig) -> None:
        self.reader = ray.remote(num_cpus=0)(Reader).remote()
        rank = ray.remote(num_cpus=0, concurrency_groups=CONCURRENCY_GROUPS)(RayStreamRank)
        self.rank = rank.remote(config, "w0", "bench", LEASE_S, None)
        ray.get(self.rank.load.remote())
        self.plain = ray.remote(num_cpus=0)(PerRequestWorker).remote(config)
        ray.get(self.plain.start.remote())
        deployment = serve.deployment(
            PerRequestWorker, max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0}
        )
        self.handle = serve.run(deployment.bind(config), name="per-request", route_prefix=None)
        self.handle.start.remote().result()

    def run(self, way: str, load: Load) -> Run:
        before = self._worker_cpu_s(way)
        reading = self._read(way, load)
        spent = self._worker_cpu_s(way) - before
        assert reading.num_tokens == load.streams * load.tokens, f"{way}: {reading.num_tokens} tokens came"
        per_token = 1e6 / reading.num_tokens
        return Run(
            way,
            reading.num_tokens,
            reading.cpu_s * per_token,
            spent * per_token,
            reading.wall_s,
            1e3 * median(reading.first_token_s),
            1e3 * max(reading.first_token_s),
        )

    def _read(self, way: str, load: Load) -> Reading:
        reading: Reading
        if way == "none":
            begin = time.perf_counter()
            count = ray.get(self.plain.discard.remote(load))
            return Reading(count, 0.0, time.perf_counter() - begin, (0.0,))
        if way == "socket":
            reading = ray.get(self.reader.socket.remote(self.rank, load))
        elif way == "ray-shared":
            reading = ray.get(self.reader.ray_shared.remote(self.rank, load))
        elif way == "ray-each":
            reading = ray.get(self.reader.ray_each.remote(self.plain, load))
        else:
            reading = ray.get(self.reader.serve_each.remote("per-request", load))
        return reading

    def _worker_cpu_s(self, way: str) -> float:
        if way in ("socket", "ray-shared"):
            return float(ray.get(self.rank.cpu_s.remote()))
        if way == "serve-each":
            return float(self.handle.cpu_s.remote().result())
        return float(ray.get(self.plain.cpu_s.remote()))


WAYS = ("socket", "ray-shared", "ray-each", "serve-each", "none")


def summarize(runs: list[Run], way: str) -> dict[str, Any]:
    """Medians over rounds; the engine's own cost is taken off the worker's."""

    def middle(name: str, of: str) -> float:
        return median(float(getattr(run, name)) for run in runs if run.way == of)

    return {
        "way": way,
        "router CPU, us/token": middle("reader_us", way),
        "worker CPU beyond the engine, us/token": middle("worker_us", way) - middle("worker_us", "none"),
        "first token, ms (median)": middle("first_token_ms", way),
        "first token, ms (worst stream)": middle("first_token_max_ms", way),
        "run, s": middle("wall_s", way),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--step-ms", type=float, default=5.0)
    parser.add_argument("--tokens", type=int, default=400, help="of each stream")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-write", action="store_true")
    args = parser.parse_args()
    model = ModelConfig(path=f"simulated:overhead_s={args.step_ms / 1000}")
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=80 * 2**20,
        log_to_driver=False,
    )
    try:
        serve.start(proxy_location="Disabled")
        bench = Bench(WorkerConfig(model=model, router_lease_s=LEASE_S))
        runs: list[Run] = []
        for i in range(-1, args.rounds):  # the first round warms up
            for way in WAYS:
                tokens = args.tokens if i >= 0 else 20
                run = bench.run(way, Load(args.streams, tokens, f"{way}{i}"))
                print(run, flush=True)
                runs += [run] if i >= 0 else []
        serve.shutdown()
    finally:
        ray.shutdown()
    report(args, runs)


def report(args: argparse.Namespace, runs: list[Run]) -> None:
    rows = [summarize(runs, way) for way in WAYS if way != "none"]
    for row in rows:
        print(row)
    engine = median(run.worker_us for run in runs if run.way == "none")
    result = Result(
        name="data-path",
        title="The way of a token from worker to router",
        about=(
            f"{args.streams} streams, a step every {args.step_ms:g} ms, {args.tokens} tokens each; CPU of "
            f"either process per token. The engine's own {engine:.0f} us per token (simulated executor, "
            "scheduler and token bookkeeping) is taken off the worker's."
        ),
        command=command_line("ellm.loadtest.data_path_cost"),
        rows=rows,
        raw=[{name: getattr(run, name) for name in Run.__slots__} for run in runs],
    )
    if not args.no_write:
        print(result.write())


if __name__ == "__main__":
    main()
