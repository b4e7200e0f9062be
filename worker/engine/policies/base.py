"""What a scheduling policy decides. The scheduler does the rest: order, rows, blocks, plans.

The seam is one object per engine, asked a few O(1) questions per step. A policy never changes the state it is
shown. A policy that plans ahead (slack, parking, holes) does its work in `prefill_rows`, the first question
of every step, and answers the others from what it has decided.
"""

from __future__ import annotations

from typing import Protocol

from ellm.worker.engine.sequence import Sequence
from ellm.worker.engine.state import EngineState


class Policy(Protocol):
    """The answers that make one serving system differ from another."""

    def prefill_rows(self, state: EngineState, num_decode: int, now: float) -> int:
        """Rows that chunks may take in this step, beside `num_decode` decode rows. The scheduler caps it at
        what is left of `max_step_tokens`. Asked once per step, after the decode rows are planned."""
        ...

    def may_admit(self, state: EngineState, seq: Sequence, num_blocks: int, now: float) -> bool:
        """Whether the front of the queue may start now. It would take `num_blocks` of those available: new
        ones, and hits that nobody refers to now."""
        ...

    def victim(self, state: EngineState, seq: Sequence) -> Sequence:
        """Who gives its blocks up so that `seq` can go on: `seq` itself or one behind it in `state.running`,
        never one before it, which has its row in this step already."""
        ...
