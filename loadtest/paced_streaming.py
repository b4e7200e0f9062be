"""Gaps between tokens at the client, with paced streams and without, while the engine pauses requests.

    python -m ellm.loadtest.paced_streaming [--clients 64 4] [--kv-blocks 192] [--slo-ms 50] [--rounds 3]

Starts `ellm serve` with one worker on the model that ships and a KV pool far too small for all clients at
once, so that the scheduler sets requests aside which are ahead of their SLO and brings them back. Each round
asks the same of the same server, once with `stream_pace` and once without. The smallest number of clients
shows what pacing does where nobody is paused.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import statistics
import time
import urllib.request
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from ellm.loadtest.result import Result, Row, command_line
from ellm.loadtest.served import SERVE, Started, started
from ellm.loadtest.sse_client import StreamResult, stream

GRACE_TOKENS = 4  # token i is due at t_first + SLO * (i + 4)

ABOUT = """\
`ellm serve` on the bundled model: one router, one worker whose KV pool holds {pool:,} tokens, with a host
tier of {host} MiB behind it, scheduling policy `adaptive`, TPOT SLO {slo:g} ms. Every client streams one
completion of {tokens} tokens behind {prompt} prompt tokens, all at the same time, read over HTTP by a process
beside the server. A gap is the time between two events of one stream, a stall a gap of more than two SLOs;
medians over {rounds} rounds, both sides in turn on the same server. `e2e` is a whole stream's time: pacing
makes it longer where tokens come faster than the SLO asks, by the {hold:g} s that it may hold at most."""


@dataclass(frozen=True, slots=True)
class Side:
    """One round of one side. Times in seconds."""

    gap_p50_s: float
    gap_p99_s: float
    gap_p999_s: float
    gap_max_s: float
    stalls: float  # per stream
    ttft_s: float  # mean
    tpot_s: float  # mean
    e2e_s: float  # mean
    attained: float  # share of streams with every token in time
    parks: float  # of the engine, per stream


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[64, 4], help="streams at once")
    parser.add_argument("--tokens", type=int, default=400, help="output tokens of each stream")
    parser.add_argument("--prompt", type=int, default=32, help="prompt tokens")
    parser.add_argument("--slo-ms", type=float, default=50.0, help="time per output token")
    parser.add_argument("--kv-blocks", type=int, default=192, help="of 16 tokens")
    parser.add_argument("--host-mib", type=int, default=128, help="of the host tier")
    parser.add_argument("--hold-s", type=float, default=10.0, help="router.pace_max_hold_s")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--port", type=int, default=8175)
    parser.add_argument("--name", default="paced-streaming", help="slug of the result file")
    return parser.parse_args()


def server(arguments: argparse.Namespace) -> AbstractContextManager[Started]:
    """`ellm serve`, ready."""
    flags = {
        "--port": arguments.port,
        "--workers": 1,
        "--device": "cpu",
        "--kv-blocks": arguments.kv_blocks,
        "--tpot-slo-ms": arguments.slo_ms,
        "--policy": "adaptive",
    }
    settings = (
        f"router.pace_max_hold_s={arguments.hold_s}",
        f"worker.cache.host_bytes={arguments.host_mib << 20}",
        "worker.cache.host_tier=copied",
    )
    words = [str(word) for pair in flags.items() for word in pair]
    words += [word for setting in settings for word in ("--set", setting)]
    return started(SERVE, ("serve", *words))


def total(port: int, name: str) -> float:
    """A counter of the server's metrics."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    return sum(float(value) for value in re.findall(rf"^{name}_total{{[^}}]*}} (\S+)$", text, re.MULTILINE))


async def run_streams(
    arguments: argparse.Namespace, clients: int, paced: bool, seed: int
) -> list[StreamResult]:
    """All streams at once; each prompt differs from its first token on."""
    bodies: list[dict[str, Any]] = [
        {
            "prompt": [3 + (seed * clients + i) % 4000] * arguments.prompt,
            "max_tokens": arguments.tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_pace": paced,
            "return_token_ids": True,  # so that every token has an event of its own, with text or without
        }
        for i in range(clients)
    ]
    calls = (stream("127.0.0.1", arguments.port, "/v1/completions", body) for body in bodies)
    return await asyncio.gather(*calls)


def attains(times: Sequence[float], slo_s: float) -> bool:
    return all(at - times[0] <= slo_s * (i + GRACE_TOKENS) for i, at in enumerate(times))


