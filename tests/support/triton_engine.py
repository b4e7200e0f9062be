"""An engine whose operations are Triton's, interpreted, beside one on torch's: run as a program of its own.

    TRITON_INTERPRET=1 python -m support.triton_engine CHECKPOINT

Prints the greedy tokens of both, as JSON: of two sequences, one of which has a hole from the middle on, one
block of it recomputed and one streamed within each step.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from support import golden
from support.holes import Hole, HoleDriver
from support.plans import GREEDY

from ellm.kernels import dispatch
from ellm.kernels.ops import Ops
from ellm.kernels.reference import TorchOps
from ellm.worker.api.config import SchedulerConfig
from ellm.worker.executor import resolve
from ellm.worker.executor.local import LocalExecutor

LENGTHS = {1: 37, 2: 3}  # seq_id -> prompt tokens
WHOLE, HOLED = 2, 3  # tokens decoded before and after the hole is made


def tokens(folder: Path, ops: Ops) -> list[list[int]]:
    """What the engine says with these operations."""
    resolve.dispatch.select = lambda *_, **__: ops  # type: ignore[assignment]
    config = golden.config(folder, jit=False, num_blocks=16, transient_blocks=2, host_bytes=1 << 18)
    # The largest step runs once at start.
    engine = LocalExecutor.load(
        replace(config, scheduler=SchedulerConfig(max_num_seqs=2, max_step_tokens=21))
    )
    driver = HoleDriver(engine)
    tracks = [driver.add(i, golden.prompt(length, i), GREEDY) for i, length in LENGTHS.items()]
    driver.step({1: 18, 2: 3})
    driver.step({1: 19, 2: 1})  # the rest of the first as a chunk, beside a decode row
    for _ in range(WHOLE):
        driver.step({1: 1, 2: 1})
    saves = driver.save(tracks[0].block_ids[1:2])
    driver.settle(driver.step({}, saves=saves), saves)
    holed = driver.punch(1, 101, Hole(0, 1, 2), [save.host_block for save in saves])
    for _ in range(HOLED):
        driver.step({101: 1, 2: 1})
    engine.close()
    return [list(holed.outputs), list(tracks[1].outputs)]


def main() -> None:
    folder = Path(sys.argv[1])
    told = {"triton": tokens(folder, dispatch.triton_body("cpu")), "torch": tokens(folder, TorchOps())}
    sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
