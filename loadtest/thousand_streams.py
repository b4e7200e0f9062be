"""A thousand streams at once on one router, and what a token costs, beside Ray Serve's plain ingress.

    python -m ellm.loadtest.thousand_streams [--streams 1000] [--tokens 64] [--rounds 2]

Every side (`http_sides`) is a server of its own, started for its round and measured with the same client:
first all streams at once, then short streamed requests from as many clients as it takes to keep the server
busy. The engine of all is the product's on a simulated model; CPU time is of each server's whole process
tree, from /proc.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from ellm.loadtest.http_sides import OURS, SIDES, server
from ellm.loadtest.processes import label, spent_by_label, tree_use
from ellm.loadtest.result import Result, Row, command_line
from ellm.loadtest.sse_client import StreamResult, stream

PROMPT = 16  # tokens
LIMIT_S = 300.0  # of one stream or request; then it is an error
ABOUT = """\
All {streams} streams of {tokens} tokens at once on one simulated worker ({step:.0f} ms a step with all of
them), then {requests} streamed requests of {short} tokens from {clients} clients. `ellm` is `ellm serve`
as deployed: HAProxy, one router, one worker. `serve 2` is a plain streaming server on Ray Serve: its own
proxy, a FastAPI ingress that detokenises and writes the same chunks, the same engine behind a streaming
handle; `serve 1` has the engine within the ingress, `serve 2 haproxy` has Serve's HAProxy and its
settings for throughput. CPU time is of every process of the server, Ray's own included; `on the path` are
proxy, ingress or router, and engine alone. Medians of {rounds} rounds, sides in turn, each in a server of
its own."""


@dataclass(frozen=True, slots=True)
class Round:
    """One round of one side. Seconds, bytes."""

    errors: int  # streams and requests that did not end as they should
    at_once: int  # streams that were open together
    tokens: int
    chunks: int
    elapsed_s: float
    cpu_s: dict[str, float]  # by process, all streams at once
    ttft_s: float  # median
    ttft_max_s: float
    peak_bytes: dict[str, int]  # of each process, with all streams; several of a name: their sum
    growth_bytes: dict[str, int]  # of them, over what they had before
    requests_per_s: float
    request_cpu_s: float  # of all processes, per short request


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=64, help="output tokens of each stream")
    parser.add_argument(
        "--row-us", type=float, default=200.0, help="time of a step for each of its sequences"
    )
    parser.add_argument("--requests", type=int, default=1200, help="short ones")
    parser.add_argument("--clients", type=int, default=64, help="of the short ones")
    parser.add_argument("--short", type=int, default=8, help="output tokens of a short one")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES)
    parser.add_argument("--port", type=int, default=8165)
    parser.add_argument("--no-write", action="store_true")
    return parser.parse_args()


def body(number: int, tokens: int) -> dict[str, Any]:
    """A stream's; each prompt differs from its first token on."""
    return {
        "prompt": [3 + number % 4000] * PROMPT,
        "max_tokens": tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
    }


async def one(port: int, number: int, tokens: int) -> StreamResult:
    try:
        async with asyncio.timeout(LIMIT_S):
            return await stream("127.0.0.1", port, "/v1/completions", body(number, tokens))
    except (OSError, IndexError, ValueError):  # TimeoutError is an OSError
        return StreamResult(time.perf_counter())


def all_at_once(port: int, streams: int, tokens: int) -> list[StreamResult]:
    """In a process of its own: its CPU time is not the server's."""

    async def run() -> list[StreamResult]:
        return await asyncio.gather(*(one(port, i, tokens) for i in range(streams)))

    return asyncio.run(run())


def in_turn(port: int, requests: int, clients: int, tokens: int) -> tuple[int, float]:
    """Requests that ended well, and how long all took."""

    async def run() -> tuple[int, float]:
        left, well = iter(range(requests)), 0

        async def work() -> None:
            nonlocal well
            for number in left:
                result = await one(port, number, tokens)
                well += result.status == 200 and result.done

        begun = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(clients)))
        return well, time.perf_counter() - begun

    return asyncio.run(run())


def open_together(results: list[StreamResult]) -> int:
    """The most streams that were between their first and their last event at one moment."""
    edges = [(r.arrivals[0], 1) for r in results if r.arrivals] + [
        (r.arrivals[-1], -1) for r in results if r.arrivals
    ]
    most = now = 0
    for _, change in sorted(edges):
        now += change
        most = max(most, now)
    return most


def peaks(root: int) -> dict[str, int]:
    found: dict[str, int] = {}
    for use in tree_use(root).values():
        name = label(use.command)
        found[name] = found.get(name, 0) + use.peak_bytes
    return found


