"""Two ranks of one model, a GPU each: they say what one rank says, begun ahead, replayed and overlapped, and
end with a reason when one of them dies.

    python -m ellm.loadtest.gpu.ranks --out ranks.json

Needs two GPUs: with one it says so in a line, and in its file, and that is all. Tokens are compared in
float32 with STRICT; what a decode step takes is measured in bfloat16 on `--model`. Without a GPU two
processes sum by gloo, and nothing is recorded:

    python -m ellm.loadtest.gpu.ranks --device cpu --tiny
"""

from __future__ import annotations

import argparse
import logging
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from ellm.loadtest.engine_bench import one_sample
from ellm.loadtest.gpu.engine import BLOCK, OwnSide
from ellm.loadtest.gpu.models import SHAPES, make_model
from ellm.loadtest.gpu.timing import aim, beside, unmeasured, write
from ellm.worker.api.config import CacheConfig, ModelConfig, SchedulerConfig, WorkerConfig
from ellm.worker.build import LoadedEngine, load_engine
from ellm.worker.engine.core import EngineCore
from ellm.worker.parallel.group import GroupFailed, Timeouts
from ellm.worker.parallel.local_group import LocalGroup

RANKS = 2
SAME, ENDS = "two ranks say what one says, by variant", "a rank's death ends the group with a reason"
SPEED = "decode tokens/s of two ranks by those of one, with the same switches"
SWITCHES: dict[str, dict[str, Any]] = {
    "eager": {"tp_overlap": False},
    "overlapped": {"tp_overlap": True, "tp_overlap_rows": 16},
    "decode graphs": {"tp_overlap": False, "cuda_graphs": True},
    "all graphs": {"tp_overlap": False, "cuda_graphs": True, "cuda_graph_rows": 256},
}
DType = Literal["float32", "bfloat16"]


