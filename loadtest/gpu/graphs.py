"""Decode steps of one checkpoint on a GPU as they are and replayed from CUDA graphs: tokens must be equal.

    python -m ellm.loadtest.gpu.graphs --model deploy/bundled/pydoc-5m --out graphs.json

The same prompts, batch by batch, are decoded by two engines; says what a step takes in milliseconds.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from ellm.loadtest.gpu.timing import write
from ellm.worker.api.config import CacheConfig, ModelConfig, SchedulerConfig, WorkerConfig
from ellm.worker.api.request import SamplingParams
from ellm.worker.engine.plan import BatchPlan, NewSequence, PlanEntry
from ellm.worker.executor.local import LocalExecutor

PROMPT, STEPS = 40, 60  # tokens: a decode step crosses several blocks
GREEDY = SamplingParams(temperature=0.0, max_tokens=1 << 20, ignore_eos=True)


def decode(executor: LocalExecutor, batch: int) -> tuple[list[tuple[int, ...]], float]:
    """(the tokens of each step, milliseconds of a step) of `batch` sequences of different lengths."""
    size = executor.limits.block_size
    room = -(-(PROMPT + batch + STEPS) // size)
    tables = [list(range(i * room, (i + 1) * room)) for i in range(batch)]
    prompts = [tuple(1 + (7 * i + j) % 200 for j in range(PROMPT + i % 9)) for i in range(batch)]
    entries = [PlanEntry(i, 0, len(p), p, tables[i], samples=True) for i, p in enumerate(prompts)]
    new = tuple(NewSequence(i, p, (), GREEDY, i) for i, p in enumerate(prompts))
    first = executor.execute(BatchPlan(0, tuple(entries), new, (), sum(map(len, prompts)), 0))
    told, times = [first.token_ids], []
    for step in range(STEPS):
        entries = [
            PlanEntry(i, len(p) + step, 1, (told[-1][i],), tables[i], samples=True, output_index=step + 1)
            for i, p in enumerate(prompts)
        ]
        begin = perf_counter()
        told.append(executor.execute(BatchPlan(1 + step, tuple(entries), (), (), batch, batch)).token_ids)
        times.append(perf_counter() - begin)
    executor.execute(BatchPlan(1 + STEPS, (), (), tuple(range(batch)), 0, 0))
    return told, 1e3 * median(times[5:])


def measure(config: WorkerConfig, batches: list[int]) -> list[dict[str, Any]]:
    outcomes = {}
    for graphs in (False, True):
        begin = perf_counter()
        executor = LocalExecutor.load(replace(config, cuda_graphs=graphs))
        start_s = perf_counter() - begin
        outcomes[graphs] = {batch: (*decode(executor, batch), start_s) for batch in batches}
        executor.close()
    rows = []
    for batch in batches:
        plain, plain_ms, plain_start_s = outcomes[False][batch]
        again, graph_ms, graph_start_s = outcomes[True][batch]
        assert plain == again, f"batch {batch}: tokens differ"
        row = {"batch": batch, "plain_ms": plain_ms, "graph_ms": graph_ms}
        row |= {"plain_over_graph": plain_ms / graph_ms}
        rows.append(row | {"plain_start_s": plain_start_s, "graph_start_s": graph_start_s})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=str(Path(__file__).parents[2] / "deploy" / "bundled" / "pydoc-5m"))
    add("--device", default="cuda")
    add("--batches", type=int, nargs="+", default=[1, 3, 8, 32])
    add("--out", default="graphs.json")
    args = parser.parse_args()
    most = max(args.batches)
    config = WorkerConfig(
        # STRICT: a padded batch must say the same as one of its own size.
        model=ModelConfig(path=args.model, device=args.device, deterministic=True),
        cache=CacheConfig(num_blocks=most * 16),
        scheduler=SchedulerConfig(max_num_seqs=most, max_step_tokens=4096),
    )
    write(args.out, torch.device(args.device), vars(args), rows=measure(config, args.batches))


if __name__ == "__main__":
    main()