def one_round(side: str, model: str, arguments: argparse.Namespace, pool: ProcessPoolExecutor) -> Round:
    port, streams, tokens = arguments.port, arguments.streams, arguments.tokens
    with server(side, model, port, streams) as one:
        root = one.pid
        pool.submit(all_at_once, port, 32, 8).result()  # warm
        time.sleep(2.0)
        memory, before, begun = peaks(root), tree_use(root), time.monotonic()
        results = pool.submit(all_at_once, port, streams, tokens).result()
        elapsed, after, grown = time.monotonic() - begun, tree_use(root), peaks(root)
        start = tree_use(root)
        well, short_s = pool.submit(
            in_turn, port, arguments.requests, arguments.clients, arguments.short
        ).result()
        spent = sum(spent_by_label(start, tree_use(root)).values())
    good = [r for r in results if r.status == 200 and r.done]
    waits = [r.arrivals[0] - r.sent_at for r in good if r.arrivals] or [0.0]
    return Round(
        errors=streams - len(good) + arguments.requests - well,
        at_once=open_together(good),
        tokens=len(good) * tokens,
        chunks=sum(len(r.arrivals) for r in good),
        elapsed_s=elapsed,
        cpu_s=spent_by_label(before, after),
        ttft_s=statistics.median(waits),
        ttft_max_s=max(waits),
        peak_bytes=grown,
        growth_bytes={name: size - memory.get(name, 0) for name, size in grown.items()},
        requests_per_s=well / short_s,
        request_cpu_s=spent / max(1, well),
    )


def on_path(cpu_s: dict[str, float]) -> float:
    """Of proxies, ingress or router, and engine."""
    names = ("haproxy", "ProxyActor", "RankActor")
    return sum(spent for name, spent in cpu_s.items() if name in names or name.startswith("ServeReplica:"))


def row_of(side: str, rounds: list[Round]) -> Row:
    def middle(values: list[float]) -> float:
        return statistics.median(values)

    router = [
        sum(size for name, size in one.peak_bytes.items() if ":Router" in name or ":Ingress" in name)
        for one in rounds
    ]
    return {
        "side": side,
        "errors": sum(one.errors for one in rounds),
        "streams at once": min(one.at_once for one in rounds),
        "chunks per token": middle([one.chunks / max(1, one.tokens) for one in rounds]),
        "us per token": middle([1e6 * sum(one.cpu_s.values()) / max(1, one.tokens) for one in rounds]),
        "on the path": middle([1e6 * on_path(one.cpu_s) / max(1, one.tokens) for one in rounds]),
        "tokens/s": middle([one.tokens / one.elapsed_s for one in rounds]),
        "first token, s": middle([one.ttft_s for one in rounds]),
        "requests/s": middle([one.requests_per_s for one in rounds]),
        "ms CPU per request": middle([1e3 * one.request_cpu_s for one in rounds]),
        "router or ingress, MiB": max(router) / 2**20,
        "all processes, MiB": max(sum(one.peak_bytes.values()) for one in rounds) / 2**20,
    }


def compare(rows: list[Row]) -> None:
    """Serve's cost over ours: 2 is the aim."""
    ours = next((row for row in rows if row["side"] == OURS), None)
    if ours is None:
        return
    for row in rows:
        if row is not ours:
            row["ratio"] = row["us per token"] / ours["us per token"]
            row["ratio on the path"] = row["on the path"] / ours["on the path"]
            row["ratio requests/s"] = ours["requests/s"] / row["requests/s"]
            row["against"] = row["side"]


def main() -> int:
    arguments = parse()
    model = f"simulated:overhead_s=0.002,logits_row_s={arguments.row_us / 1e6:g},vocab_size=4096"
    spawn = multiprocessing.get_context("spawn")
    rounds: dict[str, list[Round]] = {side: [] for side in arguments.sides}
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        for number in range(arguments.rounds):
            for side in arguments.sides:
                found = one_round(side, model, arguments, pool)
                rounds[side].append(found)
                print(f"round {number + 1}, {side}: {json.dumps(row_of(side, [found]))}", flush=True)
    rows = [row_of(side, found) for side, found in rounds.items()]
    compare(rows)
    print(json.dumps(rows, indent=1))
    result = Result(
        name="thousand-streams",
        title=f"{arguments.streams:,} streams at once, beside Ray Serve's plain streaming ingress",
        about=ABOUT.format(
            **{
                name: getattr(arguments, name)
                for name in ("streams", "tokens", "requests", "short", "clients", "rounds")
            },
            step=2.0 + arguments.streams * arguments.row_us / 1e3,
        ),
        command=command_line("ellm.loadtest.thousand_streams"),
        rows=rows,
        notes=notes(rounds),
        raw={side: [asdict(one) for one in found] for side, found in rounds.items()},
    )
    if not arguments.no_write:
        print(f"wrote {result.write()}")
    return 0 if not any(one.errors for one in rounds.get(OURS, [])) else 1


def notes(rounds: dict[str, list[Round]]) -> list[str]:
    lines = []
    for side, found in rounds.items():
        last = found[-1]
        per_token = {name: 1e6 * spent / max(1, last.tokens) for name, spent in last.cpu_s.items()}
        most = sorted(per_token.items(), key=lambda item: -item[1])[:7]
        shown = ", ".join(f"{name} {value:.1f}" for name, value in most)
        grown = ", ".join(
            f"{name} +{size / 2**20:.0f}" for name, size in last.growth_bytes.items() if size > 2**20
        )
        lines.append(
            f"{side}: microseconds per token: {shown}; MiB that the streams added: {grown or 'none'}"
        )
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
