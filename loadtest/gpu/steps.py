"""Decode steps and host copies of one checkpoint on a GPU: milliseconds, as one JSON file.

    python -m ellm.loadtest.gpu.steps --model deploy/bundled/pydoc-5m --out steps.json

Plain steps at several batch sizes, the same with one block of each sequence streamed from the host or
recomputed, and the rate of saves and loads. One warm-up, then the median of several.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from ellm.loadtest.gpu.timing import write
from ellm.worker.api.config import CacheConfig, ModelConfig, SchedulerConfig, WorkerConfig
from ellm.worker.api.request import SamplingParams
from ellm.worker.engine.plan import BatchPlan, BlockCopy, NewSequence, PlanEntry, StreamedBlock
from ellm.worker.executor.local import LocalExecutor

CONTEXT = 256  # tokens
REPEATS = 9
GREEDY = SamplingParams(temperature=0.0, max_tokens=1 << 20, ignore_eos=True)


class Steps:
    """Plans by hand for `batch` sequences of CONTEXT tokens each."""

    def __init__(self, executor: LocalExecutor, batch: int) -> None:
        self._executor = executor
        self._batch = batch
        self._size = executor.limits.block_size
        self._step = 0
        self._next_copy = 0
        per_sequence = CONTEXT // self._size + 8
        self._tables = [list(range(i * per_sequence, (i + 1) * per_sequence)) for i in range(batch)]

    def run(self, entries: list[PlanEntry], **fields: object) -> float:
        """Seconds of one step."""
        rows = sum(entry.num_tokens for entry in entries)
        decode = sum(entry.num_tokens == 1 for entry in entries)
        plan = BatchPlan(self._step, tuple(entries), (), (), rows, decode, **fields)  # type: ignore[arg-type]
        self._step += 1
        begin = perf_counter()
        self._executor.execute(plan)
        return perf_counter() - begin

    def prefill(self) -> None:
        ids = tuple(1 + i % 100 for i in range(CONTEXT))
        for i, table in enumerate(self._tables):
            entry = PlanEntry(i, 0, CONTEXT, ids, table, samples=False)
            new = (NewSequence(i, ids, (), GREEDY, 0),)
            self._executor.execute(BatchPlan(self._step, (entry,), new, (), CONTEXT, 0))
            self._step += 1

    def decode(self, hole: str | None) -> float:
        """A decode step at position CONTEXT; the first block of each streamed, recomputed, or as it is."""
        first = self._executor.limits.num_blocks
        entries, streams, recompute = [], [], []
        for i, table in enumerate(self._tables):
            blocks = [first + i, *table[1:]] if hole else table
            entries.append(PlanEntry(i, CONTEXT, 1, (7,), blocks, samples=True, output_index=0))
            if hole == "stream":
                streams.append(StreamedBlock(i, first + i))
            elif hole == "recompute":
                ids = tuple(1 + j % 100 for j in range(self._size))
                recompute.append(PlanEntry(i, 0, self._size, ids, blocks, samples=False, recompute=True))
        return self.run([*entries, *recompute], streams=tuple(streams))

    def copies(self, *, save: bool) -> float:
        """Seconds in which the first block of each goes to the host, or back."""
        copies = []
        for i, table in enumerate(self._tables):
            copies.append(BlockCopy(self._next_copy, table[0], i))
            self._next_copy += 1
        return self.run(
            [], saves=tuple(copies) if save else (), loads=() if save else tuple(copies), waits=True
        )

    def end(self) -> None:
        released = tuple(range(self._batch))
        self._executor.execute(BatchPlan(self._step, (), (), released, 0, 0))


def measure(call: Callable[[], float]) -> float:
    """Milliseconds: the median after one warm-up."""
    call()
    return 1e3 * median(call() for _ in range(REPEATS))


def figures(steps: Steps, batch: int, block_bytes: int) -> dict[str, float]:
    """One row of the result."""
    steps.prefill()
    row = {
        "batch": batch,
        "save_ms": measure(lambda: steps.copies(save=True)),
        "load_ms": measure(lambda: steps.copies(save=False)),
        "plain_ms": measure(lambda: steps.decode(None)),
        "streamed_ms": measure(lambda: steps.decode("stream")),
        "recomputed_ms": measure(lambda: steps.decode("recompute")),
        "block_bytes": block_bytes,
    }
    steps.end()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(Path(__file__).parents[2] / "deploy" / "bundled" / "pydoc-5m"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--out", default="steps.json")
    args = parser.parse_args()
    most = max(args.batches)
    config = WorkerConfig(
        model=ModelConfig(path=args.model, device=args.device),
        cache=CacheConfig(
            num_blocks=most * 40, transient_blocks=most, host_bytes=256 << 20, host_tier="copied"
        ),
        scheduler=SchedulerConfig(max_num_seqs=most, max_step_tokens=2048),
    )
    rows = []
    for batch in args.batches:
        executor = LocalExecutor.load(config)
        rows.append(figures(Steps(executor, batch), batch, executor.limits.block_bytes))
        print(rows[-1], flush=True)
        executor.close()
    write(args.out, torch.device(args.device), vars(args), context=CONTEXT, rows=rows)


if __name__ == "__main__":
    main()
