"""Each switch alone on one engine: what it launches differs, the tokens do not; and what a step takes.

    python -m ellm.loadtest.gpu.ablation --out ablation.json

Sequences of which some have a hole, part of it recomputed and part of it streamed in every step, are decoded
beside a chunk of a prompt, with everything off and with each switch alone: fused attention, rows of holes one
layer ahead, recorded decode steps, recorded pieces of mixed steps. STRICT, so that tokens can be compared.

Without a GPU graphs are replayed by calling again (they cannot be recorded), and fused attention is there
only where the kernels are interpreted, which takes minutes:

    [TRITON_INTERPRET=1] python -m ellm.loadtest.gpu.ablation --device cpu --tiny
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from ellm.loadtest.gpu.models import SHAPES, make_model
from ellm.loadtest.gpu.observed import (
    CallAgain,
    count_calls,
    counted,
    interpreted,
    interpreted_body,
    no_host_sync,
    taken,
)
from ellm.loadtest.gpu.timing import write
from ellm.worker.api.config import CacheConfig, ModelConfig, SchedulerConfig, WorkerConfig
from ellm.worker.api.request import SamplingParams
from ellm.worker.engine.plan import BatchPlan, BlockCopy, NewSequence, PlanEntry, StreamedBlock
from ellm.worker.executor.local import LocalExecutor
from ellm.worker.model.computation import Alone
from ellm.worker.model.graphs import DecodeGraphs, DecodeSizes
from ellm.worker.model.pieces import PieceGraphs, piece_rows

BLOCK = 16
GREEDY = SamplingParams(temperature=0.0, max_tokens=1 << 20, ignore_eos=True)
SWITCHES: dict[str, dict[str, Any]] = {
    "off": {},
    "fused_attention": {"fused_attention": "on"},
    "recompute_ahead": {"recompute_ahead": "on"},
    "decode graphs": {"cuda_graphs": True},
    "all graphs": {"cuda_graphs": True, "cuda_graph_rows": 512},
}


class Scene:
    """Plans by hand: `batch` sequences of `context` tokens, the first `holes` of them with a hole of
    `recomputed` blocks that are computed again and one that is streamed."""

    def __init__(self, args: argparse.Namespace, executor: LocalExecutor) -> None:
        self._args, self._executor = args, executor
        room = -(-(args.context + args.steps + 1) // BLOCK)
        self._tables = [list(range(i * room, (i + 1) * room)) for i in range(args.batch)]
        vocab = executor.limits.vocab_size
        self._prompts = [
            tuple(3 + (7 * i + j * j) % (vocab - 3) for j in range(args.context)) for i in range(args.batch)
        ]
        self._late = tuple(3 + (11 * j) % (vocab - 3) for j in range(args.chunk * args.steps))
        self._late_table = [args.batch * room + i for i in range(-(-len(self._late) // BLOCK))]
        self._step = 0
        self.watched = False  # a step that makes the host wait before its tokens are asked for is an error

    def _run(self, entries: list[PlanEntry], **fields: Any) -> tuple[int, ...]:
        rows = sum(entry.num_tokens for entry in entries)
        decode = sum(entry.num_tokens == 1 and entry.samples for entry in entries)
        plan = BatchPlan(
            self._step,
            tuple(entries),
            fields.pop("new", ()),
            fields.pop("released", ()),
            rows,
            decode,
            **fields,
        )
        self._step += 1
        with no_host_sync(self._executor.device) if self.watched else nullcontext():
            step = self._executor.begin(plan)
        return step.result().token_ids

    def begin(self) -> list[int]:
        """Prompts one by one, and copies of what is to be streamed; the first tokens."""
        first: list[int] = []
        for i, prompt in enumerate(self._prompts):
            entry = PlanEntry(i, 0, len(prompt), prompt, self._tables[i], samples=True)
            first += self._run([entry], new=(NewSequence(i, prompt, (), GREEDY, 0),))
        saves = [BlockCopy(i, self._tables[i][self._args.recomputed], i) for i in range(self._args.holes)]
        self._run([], saves=tuple(saves), waits=True)
        return first

    def decode(self, *, holes: bool, chunk: bool) -> tuple[list[list[int]], float]:
        """(tokens of every step, milliseconds of a step); all go on from their prompts each time."""
        args, transient = self._args, self._executor.limits.num_blocks
        told, times = [[3] * args.batch], []
        for step in range(args.steps):
            entries, again, streams = [], [], []
            for i, prompt in enumerate(self._prompts):
                table, count = list(self._tables[i]), args.recomputed
                if holes and i < args.holes:
                    first = transient + i * (count + 1)
                    table[: count + 1] = range(first, first + count + 1)
                    tokens = prompt[: count * BLOCK]
                    again.append(PlanEntry(i, 0, len(tokens), tokens, table, False, recompute=True))
                    streams.append(StreamedBlock(i, first + count))
                at = len(prompt) + step
                entries.append(PlanEntry(i, at, 1, (told[-1][i],), table, True, step + 1))
            new: tuple[NewSequence, ...] = ()
            if chunk:
                start = step * args.chunk
                ids = self._late[start : start + args.chunk]
                entries.append(PlanEntry(1000, start, len(ids), ids, self._late_table, False))
                new = (NewSequence(1000, self._late, (), GREEDY, 0),) if not step else ()
            begin = perf_counter()
            told.append(list(self._run([*entries, *again], new=new, streams=tuple(streams))))
            times.append(perf_counter() - begin)
        if chunk:
            self._run([], released=(1000,))
        return told[1:], 1e3 * median(times)


def load(args: argparse.Namespace, switches: dict[str, Any]) -> LocalExecutor:
    """With the kernels interpreted where there is no GPU."""
    holed = args.holes * (args.recomputed + 1)
    room = -(-(args.context + args.steps + 1) // BLOCK) * args.batch + -(-args.chunk * args.steps // BLOCK)
    rows = args.batch + args.chunk + args.holes * args.recomputed * BLOCK
    config = WorkerConfig(
        model=ModelConfig(path=str(args.folder), device=args.device, deterministic=True),
        cache=CacheConfig(
            num_blocks=room, transient_blocks=holed, host_bytes=args.host_mib << 20, host_tier="copied"
        ),
        scheduler=SchedulerConfig(max_num_seqs=args.batch + 1, max_step_tokens=max(rows, args.context)),
        fused_attention="off",
        decode_tapes=False,  # of a CPU, which stands for a GPU here
    )
    config = replace(config, **switches)
    if args.device == "cuda":
        return LocalExecutor.load(config)
    with taken(interpreted_body(args.device, fused=config.fused_attention != "off")):
        executor = LocalExecutor.load(replace(config, cuda_graphs=False))
    if config.cuda_graphs:
        _replay_by_calling(config, executor)
    return executor


def _replay_by_calling(config: WorkerConfig, executor: LocalExecutor) -> None:
    runner, alone, again = executor.runner, Alone(), CallAgain()
    if interpreted():  # other bodies than Triton's store rows that have no slot
        sizes = DecodeSizes((config.scheduler.max_num_seqs,), (512,))
        decode = DecodeGraphs(runner.model, runner.ops, runner.cache, sizes, alone, again)
        decode.record_all()
        runner.replay(decode)
    rows = piece_rows(min(config.cuda_graph_rows, config.scheduler.max_step_tokens))[-1:]
    if rows:
        pieces = PieceGraphs(runner.model, runner.cache.num_layers, rows, runner.cache.device, alone, again)
        pieces.record_all()
        runner.replay_pieces(pieces)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    said: dict[str, Any] = {}
    for name, switches in SWITCHES.items():
        with counted() as launches:
            executor = load(args, switches)
            count_calls(executor, launches)
            scene = Scene(args, executor)
            scene.begin()
            row: dict[str, Any] = {"switch": name}
            tokens = []
            for kind, holes, chunk in (
                ("holes", True, False),
                ("mixed", True, True),
                ("decode", False, False),
            ):
                scene.watched = False
                scene.decode(holes=holes, chunk=chunk)  # compiles
                scene.watched = True
                launches.clear()
                replays = executor.runner.num_replays
                outputs, ms = scene.decode(holes=holes, chunk=chunk)
                tokens.append(outputs)
                done = [
                    after - before for after, before in zip(executor.runner.num_replays, replays, strict=True)
                ]
                row |= {f"{kind}_ms": ms, f"{kind}_launches": dict(launches), f"{kind}_replays": done}
            executor.close()
        said[name] = tokens
        row["same_tokens"] = tokens == said["off"]
        assert row["same_tokens"], f"{name}: other tokens"
        found.append(row)
        print(row, flush=True)
    check_executed(found, args)
    return found


def check_executed(found: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Every switch has changed what ran, where it should and nowhere else."""
    by = {row["switch"]: row for row in found}
    off, fused, ahead = by["off"], by["fused_attention"], by["recompute_ahead"]
    has_kernels = args.device == "cuda" or interpreted()
    if has_kernels:
        assert "attend_both_kernel" not in off["holes_launches"]
        assert fused["holes_launches"].get("attend_both_kernel", 0) > 0
    assert fused["decode_launches"] == off["decode_launches"] == ahead["decode_launches"]
    # Two computations in the place of one, of which the rows of holes do without the last layer's attention.
    assert ahead["holes_launches"]["calls"] == 2 * off["holes_launches"]["calls"] - args.steps
    whole, pieces = 0, 1
    for name in ("off", "fused_attention", "recompute_ahead"):
        assert by[name]["decode_replays"] == by[name]["mixed_replays"] == [0, 0]
    for name in ("decode graphs", "all graphs"):
        if has_kernels:
            assert by[name]["decode_replays"][whole] == args.steps
    assert by["decode graphs"]["mixed_replays"][pieces] == 0
    assert by["all graphs"]["mixed_replays"][pieces] == args.steps


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cuda")
    add("--model", default="qwen3-0.6b", choices=list(SHAPES))
    add("--models", type=Path, default=Path(".cache/gpu-models"), help="where checkpoints are, or are made")
    add("--batch", type=int, default=32)
    add("--context", type=int, default=2048, help="prompt tokens of each")
    add("--holes", type=int, default=4, help="sequences with a hole")
    add(
        "--recomputed",
        type=int,
        default=8,
        help="blocks of a hole that are computed again; one more is streamed",
    )
    add("--chunk", type=int, default=64, help="rows of a prompt beside them, in mixed steps")
    add("--steps", type=int, default=30)
    add("--host-mib", type=int, default=256)
    add("--tiny", action="store_true", help="a tiny model, few steps: shows that it works")
    add("--out", default="ablation.json")
    args = parser.parse_args(argv)
    if args.tiny:
        vars(args).update(
            model="least" if interpreted() else "tiny",
            batch=2,
            context=35,
            holes=1,
            recomputed=1,
            chunk=5,
            steps=2,
            host_mib=1,
        )
    args.folder = make_model(args.model, args.models, args.device)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    rows = measure(args)
    write(args.out, torch.device(args.device), vars(args), rows=rows)


if __name__ == "__main__":
    main()
