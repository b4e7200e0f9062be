"""What a scheduling policy decides. The scheduler does the rest: order, rows, blocks, plans.

The seam is one object per engine, asked a few O(1) questions per step. A policy changes the state through
`Residency` alone, and only in `prepare` and `reclaim`; everywhere else it answers from what it has decided.
The answers given here are those of full caching without a host tier: first come first served, all the rows
that a step may have, the last to arrive gives way.
"""

from __future__ import annotations

from ellm.worker.api.cost_model import CostModel
from ellm.worker.engine.holes import Holes
from ellm.worker.engine.plan import BatchPlan, StepResult
from ellm.worker.engine.residency import Residency
from ellm.worker.engine.sequence import Sequence
from ellm.worker.engine.state import EngineState


class Policy:
    """The answers that make one serving system differ from another."""

    parks = False  # whether it parks sequences: full blocks are then indexed even without prefix caching

    state: EngineState
    residency: Residency
    holes: Holes
    cost_model: CostModel

    def attach(self, state: EngineState, residency: Residency, cost_model: CostModel) -> None:
        """Called once, before anything else."""
        self.state = state
        self.residency = residency
        self.holes = Holes(state, residency)
        self.cost_model = cost_model

    def prepare(self, now: float) -> None:
        """The first call of every step: park, release, resume, start copies."""

    def decodes(self, state: EngineState, now: float) -> bool:
        """Whether this step may have decode rows at all."""
        return True

    def prefill_rows(self, state: EngineState, num_decode: int, now: float) -> int:
        """Rows that chunks may take in this step, beside `num_decode` decode rows. The scheduler caps it at
        what is left of `max_step_tokens`. Asked once per step, after the decode rows are planned."""
        return state.config.max_step_tokens - num_decode

    def restore_rows(self, state: EngineState, num_decode: int, now: float) -> int:
        """Of `prefill_rows`, those that may go to sequences that have put out tokens and come back."""
        return state.config.max_step_tokens

    def may_admit(self, state: EngineState, seq: Sequence, num_blocks: int, now: float) -> bool:
        """Whether the front of the queue may start now. It would take `num_blocks` of those available: new
        ones, and hits that nobody refers to now. By default the watermark is kept free for the growth of
        those who run; an empty engine takes anyone who fits."""
        if not state.running and not state.parked:
            return True
        return num_blocks + state.watermark_blocks <= state.pool.num_available

    def blocks_coming(self) -> bool:
        """Blocks are on their way back that a policy has seen to: nobody else need go for want of them."""
        return False

    def reclaim(self, now: float) -> bool:
        """A running sequence needs a block and there is none: free one or more without stopping anybody.
        False if that is not possible: then `victim` is asked."""
        return False

    def victim(self, state: EngineState, seq: Sequence) -> Sequence:
        """Who goes back to the queue so that `seq` can go on: `seq` itself or one behind it in
        `state.running`, never one before it, which has its row in this step already."""
        return state.running[-1]

    def evict(self, seq: Sequence, now: float) -> None:
        """Take a victim's blocks from it: by default it goes back to the queue and computes all again."""
        self.state.preempt(seq)

    def waits_for_copies(self) -> bool:
        """Whether the step that is being planned begins only when all copies have ended (a blocking swap)."""
        return False

    def admitted(self, seq: Sequence, now: float) -> None:
        """The scheduler has just started `seq`."""

    def emitted(self, seq: Sequence, now: float) -> None:
        """`seq` has a new token; `seq.late` says whether one came after its deadline."""

    def finished(self, seq: Sequence, now: float) -> None:
        """`seq` has ended by itself: by end-of-text, a stop id or its length."""

    def aborted(self, seq: Sequence, now: float) -> None:
        """`seq` has been ended from outside: its client left, or the router saw a stop string."""

    def stepped(self, plan: BatchPlan, result: StepResult, now: float) -> None:
        """A plan has come back; what it meant is applied."""
