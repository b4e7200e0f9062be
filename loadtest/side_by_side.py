"""Our server beside installed peers: the same workload over HTTP, by one generator, in one table.

    python -m ellm.loadtest.side_by_side --vllm .cache/vllm/bin/vllm [--plain-serve] [--streams 1,8,32]
        [--dtypes float32,bfloat16] [--rounds 5]

Each side has the same checkpoint, threads, dtype and KV bytes (`peer_servers.Setting`) and the same cores,
which the generator shares too. All servers are up at once; a round sends the same requests to one after the
other, and each second round in the other order.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ellm.loadtest.bench_checkpoint import make_checkpoint, with_tokenizer
from ellm.loadtest.generator.check import checked_target
from ellm.loadtest.generator.options import Options
from ellm.loadtest.generator.report_json import result_of
from ellm.loadtest.generator.run import run_once
from ellm.loadtest.generator.target import Target
from ellm.loadtest.generator_limits import how_busy, portable
from ellm.loadtest.peer_servers import (
    ELLM,
    PLAIN,
    VLLM,
    Setting,
    ellm_server,
    plain_server,
    unwind_on_sigterm,
    vllm_server,
)
from ellm.loadtest.processes import tree_use
from ellm.loadtest.result import Result, Row, command_line
from ellm.loadtest.served import Started
from ellm.loadtest.text_table import text_table

IDLE_S = 5.0
FIGURES = ("output_tok_s", "ttft_mean_s", "tpot_mean_s", "itl_p99_s")
Figures = dict[str, float]
Rounds = dict[str, list[Figures]]  # by side

ABOUT = """\
28M-parameter Llama with random weights over HTTP, streamed completions, all requests of a row at once:
{input} prompt tokens by id, {output} output tokens, greedy, no prefix caching. Every side has {threads}
threads, {kv:g} MiB of KV in blocks of {block} tokens, at most {seqs} sequences and {step} tokens a step; all
servers and the generator share {threads} cores. {rounds} rounds, sides in turn and in both orders; medians.
`ratio` is our tokens/s over the side's in the same round, `ratio TTFT` and `ratio TPOT` its time over ours;
`CPU` is of all of a side's processes, per output token."""


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm", type=Path, help="the `vllm` of an environment of its own")
    parser.add_argument("--plain-serve", action="store_true", help="our engine behind Ray Serve alone")
    parser.add_argument("--streams", default="1,8,32", help="requests at once")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--rounds", type=int, default=5, help="after a warm-up")
    parser.add_argument("--input", type=int, default=256, help="prompt tokens")
    parser.add_argument("--output", type=int, default=128, help="output tokens")
    parser.add_argument("--threads", type=int, default=2, help="and cores")
    parser.add_argument("--kv-mib", type=int, default=512)
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--vllm-more", default="", help="further arguments of vLLM, such as --enforce-eager")
    parser.add_argument("--checkpoint", type=Path, default=Path(".cache/bench-28m"), help="made if missing")
    parser.add_argument("--port", type=int, default=8411, help="and the next ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="side-by-side", help="slug of the result file")
    return parser.parse_args(words)


def setting_of(arguments: argparse.Namespace, dtype: str) -> Setting:
    return Setting(
        arguments.checkpoint,
        dtype,
        arguments.threads,
        arguments.kv_mib << 20,
        arguments.block_size,
        vllm_more=tuple(arguments.vllm_more.split()),
    )


def start_sides(stack: ExitStack, arguments: argparse.Namespace, dtype: str) -> dict[str, Started]:
    """All that are asked for, ours first."""
    setting, port = setting_of(arguments, dtype), arguments.port
    sides = {ELLM: stack.enter_context(ellm_server(setting, port))}
    if arguments.vllm is not None:
        log = Path(f".cache/vllm-serve-{dtype}.log")
        sides[VLLM] = stack.enter_context(vllm_server(arguments.vllm, setting, port + 1, log))
    if arguments.plain_serve:
        sides[PLAIN] = stack.enter_context(plain_server(setting, port + 2))
    return sides


def options_of(url: str, streams: int, arguments: argparse.Namespace, seed: int) -> Options:
    return Options(
        url,
        rate=math.inf,
        num_requests=streams,
        input_tokens=str(arguments.input),
        output_tokens=str(arguments.output),
        prompt_ids=True,
        seed=seed,
        processes=1,
    )


def one_round(server: Started, target: Target, options: Options) -> Figures:
    before = cpu_s(server)
    summary = result_of(run_once(options, target))["summary"]
    spent = cpu_s(server) - before
    expected = options.num_requests * int(options.output_tokens or 0)
    if summary["failed"] or summary["output_tokens"] != expected:
        raise RuntimeError(
            f"{server.url}: {summary['failed']} of {options.num_requests} requests failed "
            f"({summary['errors']}), {summary['output_tokens']} of {expected} tokens"
        )
    figures = {name: float(summary[name]) for name in FIGURES}
    return {**figures, "cpu_us_per_token": 1e6 * spent / summary["output_tokens"]}


def cpu_s(server: Started) -> float:
    return sum(use.cpu_s for use in tree_use(server.pid).values())


def measure(sides: dict[str, Started], streams: int, arguments: argparse.Namespace) -> Rounds:
    """Round 0 warms up and is not kept."""
    targets = {
        name: checked_target(options_of(server.url, streams, arguments, 0)) for name, server in sides.items()
    }
    rounds: Rounds = {name: [] for name in sides}
    for number in range(arguments.rounds + 1):
        seed = arguments.seed + 1000 * streams + number
        for name in list(sides)[:: 1 if number % 2 else -1]:
            options = options_of(sides[name].url, streams, arguments, seed)
            figures = one_round(sides[name], targets[name], options)
            if number:
                rounds[name].append(figures)
                print(f"  {streams:3} streams  {name:12} {line_of(figures)}", flush=True)
    return rounds


def line_of(figures: Figures) -> str:
    ttft, tpot = 1e3 * figures["ttft_mean_s"], 1e3 * figures["tpot_mean_s"]
    return f"{figures['output_tok_s']:8.0f} tok/s  TTFT {ttft:8.1f} ms  TPOT {tpot:7.2f} ms"


def rows_of(rounds: Rounds, dtype: str, streams: int) -> list[Row]:
    """A row a side: its medians, and ours by it, pair by pair."""
    ours, rows = rounds[ELLM], []
    for name, theirs in rounds.items():
        row: Row = {
            "side": name,
            "dtype": dtype,
            "streams": streams,
            "tok/s": middle(theirs, "output_tok_s"),
            "TTFT, ms": 1e3 * middle(theirs, "ttft_mean_s"),
            "TPOT, ms": 1e3 * middle(theirs, "tpot_mean_s"),
            "ITL p99, ms": 1e3 * middle(theirs, "itl_p99_s"),
            "CPU, us per token": middle(theirs, "cpu_us_per_token"),
        }
        if name != ELLM:
            row["ratio"] = quotient(ours, theirs, "output_tok_s")
            row["ratio TTFT"] = quotient(theirs, ours, "ttft_mean_s")
            row["ratio TPOT"] = quotient(theirs, ours, "tpot_mean_s")
            row["against"] = name
        rows.append(row)
    return rows


def middle(rounds: list[Figures], name: str) -> float:
    return statistics.median(one[name] for one in rounds)


def quotient(above: list[Figures], below: list[Figures], name: str) -> float:
    """Median over the rounds."""
    return statistics.median(a[name] / b[name] for a, b in zip(above, below, strict=True))


def idle_of(sides: dict[str, Started]) -> dict[str, float]:
    """CPU seconds per second of each side without a request: what it costs the other that it is up."""
    before = {name: cpu_s(server) for name, server in sides.items()}
    time.sleep(IDLE_S)
    return {name: (cpu_s(server) - before[name]) / IDLE_S for name, server in sides.items()}


def run_dtype(arguments: argparse.Namespace, dtype: str) -> tuple[list[Row], dict[str, Any]]:
    rows: list[Row] = []
    raw: dict[str, Any] = {}
    with ExitStack() as stack:
        sides = start_sides(stack, arguments, dtype)
        raw["ready_s"] = {name: server.ready_s for name, server in sides.items()}
        raw["idle_cpu"] = idle_of(sides)
        print(f"{dtype}: idle, CPU s per s: {raw['idle_cpu']}", flush=True)
        for streams in map(int, arguments.streams.split(",")):
            rounds = raw[str(streams)] = measure(sides, streams, arguments)
            rows += rows_of(rounds, dtype, streams)
    return rows, raw


def notes_of(raw: dict[str, dict[str, Any]]) -> list[str]:
    notes = [how_busy()]
    for dtype, part in raw.items():
        idle = ", ".join(f"{name} {1e3 * share:.0f}" for name, share in part["idle_cpu"].items())
        notes.append(f"{dtype}: CPU time of a side with no request, ms per s: {idle}")
    return notes


def main() -> int:
    arguments = parse()
    unwind_on_sigterm()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    with_tokenizer(make_checkpoint(arguments.checkpoint, 0))
    rows: list[Row] = []
    raw: dict[str, Any] = {}
    dtypes = arguments.dtypes.split(",")
    for dtype in dtypes:
        more, raw[dtype] = run_dtype(arguments, dtype)
        rows += more
    print(text_table(rows))
    setting = setting_of(arguments, dtypes[0])
    result = Result(
        name=arguments.name,
        title="Our server beside its peers, over HTTP",
        about=ABOUT.format(
            **vars(arguments) | {"kv": arguments.kv_mib},
            block=setting.block_size,
            seqs=setting.max_num_seqs,
            step=setting.max_step_tokens,
        ),
        command=portable(command_line("ellm.loadtest.side_by_side")),
        rows=rows,
        seed=arguments.seed,
        notes=notes_of(raw),
        raw=raw,
    )
    print(f"wrote {result.write()}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
