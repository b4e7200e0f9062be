"""Opens and closes holes of running sequences: the second way, beside parking, to hold less than all of a KV.

A hole changes only while no plan names its sequence, and each change begins a new residence: within one, an
executor's copy of the block table only grows.
"""

from __future__ import annotations

from ellm.worker.cache.block_table import num_blocks_for
from ellm.worker.engine.hole import Hole
from ellm.worker.engine.residency import Residency
from ellm.worker.engine.sequence import Sequence, SequenceState
from ellm.worker.engine.state import EngineState


class Holes:
    """One per engine; the policy that wants holes is its caller."""

    def __init__(self, state: EngineState, residency: Residency) -> None:
        self._state = state
        self._residency = residency

    def open(self, seq: Sequence, hole: Hole) -> bool:
        """Let a running sequence go on without blocks of its own in `hole`: full blocks, computed, on the
        host where they are to be streamed, the hole that there is among them. False: a plan names the
        sequence, or there are not enough transient blocks, or a step has not the rows for it."""
        state, former = self._state, seq.hole
        assert seq.state is SequenceState.RUNNING
        assert seq.gap is None
        assert 0 <= hole.first <= hole.split <= hole.end <= seq.num_computed // state.block_size
        assert hole.num_streamed == 0 or hole.end <= seq.num_saved
        assert former is None or hole.first <= former.first <= former.end <= hole.end
        held = former.end - former.first if former is not None else 0
        if seq.num_outstanding or hole.end - hole.first > len(state.transient) + held:
            return False
        if hole.num_rows(state.block_size) >= state.config.max_step_tokens:
            return False
        state.end_residence(seq)
        state.drop_hole(seq)
        ids = [state.transient.pop() for _ in range(hole.first, hole.end)]
        seq.table.replace(state.pool, hole.first, ids)
        seq.hole = hole
        self._residency.begin_residence(seq)
        return True

    def close(self, seq: Sequence) -> bool:
        """Let a running sequence have blocks of its own again: what was in the hole is found, loaded or
        computed. False: a plan names it, or there are not enough blocks."""
        state, hole = self._state, seq.hole
        assert hole is not None
        behind = seq.table.block_ids[hole.end :]
        room = state.pool.num_available + sum(state.pool.references(block) == 1 for block in behind)
        if seq.num_outstanding or num_blocks_for(len(seq.tokens), state.block_size) - hole.first > room:
            return False
        state.end_residence(seq)
        state.drop_hole(seq)
        # What lies behind is let go of by name, and found again at once.
        seq.table.block_ids = seq.table.block_ids[: hole.first]
        state.pool.release(behind)
        seq.num_planned = seq.num_computed = hole.first * state.block_size
        seq.num_committed = min(seq.num_committed, hole.first)
        self._residency.fill(seq, self._residency.find(seq))
        self._residency.begin_residence(seq)
        return True
