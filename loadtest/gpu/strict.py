"""STRICT on a device: random mixes of requests say bit by bit what each says alone, and leave the same KV.

    python -m ellm.loadtest.gpu.strict --out strict.json

Every mix has another number of sequences at once, another size of steps (and so other chunks), a scheduling
policy that preempts, swaps, parks or keeps holes, and requests that come while others run; in many of them
all prompts begin alike, so that they share blocks. Tokens and their scores must be those of the request
alone. Then KV: what a prompt of all the tokens writes at once must be what decoding them one by one has
written.

    python -m ellm.loadtest.gpu.strict --device cpu --tiny

With the kernels interpreted, on the smallest model, 200 mixes take about half an hour:

    TRITON_INTERPRET=1 python -m ellm.loadtest.gpu.strict --device cpu --tiny --mixes 200
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ellm.loadtest.gpu.models import SHAPES, make_model
from ellm.loadtest.gpu.observed import interpreted, interpreted_body, placeless, taken
from ellm.loadtest.gpu.timing import aim, write
from ellm.worker.api.config import CacheConfig, DType, ModelConfig, SchedulerConfig, WorkerConfig
from ellm.worker.api.output import TokenLogprobs
from ellm.worker.api.request import EngineRequest, SamplingParams
from ellm.worker.engine.core import EngineCore
from ellm.worker.engine.plan import BatchPlan, NewSequence, PlanEntry
from ellm.worker.executor.local import LocalExecutor

BLOCK = 16
MOST_TURNS = 100_000
SHARED = 3 * BLOCK  # tokens that prompts of one family begin with
POLICIES = (
    "full-chunked",
    "full-recompute",
    "full-swap",
    "full-offload",
    "adaptive",
    "literal(0.5)",
    "literal(0.5, stream=0.5)",
)


@dataclass(frozen=True, slots=True)
class Said:
    """By one request."""

    tokens: tuple[int, ...]
    scores: tuple[TokenLogprobs | None, ...]


def requests_of(args: argparse.Namespace, vocab: int) -> list[EngineRequest]:
    """Those of even number begin alike."""
    made = []
    shared = tuple(Random(7).randrange(3, vocab) for _ in range(SHARED))
    for i in range(args.requests):
        rng = Random(i)
        own = tuple(rng.randrange(3, vocab) for _ in range(rng.randint(1, args.prompt)))
        temperature = (0.0, 0.0, 0.8, 1.0)[i % 4]
        sampling = SamplingParams(
            temperature=temperature,
            seed=i,
            max_tokens=rng.randint(2, args.output),
            ignore_eos=True,
            logprobs=1,
        )
        made.append(EngineRequest(f"r{i}", own if i % 2 else (*shared, *own), sampling))
    return made


def play(
    executor: LocalExecutor,
    config: WorkerConfig,
    requests: list[EngineRequest],
    rng: Random,
    num_blocks: int | None = None,
) -> tuple[dict[str, Said], EngineCore]:
    """All requests through the engine, a few of them at a time; two plans outstanding. The engine uses the
    pool, or its first `num_blocks` and then no transient ones, whose numbers begin behind the whole pool."""
    limits = executor.limits
    if num_blocks is not None:
        limits = replace(limits, num_blocks=num_blocks, num_transient_blocks=0)
    core = EngineCore(limits, config)
    waiting, outstanding = list(requests), []
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    scores: dict[str, list[TokenLogprobs | None]] = {request.request_id: [] for request in requests}
    now, turns = 0.0, 0
    while waiting or core.has_work:
        turns += 1
        assert turns < MOST_TURNS, f"{config.scheduler}: the engine does not come to an end"
        while waiting and (not core.has_work or rng.random() < 0.5):
            core.add_request(replace(waiting.pop(), tpot_slo_s=rng.choice((None, 0.02, 10.0))), now)
        plan = core.begin_step(now)
        if plan is not None:
            outstanding.append((plan, executor.execute(plan)))
            if len(outstanding) < 2:
                continue
        if not outstanding:
            continue
        done, result = outstanding.pop(0)
        now += 0.01
        for output in core.finish_step(done, result, now):
            assert output.error is None, output.error
            tokens[output.request_id] += output.token_ids
            scores[output.request_id] += output.logprobs or ()
    core.check()
    return {name: Said(tuple(said), tuple(scores[name])) for name, said in tokens.items()}, core


def forget(executor: LocalExecutor, core: EngineCore, step: int) -> None:
    """Let the executor drop what the last plans of a core have not yet told it to drop."""
    executor.execute(BatchPlan(step, (), (), tuple(core.take_released()), 0, 0))


def mixes(
    args: argparse.Namespace, executor: LocalExecutor, config: WorkerConfig, requests: list[EngineRequest]
) -> dict[str, Any]:
    """Raises AssertionError with the first mix that says something else."""
    whole = replace(config.scheduler, policy="full-chunked", max_num_seqs=1)
    alone_config = replace(config, scheduler=whole, cache=replace(config.cache, prefix_caching=False))
    alone: dict[str, Said] = {}
    for request in requests:
        said, core = play(executor, alone_config, [request], Random(0))
        forget(executor, core, 0)
        alone |= said
    totals: Counter[str] = Counter()
    shared = 0
    longest = max(len(r.prompt_ids) + r.sampling.max_tokens for r in requests)
    scarce = -(-longest // BLOCK) + 2  # so that those who run take blocks from each other
    for seed in range(args.mixes):
        rng = Random(1000 + seed)
        alike = seed % 3 == 0
        pool = [r for i, r in enumerate(requests) if not alike or i % 2 == 0]
        some = rng.sample(pool, rng.randint(2, len(pool)))
        scheduler = replace(
            config.scheduler,
            policy=POLICIES[seed % len(POLICIES)],
            max_num_seqs=rng.randint(1, config.scheduler.max_num_seqs),
            max_step_tokens=rng.choice([n for n in (24, 33, 64, 200, 1024) if n <= args.step_tokens]),
        )
        roomy = rng.random() < 0.5 or not scheduler.policy.startswith("full")
        num_blocks = None if roomy else min(scarce, executor.limits.num_blocks)
        said, core = play(executor, replace(config, scheduler=scheduler), some, rng, num_blocks)
        for name, got in said.items():
            assert got.tokens == alone[name].tokens, f"mix {seed} ({scheduler}), {name}: other tokens"
            assert got.scores == alone[name].scores, f"mix {seed} ({scheduler}), {name}: other scores"
        report = core.report(0.0)
        forget(executor, core, 0)
        shared += alike and report.prefix_hits > 0
        totals["with preemption"] += report.num_preemptions > 0
        totals["with parking"] += report.num_parks > 0
        totals["computed again"] += report.recomputed_tokens > 0
        totals["streamed"] += report.streamed_tokens > 0
        totals["compared tokens"] += sum(len(got.tokens) for got in said.values())
    return {"mixes": args.mixes, "sharing a prefix": shared, **totals}


def kv_of(executor: LocalExecutor, blocks: list[int], num_tokens: int) -> Tensor:
    """[2, L, tokens, K, D]: of `num_tokens` tokens in these blocks."""
    found = executor.runner.cache.resident[:, :, blocks]
    return found.transpose(3, 4).flatten(2, 3)[:, :, :num_tokens].cpu()


def compare_kv(args: argparse.Namespace, executor: LocalExecutor, vocab: int) -> dict[str, int]:
    """What decoding has written, and what a prompt of the same tokens writes in one chunk and in several."""
    greedy = SamplingParams(temperature=0.0, max_tokens=1 << 20, ignore_eos=True)
    rng, steps, compared = Random(3), count(), 0
    for case in range(args.kv_cases):
        prompt = tuple(rng.randrange(3, vocab) for _ in range(rng.randint(1, args.prompt)))
        total = len(prompt) + args.output - 1
        room = -(-total // BLOCK)
        tables = [list(range(i * room, (i + 1) * room)) for i in range(3)]
        ids = list(prompt)

        def run(seq_id: int, start: int, tokens: tuple[int, ...], table: list[int], index: int = 0) -> int:
            new = (NewSequence(seq_id, tokens, (), greedy, 0),) if start == 0 else ()
            entry = PlanEntry(seq_id, start, len(tokens), tokens, table, True, index)
            plan = BatchPlan(next(steps), (entry,), new, (), len(tokens), len(tokens) == 1)
            return executor.execute(plan).token_ids[0]

        ids.append(run(1, 0, prompt, tables[0]))
        while len(ids) <= total:
            at = len(ids) - 1
            ids.append(run(1, at, (ids[at],), tables[0], len(ids) - len(prompt)))
        run(2, 0, tuple(ids[:total]), tables[1])
        middle = rng.randint(1, total)
        run(3, 0, tuple(ids[:middle]), tables[2])
        if middle < total:
            run(3, middle, tuple(ids[middle:total]), tables[2])
        decoded = kv_of(executor, tables[0], total)
        for name, table in (("one chunk", tables[1]), ("two chunks", tables[2])):
            assert torch.equal(decoded, kv_of(executor, table, total)), f"KV case {case}, {name}: other bits"
        compared += 2 * total
        executor.execute(BatchPlan(next(steps), (), (), (1, 2, 3), 0, 0))
    return {"kv_cases": args.kv_cases, "kv_tokens_compared": compared}


def measure(args: argparse.Namespace, dtype: DType) -> dict[str, Any]:
    folder = make_model(args.model, args.models, args.device)
    longest = SHARED + args.prompt + args.output + 1
    # A quarter of what runs at most; three sequences of those whose KV is compared.
    room = max(args.batch * -(-longest // BLOCK) // 4, 3 * -(-(args.prompt + args.output) // BLOCK))
    config = WorkerConfig(
        model=ModelConfig(
            path=str(folder),
            device=args.device,
            dtype=dtype,
            deterministic=True,
            max_model_len=longest,
        ),
        cache=CacheConfig(
            num_blocks=room, transient_blocks=room, host_bytes=args.host_mib << 20, host_tier="copied"
        ),
        scheduler=SchedulerConfig(max_num_seqs=args.batch, max_step_tokens=args.step_tokens),
        fused_attention="on" if args.fused else "off",
        recompute_ahead="auto" if args.ahead else "off",
        cuda_graphs=args.device == "cuda" and args.graphs,
        cuda_graph_rows=args.step_tokens if args.graphs else 0,
    )
    with taken(interpreted_body(args.device, fused=args.fused)), placeless():
        executor = LocalExecutor.load(config)
        assert executor.deterministic
        vocab, begin = executor.limits.vocab_size, perf_counter()
        found = mixes(args, executor, config, requests_of(args, vocab))
        found |= compare_kv(args, executor, vocab)
        body = executor.runner.ops.name
        executor.close()
    return {"dtype": dtype, "body": body, **found, "s": perf_counter() - begin}


def aims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Everything that was compared was equal: what is left is how much that is."""
    made = []
    for row in rows:
        made.append(aim(f"{row['dtype']}: random mixes with equal bits", row["mixes"], 200))
        made.append(aim(f"{row['dtype']}: of them with a shared prefix", row["sharing a prefix"], 50))
        made.append(aim(f"{row['dtype']}: of them with a preemption", row["with preemption"], 20))
        made.append(aim(f"{row['dtype']}: KV of prefill = of decode, tokens", row["kv_tokens_compared"], 1))
    return made


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cuda")
    add("--dtype", nargs="+", default=["bfloat16", "float32"])
    add("--model", default="tiny", choices=list(SHAPES))
    add("--models", type=Path, default=Path(".cache/gpu-models"), help="where checkpoints are, or are made")
    add("--mixes", type=int, help="200, or 12 of the tiny form")
    add("--requests", type=int, default=16, help="from which every mix takes some")
    add("--prompt", type=int, default=150, help="longest part of a prompt that is its own")
    add("--output", type=int, default=40)
    add("--batch", type=int, default=12)
    add("--step-tokens", type=int, default=1024)
    add("--kv-cases", type=int, default=20)
    add("--host-mib", type=int, default=64)
    add("--fused", action="store_true", help="rows of holes and decode rows share a launch")
    add("--ahead", action="store_true", help="rows of holes one layer ahead, in some steps")
    add("--graphs", action="store_true", help="recorded steps, whole and in pieces")
    add("--tiny", action="store_true", help="few mixes: shows that it works")
    add("--out", default="strict.json")
    args = parser.parse_args(argv)
    if args.tiny:
        vars(args).update(requests=8, prompt=40, output=24, batch=6, step_tokens=200, kv_cases=2)
        vars(args).update(dtype=["float32"], host_mib=4)
        if interpreted():
            vars(args).update(model="least", requests=6, prompt=20, output=12, batch=6, step_tokens=64)
    args.mixes = args.mixes or (12 if args.tiny else 200)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    rows = []
    for dtype in args.dtype:
        rows.append(measure(args, dtype))
        print(rows[-1], flush=True)
        assert rows[-1]["sharing a prefix"] >= min(50, args.mixes // 4), "too few mixes share a prefix"
    write(args.out, torch.device(args.device), vars(args), rows=rows, aims=aims(rows))


if __name__ == "__main__":
    main()
