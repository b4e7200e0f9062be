"""Decode and prefill speed of the engine beside its peers, side by side in one run.

    python -m ellm.loadtest.engine_bench [--rounds 5] [--batch 1 8 32] [--dtype float32 bfloat16]
        [--sides ellm-fast ellm-torch generate generate_batch vllm openvino llama.cpp]

Every side loads the same checkpoint in a process of its own and waits; each round runs every side in turn, in
an order that alternates, so that a drift of the machine's speed meets all of them. A point is two runs: one
that emits a single token (prefill) and one that emits `--output` tokens; decode speed is the tokens between
the two by the difference of their times.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
from pathlib import Path
from typing import Any

from ellm.loadtest.bench_checkpoint import SHAPE, make_checkpoint, with_tokenizer
from ellm.loadtest.limits import machine_limits
from ellm.loadtest.result import Result, Row, command_line
from ellm.loadtest.side import OURS, PEERS, Side, start_sides

Sample = dict[str, Any]
STRICT, FAST = "ellm", "ellm-fast"
ABOUT = """\
28M-parameter Llama with random weights, {input} prompt and {output} output tokens, greedy,
{threads} threads, prefix caching off, every side in a process of its own, all on the same cores.
`ellm` is STRICT (bitwise reproducible); `ellm-fast` is the same engine without, which makes a difference
where linear layers are the library's (docs/kernels.md), and `STRICT / FAST` is the first's speed divided by
the second's in the same run; `ellm-torch` is the same engine on the torch body. `ratio` is ellm's decode
speed divided by the side's. The
matmul share says which part of ellm's decode step the linear layers take when they run alone by the fastest
of three routines (torch's own, oneDNN's on packed weights, ellm's), the KV share what one read of the KV
cache would take at the machine's copy speed. `peak MiB` is resident memory, of all the side's processes."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rounds", type=int, default=5, help="runs of every side at every point, after a warm-up"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], help="prompts at once")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--input", type=int, default=256, help="prompt tokens")
    parser.add_argument("--output", type=int, default=128, help="tokens to emit")
    parser.add_argument("--threads", type=int, default=2, help="and cores, of every side")
    sides = [side for side in (*OURS, *PEERS) if side != STRICT]
    which = f"those that run beside {STRICT}, which always does, of: {', '.join(sides)} (default: all)"
    parser.add_argument("--sides", nargs="+", default=sides, choices=sides, metavar="SIDE", help=which)
    parser.add_argument("--vllm-python", type=Path, default=Path(".cache/vllm/bin/python"))
    parser.add_argument("--openvino-python", type=Path, default=Path(".cache/openvino/bin/python"))
    parser.add_argument("--llama-python", type=Path, default=Path(".cache/llama/bin/python"))
    parser.add_argument("--checkpoint", type=Path, default=Path(".cache/bench-28m"), help="made if missing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="engine-cpu", help="slug of the result file")
    return parser.parse_args()


def prompts_of(batch: int, length: int, seed: int) -> list[list[int]]:
    """Random token ids, none of them special."""
    rng = random.Random(seed)
    return [[rng.randrange(3, SHAPE["vocab_size"]) for _ in range(length)] for _ in range(batch)]


def one_sample(side: Side, prompts: list[list[int]], output: int) -> tuple[Sample, list[list[int]]]:
    """Prefill alone, then the whole; seconds, tokens per second, and the tokens."""
    decode_s = 0.0
    for _ in range(3):  # a hiccup of the machine in the first run alone would make no sense of the pair
        first = side.run(prompts, 1)
        whole = side.run(prompts, output)
        decode_s = whole.elapsed_s - first.elapsed_s
        if decode_s > 0:
            break
    assert decode_s > 0, "the machine is too noisy for this: decoding took no time"
    sample = {
        "prefill_s": first.elapsed_s,
        "total_s": whole.elapsed_s,
        "prefill_tok_s": len(prompts) * len(prompts[0]) / first.elapsed_s,
        "decode_tok_s": len(prompts) * (output - 1) / decode_s,
        "peak_bytes": whole.peak_bytes,
    }
    return sample, whole.tokens


def measure(
    sides: list[Side], batch: int, arguments: argparse.Namespace
) -> tuple[dict[str, list[Sample]], Row]:
    """All rounds at one batch size; also how many of each side's tokens equal ours."""
    samples: dict[str, list[Sample]] = {side.name: [] for side in sides}
    same: Row = {}
    warm = prompts_of(batch, arguments.input, arguments.seed + 1000)
    for side in sides:
        side.run(warm, min(8, arguments.output))
    for round_index in range(arguments.rounds):
        prompts = prompts_of(batch, arguments.input, arguments.seed + round_index)
        order = sides if round_index % 2 == 0 else sides[::-1]
        tokens: dict[str, list[list[int]]] = {}
        for side in order:
            sample, tokens[side.name] = one_sample(side, prompts, arguments.output)
            samples[side.name].append(sample)
            speeds = f"prefill {sample['prefill_tok_s']:8.0f}  decode {sample['decode_tok_s']:7.0f} tok/s"
            print(f"  {side.name:15} {speeds}", flush=True)
        for name, theirs in tokens.items():
            pairs = [
                (a, b) for x, y in zip(tokens[STRICT], theirs, strict=True) for a, b in zip(x, y, strict=True)
            ]
            same.setdefault(name, []).append(sum(a == b for a, b in pairs) / len(pairs))
    return samples, same


def ratio(ours: list[Sample], theirs: list[Sample], key: str) -> float:
    """Median over the rounds of ours by theirs."""
    quotients: list[float] = [a[key] / b[key] for a, b in zip(ours, theirs, strict=True)]
    return statistics.median(quotients)


def peaks_mib(runs: list[Sample]) -> list[float]:
    """Of each process of a side, the largest first, at the end of all runs."""
    return [size / 2**20 for size in runs[-1]["peak_bytes"]]


def rows_of(samples: dict[str, list[Sample]], same: Row, batch: int, dtype: str, roof: Row) -> list[Row]:
    """One row a side: its medians, and ours divided by it."""
    rows: list[Row] = []
    for name, runs in samples.items():
        decode = statistics.median(run["decode_tok_s"] for run in runs)
        peaks = peaks_mib(runs)
        row: Row = {
            "side": name,
            "dtype": dtype,
            "concurrent": batch,
            "prefill tok/s": statistics.median(run["prefill_tok_s"] for run in runs),
            "decode tok/s": decode,
            "peak MiB": sum(peaks),
            "MiB per process": " + ".join(f"{peak:.0f}" for peak in peaks),
            "same tokens as ellm": statistics.mean(same[name]),
        }
        if name == STRICT:
            row["matmul share"] = roof["linear_s"] * decode / batch
            row["KV read share"] = roof["kv_read_s"] * decode / batch
        elif name == FAST:
            row["STRICT / FAST prefill"] = ratio(samples[STRICT], runs, "prefill_tok_s")
            row["STRICT / FAST decode"] = ratio(samples[STRICT], runs, "decode_tok_s")
        else:
            row["ratio prefill"] = ratio(samples[STRICT], runs, "prefill_tok_s")
            row["ratio"] = ratio(samples[STRICT], runs, "decode_tok_s")
            row["against"] = name
        rows.append(row)
    return rows


def run_dtype(dtype: str, arguments: argparse.Namespace) -> tuple[list[Row], Any]:
    sides, notes = start_sides([STRICT, *arguments.sides], dtype, arguments)
    rows: list[Row] = []
    raw: dict[str, Any] = {"notes": notes}
    try:
        for batch in arguments.batch:
            print(f"{dtype}, {batch} concurrent")
            samples, same = measure(sides, batch, arguments)
            roof = machine_limits(dtype, batch, arguments.input + arguments.output // 2, arguments.threads)
            rows += rows_of(samples, same, batch, dtype, roof)
            raw[f"{batch}"] = {"samples": samples, "limits": roof}
    finally:
        for side in sides:
            side.close()
    return rows, raw


def main() -> int:
    arguments = parse()
    cores = sorted(os.sched_getaffinity(0))[: arguments.threads]
    os.sched_setaffinity(0, cores)  # and all sides, which inherit it
    with_tokenizer(make_checkpoint(arguments.checkpoint, arguments.seed))
    rows: list[Row] = []
    raw: dict[str, Any] = {}
    for dtype in arguments.dtype:
        more, raw[dtype] = run_dtype(dtype, arguments)
        rows += more
    result = Result(
        name=arguments.name,
        title="Engine on a CPU beside its peers",
        about=ABOUT.format(**vars(arguments)),
        command=command_line("ellm.loadtest.engine_bench"),
        rows=rows,
        seed=arguments.seed,
        notes=sorted({note for part in raw.values() for note in part["notes"]}),
        raw=raw,
    )
    print(f"wrote {result.write()}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
