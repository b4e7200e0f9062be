"""What it costs to bring a token from a worker to a router: one stream for all requests, or one for each.

    python -m ellm.loadtest.data_path_cost [--streams 32] [--step-ms 5] [--tokens 400] [--rounds 5]

The same engine (EngineLoop on the simulated executor) runs in a process of its own, the reader in another;
only the way between them differs:

    socket        the product: StreamServer and StreamChannel, one connection for all
    ray-shared    the same front behind one Ray streaming generator for all
    ray-each      a Ray streaming generator for each request
    serve-each    a streaming call of a Serve handle for each request
    none          tokens are dropped where they are made: the engine's own cost, taken off the others'

CPU is what the system counts for each process over all its threads; first-token latency is wall time and
suffers from other load on the machine.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import psutil
import ray
from ray import serve

from ellm.loadtest.data_path_ways import Load, PerRequestWorker, Reader, Reading
from ellm.loadtest.result import Result, command_line
from ellm.worker.actor import CONCURRENCY_GROUPS, RankActor
from ellm.worker.api import wire
from ellm.worker.api.config import ModelConfig, WorkerConfig

LEASE_S = 600.0


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
        async for message in self._front.outputs(router_id, self._front.arrive(router_id)):
            yield message


class Bench:
    """Holds the processes of every way; a run uses those of one."""

    def __init__(self, config: WorkerConfig) -> None:
        self.reader = ray.remote(num_cpus=0)(Reader).remote()
        rank = ray.remote(num_cpus=0, concurrency_groups=CONCURRENCY_GROUPS)(RayStreamRank)
        self.rank = rank.remote(config, "w0", "bench", LEASE_S, None)
        ray.get(self.rank.load.remote(()))
        self.plain = ray.remote(num_cpus=0)(PerRequestWorker).remote(config)
        plain_pid = ray.get(self.plain.start.remote())
        deployment = serve.deployment(
            PerRequestWorker, max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0}
        )
        self.handle = serve.run(deployment.bind(config), name="per-request", route_prefix=None)
        rank_pid = ray.get(self.rank.renew.remote()).pid
        self._workers = dict.fromkeys(("socket", "ray-shared"), psutil.Process(rank_pid))
        self._workers |= dict.fromkeys(("ray-each", "none"), psutil.Process(plain_pid))
        self._workers["serve-each"] = psutil.Process(self.handle.start.remote().result())

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
        times = self._workers[way].cpu_times()
        return float(times.user + times.system)


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
