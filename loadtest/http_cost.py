"""CPU time per streamed token of all server processes, through HTTP, beyond what the engine itself takes.

    python -m ellm.loadtest.http_cost [--streams 32] [--tokens 512] [--rounds 3]

Starts `ellm serve` on a simulated model (real scheduling, real tokenizer, made-up tokens after a set step
time), streams completions from it with a lean client in another process, and reads the CPU time of the
server's whole process tree from /proc. The engine's own share is measured alone on the same workload. Also
written down: seconds until ready, the peak memory of each process, the time to the first token.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ellm.loadtest.engine_alone import engine_cpu_per_token
from ellm.loadtest.processes import ProcessUse, label, spent_by_label, tree_use
from ellm.loadtest.result import Result, Row, command_line
from ellm.loadtest.served import SERVE, Started, started
from ellm.loadtest.sse_client import StreamResult, stream

TOKENIZER = Path(__file__).parent.parent / "deploy" / "bundled" / "pydoc-5m"
BUDGET_US = 120.0
PATH = ("haproxy", "ServeReplica:ellm:Router", "RankActor")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=512, help="output tokens of each stream")
    parser.add_argument("--prompt", type=int, default=32, help="prompt tokens")
    parser.add_argument("--step-ms", type=float, default=20.0, help="time of a simulated step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--port", type=int, default=8155)
    parser.add_argument("--name", default="http-cost", help="slug of the result file")
    return parser.parse_args()


def server(model: str, port: int) -> AbstractContextManager[Started]:
    """`ellm serve` with one worker."""
    words = ("serve", model, "--port", str(port), "--workers", "1")
    return started(SERVE, (*words, "--set", f"router.tokenizer={TOKENIZER}"))


async def run_streams(port: int, streams: int, prompt: int, tokens: int) -> list[StreamResult]:
    """All streams at once; each prompt differs from its first token on."""
    bodies: list[dict[str, Any]] = [
        {"prompt": [3 + i] * prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True}
        for i in range(streams)
    ]
    return await asyncio.gather(*(stream("127.0.0.1", port, "/v1/completions", body) for body in bodies))


def client(port: int, streams: int, prompt: int, tokens: int) -> list[StreamResult]:
    """In a process of its own: its CPU time is not the server's."""
    return asyncio.run(run_streams(port, streams, prompt, tokens))


def one_round(pool: ProcessPoolExecutor, root: int, arguments: argparse.Namespace) -> dict[str, Any]:
    before, started = tree_use(root), time.monotonic()
    results = pool.submit(
        client, arguments.port, arguments.streams, arguments.prompt, arguments.tokens
    ).result()
    elapsed, after = time.monotonic() - started, tree_use(root)
    assert all(r.status == 200 and r.done for r in results), "a stream did not end well"
    tokens = arguments.streams * arguments.tokens
    chunks = sum(len(result.arrivals) for result in results)
    assert chunks >= 0.95 * tokens, "steps were merged: this is not one token per chunk"
    return {
        "cpu_s": spent_by_label(before, after),
        "tokens": tokens,
        "chunks": chunks,
        "elapsed_s": elapsed,
        "ttft_s": statistics.median(result.arrivals[0] - result.sent_at for result in results),
    }


def idle_cpu(root: int, seconds: float) -> dict[str, float]:
    """CPU seconds per second with no request, by process."""
    before = tree_use(root)
    time.sleep(seconds)
    return {name: spent / seconds for name, spent in spent_by_label(before, tree_use(root)).items()}


def rows_of(rounds: list[dict[str, Any]], idle: dict[str, float], engine_us: float) -> list[Row]:
    names = sorted({name for one in rounds for name in one["cpu_s"]})
    rows: list[Row] = []
    for name in names:
        per_token = [one["cpu_s"].get(name, 0.0) / one["tokens"] * 1e6 for one in rounds]
        if max(per_token) >= 0.05:
            row = {"process": name, "us per token": statistics.median(per_token)}
            rows.append({**row, "idle, ms per s": idle.get(name, 0.0) * 1e3})
    rows.sort(key=lambda row: -row["us per token"])
    totals = [sum(one["cpu_s"].values()) / one["tokens"] * 1e6 for one in rounds]
    total = statistics.median(totals)
    rows.append({"process": "all", "us per token": total, "idle, ms per s": sum(idle.values()) * 1e3})
    rows.append({"process": "engine alone", "us per token": engine_us})
    on_path = [row["us per token"] for row in rows if row["process"] in PATH]
    assert len(on_path) == len(PATH), "a process of the path was not found"
    path_us = sum(on_path) - engine_us
    rows.append(
        {"process": "path", "us per token": path_us, "ratio": BUDGET_US / path_us, "against": "budget"}
    )
    return rows


def peaks(uses: dict[int, ProcessUse]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for use in uses.values():
        found.setdefault(label(use.command), []).append(round(use.peak_bytes / 2**20))
    return found


def main() -> int:
    arguments = parse()
    model = f"simulated:overhead_s={arguments.step_ms / 1e3},vocab_size=4096"
    alone = (model, arguments.streams, arguments.prompt, arguments.tokens)
    engine_us = 1e6 * min(engine_cpu_per_token(*alone) for _ in range(3))
    spawn = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(1, mp_context=spawn) as pool,
        server(model, arguments.port) as process,
    ):
        time.sleep(5.0)
        idle = idle_cpu(process.pid, 10.0)
        pool.submit(client, arguments.port, arguments.streams, arguments.prompt, 32).result()
        rounds = [one_round(pool, process.pid, arguments) for _ in range(arguments.rounds)]
        memory = peaks(tree_use(process.pid))
    rows = rows_of(rounds, idle, engine_us)
    print(json.dumps(rows, indent=1))
    chunks = statistics.median(one["chunks"] / one["tokens"] for one in rounds)
    ttft = statistics.median(one["ttft_s"] for one in rounds)
    result = Result(
        name=arguments.name,
        title="CPU time per token through HTTP",
        about=(
            f"`ellm serve` with one router and one simulated worker ({arguments.step_ms:g} ms a step), the "
            f"bundled model's tokenizer, {arguments.streams} streams of {arguments.tokens} tokens, one token "
            "per chunk. CPU time of every process of the server, from /proc, per token; `path` is HAProxy, "
            f"router and worker less the engine's own, against a budget of {BUDGET_US:g} microseconds. What "
            "Ray's other processes take is stated beside it; most of that they take idle too."
        ),
        command=command_line("ellm.loadtest.http_cost"),
        rows=rows,
        notes=[
            f"chunks per token {chunks:.3f}; median time to first token {ttft * 1e3:.1f} ms",
            f"ready {process.ready_s:.1f} s after the command",
            "peak memory, MiB: "
            + ", ".join(f"{name} {'+'.join(map(str, sizes))}" for name, sizes in sorted(memory.items())),
        ],
        raw={
            "rounds": rounds,
            "idle": idle,
            "ready_s": process.ready_s,
            "peak_mib": memory,
            "pid": os.getpid(),
        },
    )
    print(f"wrote {result.write()}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