def one_side(arguments: argparse.Namespace, clients: int, paced: bool, seed: int) -> Side:
    before = total(arguments.port, "ellm_num_parks")
    results = asyncio.run(run_streams(arguments, clients, paced, seed))
    time.sleep(0.5)  # for the worker's next report
    parks = total(arguments.port, "ellm_num_parks") - before
    assert all(result.status == 200 and result.done for result in results), "a stream did not end well"
    streams = [result.arrivals[1:] for result in results]  # the first event repeats the prompt's ids
    least = 0.9 * arguments.tokens
    assert all(len(times) >= least for times in streams), "steps were merged: this is not one token per event"
    gaps = sorted(b - a for times in streams for a, b in pairwise(times))
    return Side(
        gap_p50_s=statistics.median(gaps),
        gap_p99_s=gaps[int(0.99 * len(gaps))],
        gap_p999_s=gaps[int(0.999 * len(gaps))],
        gap_max_s=gaps[-1],
        stalls=sum(gap > 2 * arguments.slo_ms / 1e3 for gap in gaps) / clients,
        ttft_s=statistics.mean(r.arrivals[0] - r.sent_at for r in results),
        tpot_s=statistics.mean((times[-1] - times[0]) / (arguments.tokens - 1) for times in streams),
        e2e_s=statistics.mean(r.arrivals[-1] - r.sent_at for r in results),
        attained=statistics.mean(attains(times, arguments.slo_ms / 1e3) for times in streams),
        parks=parks / clients,
    )


def row_of(clients: int, name: str, sides: Sequence[Side]) -> Row:
    def middle(field: str) -> float:
        return float(statistics.median(getattr(side, field) for side in sides))

    return {
        "clients": clients,
        "stream": name,
        "gap p50, ms": 1e3 * middle("gap_p50_s"),
        "gap p99, ms": 1e3 * middle("gap_p99_s"),
        "gap p99.9, ms": 1e3 * middle("gap_p999_s"),
        "largest gap, ms": 1e3 * middle("gap_max_s"),
        "stalls per stream": middle("stalls"),
        "TTFT, ms": 1e3 * middle("ttft_s"),
        "TPOT, ms": 1e3 * middle("tpot_s"),
        "e2e, s": middle("e2e_s"),
        "every token in time": middle("attained"),
        "parks per stream": middle("parks"),
    }


def rows_of(clients: int, rounds: Sequence[dict[str, Side]]) -> list[Row]:
    plain = row_of(clients, "plain", [one["plain"] for one in rounds])
    paced = row_of(clients, "paced", [one["paced"] for one in rounds])
    for name, field in (
        ("ratio gap p99", "gap_p99_s"),
        ("ratio gap p99.9", "gap_p999_s"),
        ("ratio e2e", "e2e_s"),
    ):
        paced[name] = statistics.median(
            getattr(one["plain"], field) / getattr(one["paced"], field) for one in rounds
        )
    paced["against"] = "plain"
    return [plain, paced]


def main() -> int:
    arguments = parse()
    rounds: dict[int, list[dict[str, Side]]] = {clients: [] for clients in arguments.clients}
    with server(arguments):
        asyncio.run(run_streams(arguments, 2, False, 0))  # to warm up
        for number in range(arguments.rounds):
            for clients, done in rounds.items():
                sides: dict[str, Side] = {}
                for name in ("plain", "paced") if number % 2 == 0 else ("paced", "plain"):
                    sides[name] = one_side(arguments, clients, name == "paced", 1 + number)
                    print(f"round {number + 1}, {clients} clients, {name}: {sides[name]}", flush=True)
                done.append(sides)
    rows = [row for clients, done in rounds.items() for row in rows_of(clients, done)]
    result = Result(
        name=arguments.name,
        title="Gaps between tokens at the client, paced and plain",
        about=ABOUT.format(
            pool=16 * arguments.kv_blocks,
            slo=arguments.slo_ms,
            tokens=arguments.tokens,
            prompt=arguments.prompt,
            rounds=arguments.rounds,
            hold=arguments.hold_s,
            host=arguments.host_mib,
        ),
        command=command_line("ellm.loadtest.paced_streaming"),
        rows=rows,
        raw={
            str(clients): [{name: asdict(side) for name, side in one.items()} for one in done]
            for clients, done in rounds.items()
        },
    )
    print(f"wrote {result.write()}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
