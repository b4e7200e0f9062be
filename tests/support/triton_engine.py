"""An engine whose operations are Triton's, interpreted, beside one on torch's: run as a program of its own.

    TRITON_INTERPRET=1 python -m support.triton_engine CHECKPOINT

Prints the greedy tokens of three engines, as JSON: of two sequences, one of which has a hole from the middle
on, one block of it recomputed and one streamed within each step. One has every switch on: STRICT, fused
attention, and steps that are recorded and replayed, whole or in pieces. Also what was launched, before and
after the hole.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from support import golden
from support.holes import Hole, HoleDriver
from support.plans import GREEDY
from support.replays import CallAgain

from ellm.kernels import dispatch
from ellm.kernels.ops import Ops
from ellm.kernels.reference import TorchOps
from ellm.worker.api.config import SchedulerConfig
from ellm.worker.executor import resolve, warm_up
from ellm.worker.executor.local import LocalExecutor
from ellm.worker.model.computation import Alone
from ellm.worker.model.graphs import DecodeGraphs, DecodeSizes
from ellm.worker.model.pieces import PieceGraphs

LENGTHS = {1: 37, 2: 3}  # seq_id -> prompt tokens
WHOLE, HOLED = 2, 3  # tokens decoded before and after the hole is made


class Launches:
    """The names of the kernels of attention as they are launched."""

    def __init__(self) -> None:
        from ellm.kernels import triton_tiles

        self.names: list[str] = []
        for name in ("attend_kernel", "attend_both_kernel"):
            setattr(triton_tiles, name, _Noted(name, getattr(triton_tiles, name), self.names))

    def take(self) -> list[str]:
        taken = sorted(set(self.names))
        self.names.clear()
        return taken


class _Noted:
    def __init__(self, name: str, kernel: Any, names: list[str]) -> None:
        self._name, self._kernel, self._names = name, kernel, names

    def __getitem__(self, grid: Any) -> Any:
        self._names.append(self._name)
        return self._kernel[grid]


def tokens(folder: Path, ops: Ops, launches: Launches, *, graphs: bool = False) -> dict[str, Any]:
    """What the engine says with these operations, and what it launched."""
    resolve.dispatch.select = lambda *_, **__: ops  # type: ignore[assignment]
    config = golden.config(
        folder, jit=False, num_blocks=16, transient_blocks=2, host_bytes=1 << 18, fused_attention="on"
    )
    # The largest step runs once at start.
    engine = LocalExecutor.load(
        replace(config, scheduler=SchedulerConfig(max_num_seqs=2, max_step_tokens=21))
    )
    launches.take()
    runner = engine.runner
    sizes = DecodeSizes((4,), (512,))
    recorded = DecodeGraphs(runner._model, ops, runner.cache, sizes, Alone(), CallAgain())
    pieces = PieceGraphs(
        runner._model, runner.cache.num_layers, (24,), runner.cache.device, Alone(), CallAgain()
    )
    if graphs:
        recorded.record_all()
        runner.replay(recorded)
        pieces.record_all()
        runner.replay_pieces(pieces)
    driver = HoleDriver(engine)
    tracks = [driver.add(i, golden.prompt(length, i), GREEDY) for i, length in LENGTHS.items()]
    driver.step({1: 18, 2: 3})
    driver.step({1: 19, 2: 1})  # the rest of the first as a chunk, beside a decode row
    for _ in range(WHOLE):
        driver.step({1: 1, 2: 1})
    driver.step({2: 1})
    saves = driver.save(tracks[0].block_ids[1:2])
    driver.settle(driver.step({}, saves=saves), saves)
    before = launches.take()
    holed = driver.punch(1, 101, Hole(0, 1, 2), [save.host_block for save in saves])
    for _ in range(HOLED):
        driver.step({101: 1, 2: 1})
    engine.close()
    said = [list(holed.outputs), list(tracks[1].outputs)]
    replays = {"replays": recorded.num_replays, "pieces": pieces.num_replays}
    return {"tokens": said, "before": before, "holed": launches.take(), **replays}


def main() -> None:
    folder, launches = Path(sys.argv[1]), Launches()
    # Cutoffs take an interpreter long, and have cases of their own.
    warm_up._COSTLY = replace(warm_up._COSTLY, top_k=0, top_p=1.0, min_p=0.0)
    every = dispatch.triton_body("cpu", deterministic=True, fused=True)
    told = {
        "triton": tokens(folder, dispatch.triton_body("cpu"), launches),
        "every switch": tokens(folder, every, launches, graphs=True),
        "torch": tokens(folder, TorchOps(), launches),
    }
    sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