def config_of(args: argparse.Namespace, model: str, dtype: DType, ranks: int) -> WorkerConfig:
    most, length = max(args.batch), args.input + args.output + BLOCK
    folder = make_model(model, args.models, "cpu" if args.device == "cpu" else "cuda")
    strict = dtype == "float32" and args.device != "cpu"
    return WorkerConfig(
        model=ModelConfig(
            path=str(folder),
            device=args.device,
            dtype=dtype,
            deterministic=strict or None,
            max_model_len=length,
        ),
        cache=CacheConfig(num_blocks=most * -(-length // BLOCK), prefix_caching=False),
        scheduler=SchedulerConfig(policy="full-chunked", max_num_seqs=most, max_step_tokens=256),
        tensor_parallel_size=ranks,
        profile=False,
    )


def prompts_of(args: argparse.Namespace, batch: int) -> list[list[int]]:
    return [[3 + (7 * i + j * j) % 500 for j in range(args.input + i % 5)] for i in range(batch)]


def said(args: argparse.Namespace, side: OwnSide) -> list[list[int]]:
    """Through the engine's loop, which begins the next step before the last has been read."""
    answers = [side.run(prompts_of(args, batch), args.output) for batch in args.batch]
    return [tokens for answer in answers for tokens in answer.tokens]


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Raises AssertionError with the first variant that says something else than one rank. One rank of the
    last is killed then."""
    alone = OwnSide(load_engine(config_of(args, "tiny", "float32", 1), lambda what, share: None))
    expected = said(args, alone)
    alone.close()
    rows, death = [], None
    for name in args.variants:
        config = replace(config_of(args, "tiny", "float32", RANKS), **SWITCHES[name])
        group = LocalGroup(config, timeouts=Timeouts(step_s=args.step_s))
        group.executor.queues = True  # on a CPU, too
        core = EngineCore(group.executor.limits, config)
        side = OwnSide(LoadedEngine(core, group.executor, name, args.device, "float32", True))
        got = said(args, side)
        assert got == expected, f"{name}: other tokens than one rank's"
        rows.append({"variant": name, "same_tokens": True, "tokens": sum(map(len, got))})
        print(rows[-1], flush=True)
        if name == args.variants[-1]:
            death = kill_one(args, group, side)
        side.close()
    return {"rows": rows, "death": death}


def time_steps(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Decode tokens/s of one rank and of two, by batch: each with the same switches."""
    rows = []
    alone = {one_rank(name): (1, without_ranks(SWITCHES[name])) for name in args.variants}
    for name, (ranks, switches) in (
        alone | {name: (RANKS, SWITCHES[name]) for name in args.variants}
    ).items():
        config = replace(config_of(args, args.model, "bfloat16", ranks), **switches)
        side = OwnSide(load_engine(config, lambda what, share: None))
        for batch in args.batch:
            side.run(prompts_of(args, batch), 8)
            sample = one_sample(side, prompts_of(args, batch), args.output)[0]  # type: ignore[arg-type]
            rows.append({"variant": name, "batch": batch, **sample})
            print(rows[-1], flush=True)
        side.close()
    return rows


def without_ranks(switches: dict[str, Any]) -> dict[str, Any]:
    """What of them is for one rank, too."""
    return {name: value for name, value in switches.items() if not name.startswith("tp_")}


def one_rank(variant: str) -> str:
    """The name of one rank that runs with the same switches; there is nothing to overlap."""
    return f"one rank, {'eager' if variant == 'overlapped' else variant}"


def speeds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each variant beside one rank with the same switches, by batch."""
    decode = {(row["variant"], row["batch"]): row["decode_tok_s"] for row in rows}
    return [
        beside(f"{SPEED}: {name}, batch {batch}", figure / decode[one_rank(name), batch])
        for (name, batch), figure in decode.items()
        if name in SWITCHES
    ]


def kill_one(args: argparse.Namespace, group: LocalGroup, side: OwnSide) -> dict[str, Any]:
    """While both compute. Raises AssertionError where the engine goes on, or ends without a reason."""
    killer = threading.Timer(0.1, group.processes[0].kill)
    begin = time.monotonic()
    killer.start()
    failure: BaseException | None = None
    try:
        while time.monotonic() - begin < 4 * args.step_s:
            side.run(prompts_of(args, max(args.batch)), args.output, wait_s=args.step_s + 5.0)
    except RuntimeError as error:
        failure = error.__cause__
    row = {"killed": "rank 1", "ended_s": time.monotonic() - begin, "reason": str(failure)}
    group.end(0.0)
    group.executor.close()
    assert isinstance(failure, GroupFailed), f"without one of its ranks: {failure!r}"
    print(row, flush=True)
    return row


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cuda")
    add("--model", default="qwen3-0.6b", choices=list(SHAPES), help="whose steps are timed")
    add("--models", type=Path, default=Path(".cache/gpu-models"), help="where checkpoints are, or are made")
    add("--variants", nargs="+", default=list(SWITCHES), choices=list(SWITCHES))
    add("--batch", type=int, nargs="+", default=[1, 3, 8, 32])
    add("--input", type=int, default=100, help="prompt tokens")
    add("--output", type=int, default=64, help="tokens to emit")
    add("--step-s", type=float, default=5.0, help="a step may take so long before a group is given up")
    add("--tiny", action="store_true", help="one variant, few tokens, nothing timed: shows that it works")
    add("--out", default="ranks.json")
    args = parser.parse_args(argv)
    if args.tiny:
        vars(args).update(variants=["eager"], batch=[1, 3], input=20, output=12)
        args.step_s = max(
            args.step_s, 60.0
        )  # a busy machine is no failure; one that is killed is noticed at once
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    logging.basicConfig(level=logging.WARNING)
    gpus = torch.cuda.device_count() if args.device == "cuda" else RANKS
    if gpus < RANKS:
        reason = f"two ranks need {RANKS} GPUs, this machine has {gpus}"
        print(f"skipped: {reason}", flush=True)
        aims = [unmeasured(what, reason) for what in (SAME, ENDS, SPEED)]
        write(args.out, torch.device(args.device if gpus else "cpu"), vars(args), aims=aims)
        return
    found = compare(args)
    aims = [aim(SAME, len(found["rows"]), len(args.variants)), aim(ENDS, 1, 1)]
    if args.tiny:
        aims.append(unmeasured(SPEED, "--tiny times nothing"))
    else:
        found["speed"] = time_steps(args)
        aims += speeds(found["speed"])
    write(args.out, torch.device(args.device), vars(args), aims=aims, **found)


if __name__ == "__main__":
    main()
