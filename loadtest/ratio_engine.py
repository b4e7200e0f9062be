"""Throughput over the share of every context that each step recomputes, on the real CPU engine.

    python -m ellm.loadtest.ratio_engine [--budgets 256 512 2048] [--chats 60]

Short chats that come all at once, of which few fit: `literal(r)` for each r beside `full-chunked`, with the
same bytes of KV. The transient blocks of a hole come out of the budget, two banks of one layer. Every run
must give the same tokens. Beside each budget the arithmetic: a step with the memory full over the seconds to
recompute a token, both fitted on the steps without holes; below so many tokens recompute pays
(`planner.literal`).
"""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ellm.loadtest.bench_checkpoint import SHAPE, make_checkpoint
from ellm.loadtest.open_loop import MeasuredStep, OpenLoopRun, run_open_loop
from ellm.loadtest.result import Result, Row, command_line
from ellm.loadtest.step_fit import fit_steps
from ellm.loadtest.unforeseen import lengths
from ellm.worker.api.config import CacheConfig, ModelConfig, SchedulerConfig, WorkerConfig
from ellm.worker.api.cost_model import CostModel, StepFeatures
from ellm.worker.api.request import EngineRequest, SamplingParams
from ellm.worker.build import load_engine
from ellm.worker.engine.planner.literal import may_pay

RATIOS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
BASELINE = "full-chunked"
BLOCK = 4  # small, so that a hole of a short context can be a tenth of it
STEP_TOKENS = 256
ABOUT = """\
{model} in {dtype} on one core: {chats} chats of about {prompt} and {output} tokens, all at once, greedy; the
longest fits into the least budget. Tokens per second of `literal(r)`: each step recomputes the oldest share r
of every running context. Holes are whole blocks of {block} tokens and their transient blocks come out of the
budget. `T0/C_rec`: the number of tokens below which recompute pays by the linear arithmetic, by a cost model
fitted on the steps without holes. All runs give the same tokens. `ratio`: the best r > 0 over r = 0."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, default=Path(".cache/bench-28m"), help="made if missing")
    add("--dtype", default="bfloat16")
    add("--budgets", nargs="+", type=int, default=[96, 256, 512, 2048], metavar="N", help="tokens of KV")
    add("--ratios", nargs="+", type=float, default=list(RATIOS), metavar="R")
    add("--chats", type=int, default=60)
    add("--prompt", type=int, default=24, help="mean prompt tokens")
    add("--output", type=int, default=32, help="mean output tokens")
    add("--seed", type=int, default=0)
    add("--name", default="ratio-engine", help="slug of the result file")
    return parser.parse_args(arguments)


def chats(args: argparse.Namespace) -> list[EngineRequest]:
    """None longer than the least budget has room for, with a hole of the largest r."""
    rng = random.Random(args.seed)
    most = min(args.budgets) // 3
    prompts = lengths(rng, args.prompt, most, args.chats)
    outputs = lengths(rng, args.output, most, args.chats)
    return [
        EngineRequest(
            str(i),
            tuple(rng.randrange(3, SHAPE["vocab_size"]) for _ in range(prompt)),
            SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True),
        )
        for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))
    ]


def config(args: argparse.Namespace, policy: str, num_tokens: int, r: float) -> WorkerConfig:
    """`num_tokens` of KV in all: two banks of one layer's transient blocks are taken off."""
    transient = -(-int(r * num_tokens) // BLOCK) if r else 0
    banks = -(-2 * transient // SHAPE["num_hidden_layers"])
    return WorkerConfig(
        model=ModelConfig(path=str(args.model), device="cpu", dtype=args.dtype),
        cache=CacheConfig(
            num_blocks=num_tokens // BLOCK - banks, block_size=BLOCK, transient_blocks=transient
        ),
        scheduler=SchedulerConfig(policy=policy, max_num_seqs=64, max_step_tokens=STEP_TOKENS),
        num_threads=1,
    )


def run(args: argparse.Namespace, policy: str, num_tokens: int, r: float) -> tuple[OpenLoopRun, float]:
    """The run, and its output tokens per second."""
    engine = load_engine(config(args, policy, num_tokens, r), lambda what, share: None)
    requests = chats(args)
    found = run_open_loop(engine, requests, [0.0] * len(requests))
    times = sorted(at for own in found.token_times for at in own)
    return found, (len(times) - 1) / (times[-1] - times[0])


def arithmetic(cost: CostModel, num_tokens: int) -> tuple[float, float]:
    """Seconds of a step with the memory full and one row, and of a row more."""
    step_s = cost.predict(StepFeatures(1, 1, num_tokens, 0, 1))
    return step_s, (cost.predict(StepFeatures(65, 1, num_tokens, 0, 1)) - step_s) / 64


def measure(args: argparse.Namespace) -> tuple[list[Row], list[dict[str, Any]]]:
    rows: list[Row] = []
    raw: list[dict[str, Any]] = []
    steps: list[MeasuredStep] = []
    expected: list[list[int]] | None = None
    for num_tokens in args.budgets:
        rate: dict[str, float] = {}
        cases = [(BASELINE, 0.0), *((f"literal({r:g})", r) for r in args.ratios)]
        for policy, r in cases:
            found, rate[policy] = run(args, policy, num_tokens, r)
            expected = expected or found.tokens
            assert found.tokens == expected, f"{policy} with {num_tokens} tokens of KV says something else"
            steps += found.steps if not r else []
            report = found.report
            recomputed = report.recomputed_tokens / sum(map(len, found.tokens))
            raw.append(
                {
                    "policy": policy,
                    "kv_tokens": num_tokens,
                    "tok_s": rate[policy],
                    "steps": len(found.steps),
                    "recomputed_per_output": recomputed,
                    "preemptions": report.num_preemptions,
                }
            )
            print(f"{num_tokens:6} tokens of KV {policy:14} {rate[policy]:8.1f} tokens/s", flush=True)
        best = max((r for r in args.ratios if r), key=lambda r: rate[f"literal({r:g})"])
        step_s, row_s = arithmetic(fit_steps(steps), num_tokens)
        rows.append(
            {
                "N, tokens": num_tokens,
                "T0/C_rec": step_s / max(row_s, 1e-9),
                "may pay": "yes" if may_pay(num_tokens, step_s, max(row_s, 1e-9)) else "no",
                BASELINE: rate[BASELINE],
                **{f"r = {r:g}": rate[f"literal({r:g})"] for r in args.ratios},
                "best r > 0": best,
                "ratio": rate[f"literal({best:g})"] / rate["literal(0)"],
                "against": "literal(0)",
            }
        )
    return rows, raw


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    if args.model == Path(".cache/bench-28m"):
        make_checkpoint(args.model, 0)
    rows, raw = measure(args)
    result = Result(
        name=args.name,
        title="Recompute in every step: throughput over the uncached share, real CPU engine",
        about=ABOUT.format(
            model=args.model.name,
            dtype=args.dtype,
            chats=args.chats,
            prompt=args.prompt,
            output=args.output,
            block=BLOCK,
        ),
        command=command_line("ellm.loadtest.ratio_engine"),
        rows=rows,
        seed=args.seed,
        raw=raw,
    )
    print(f"wrote {result.write()}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
