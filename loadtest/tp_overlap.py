"""What the split of a step into two halves hides of the communication, at TP 2 over gloo on one machine.

    python -m ellm.loadtest.tp_overlap [--rounds 30]

Two groups of two ranks hold the same model, one with `worker.tp_overlap` and one without; they execute the
same steps in turn, one thread a rank, and one rank alone executes them, too. The share of communication is
what rank 0 spends on asking for sums and waiting for them, the other rank's delays included.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from ellm.loadtest.bench_checkpoint import make_checkpoint
from ellm.loadtest.result import Result, Row, command_line
from ellm.worker.api.config import CacheConfig, ModelConfig, SchedulerConfig, WorkerConfig
from ellm.worker.api.request import SamplingParams
from ellm.worker.engine.plan import BatchPlan, NewSequence, PlanEntry
from ellm.worker.executor.base import Executor
from ellm.worker.executor.local import LocalExecutor
from ellm.worker.executor.tensor_parallel import TensorParallelExecutor
from ellm.worker.parallel.group import Timeouts
from ellm.worker.parallel.local_group import LocalGroup

CONTEXT, BLOCK = 256, 16
_GREEDY = SamplingParams(temperature=0.0)
# name: (sequences that decode after 256 tokens, sizes of chunks)
STEPS: dict[str, tuple[int, tuple[int, ...]]] = {
    "decode 8": (8, ()),
    "decode 32": (32, ()),
    "decode 64": (64, ()),
    "prefill 2 x 256": (0, (256, 256)),
    "prefill 4 x 256": (0, (256,) * 4),
    "decode 32 + prefill 256": (32, (256,)),
}


@dataclass(slots=True)
class Side:
    """One of those compared."""

    executor: Executor
    step: int = 0

    def run(self, plan: BatchPlan) -> tuple[float, float]:
        """(seconds, of them on communication)."""
        before = self._communication_s()
        result = self.executor.execute(replace(plan, step=self.step))
        self.step += 1
        return result.elapsed_s, self._communication_s() - before

    def _communication_s(self) -> float:
        executor = self.executor
        return executor.communication_s if isinstance(executor, TensorParallelExecutor) else 0.0


def make_plan(num_decode: int, chunks: tuple[int, ...]) -> tuple[BatchPlan, BatchPlan]:
    """A step that may be executed again and again, and the one that forgets its sequences."""
    blocks_each = (CONTEXT + BLOCK) // BLOCK
    entries = []
    for i in range(num_decode + len(chunks)):
        table = list(range(i * blocks_each, (i + 1) * blocks_each))
        if i < num_decode:
            entries.append(PlanEntry(i, CONTEXT, 1, (7 + i,), table, samples=True))
        else:
            ids = tuple(range(3, 3 + chunks[i - num_decode]))
            entries.append(PlanEntry(i, 0, len(ids), ids, table, samples=True))
    new = tuple(NewSequence(entry.seq_id, (1,), (), _GREEDY, 0) for entry in entries)
    rows = sum(entry.num_tokens for entry in entries)
    plan = BatchPlan(0, tuple(entries), new, (), rows, num_decode)
    return plan, BatchPlan(0, (), (), tuple(entry.seq_id for entry in entries), 0, 0)


def measure(sides: dict[str, Side], name: str, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(seconds, of them on communication) of each side, one a round; the order turns each round."""
    plan, end = make_plan(*STEPS[name])
    again = replace(plan, new=())
    found: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    for side in sides.values():
        side.run(plan)
        side.run(again)
    for i in range(rounds):
        for side_name in sides if i % 2 else reversed(list(sides)):
            found[side_name].append(sides[side_name].run(again))
    for side in sides.values():
        side.run(end)
    return found


def make_row(name: str, found: dict[str, list[tuple[float, float]]]) -> Row:
    """Of the quickest step of each side: the rest is the machine's other work."""
    least = {side: min(values) for side, values in found.items()}
    (off, off_spent), (on, on_spent) = least["off"], least["on"]
    pairs = zip(found["off"], found["on"], strict=True)
    return {
        "step": name,
        "one rank, ms": 1e3 * least["alone"][0],
        "TP 2, ms": 1e3 * off,
        "TP 2 with overlap, ms": 1e3 * on,
        "communication, share": off_spent / off,
        "with overlap, share": on_spent / on,
        "median of pairs": median(one / other for (one, _), (other, _) in pairs),
        "ratio": off / on,
        "against": "TP 2 without overlap",
    }


def load(config: WorkerConfig) -> Iterator[tuple[str, Side]]:
    yield "alone", Side(LocalExecutor.load(replace(config, tensor_parallel_size=1)))
    timeouts = Timeouts(step_s=60.0, heartbeat_s=5.0)
    for name, overlap in (("off", False), ("on", True)):
        group = LocalGroup(replace(config, tp_overlap=overlap, tp_overlap_rows=32), timeouts=timeouts)
        yield name, Side(group.executor)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=Path(".cache/bench-28m"))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-write", action="store_true")
    args = parser.parse_args()
    make_checkpoint(args.checkpoint, args.seed)
    config = WorkerConfig(
        model=ModelConfig(path=str(args.checkpoint), dtype="float32", device="cpu"),
        cache=CacheConfig(num_blocks=1200, block_size=BLOCK),
        scheduler=SchedulerConfig(max_num_seqs=64, max_step_tokens=1024),
        num_threads=1,
        tensor_parallel_size=2,
    )
    sides = dict(load(config))
    rows: list[Row] = []
    raw: dict[str, Any] = {}
    for name in STEPS:
        found = measure(sides, name, args.rounds)
        rows.append(make_row(name, found))
        raw[name] = found
        print(rows[-1], flush=True)
    for side in sides.values():
        side.executor.close()
    result = Result(
        name="tp-overlap",
        title="Tensor parallelism over gloo, and its overlap",
        about=(
            "One step of a 28M-parameter Llama in float32 (STRICT), two ranks of one thread each over gloo "
            "on one machine; times and shares of the quickest of the rounds, and beside them the median over "
            "pairs executed one after the other. Steps of 32 rows and more are split; "
            "by default those of 256 and more are."
        ),
        command=command_line("ellm.loadtest.tp_overlap"),
        rows=rows,
        seed=args.seed,
        notes=[
            "gloo's own threads do the communication and share the ranks' cores: on two cores nothing is "
            "left to compute beside them. Over NCCL, on several GPUs, the overlap has not run yet.",
            f"Load average of the machine when it ended: {os.getloadavg()[0]:.0f}; three of it are this "
            "benchmark's own.",
        ],
        raw=raw,
    )
    if not args.no_write:
        print(result.write())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
