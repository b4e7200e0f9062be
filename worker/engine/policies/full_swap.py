"""`full-swap`: `full-recompute`, but the victim's KV moves to the host and back, and everybody waits for it.

The swap of vLLM's first engine: when blocks run out, the last to arrive is moved out whole, and its place on
the host is free as soon as it is back: who is moved twice is copied twice. Nobody new starts while somebody
is out. While nobody must go, those who are out come back in the order of their arrival, if there is room for
all of it, a block more and the watermark behind what the others need now. Without a host tier, or where it is
full, the victim is dropped and computed again; so is its last block if that is not full.
"""

from __future__ import annotations

from ellm.worker.cache.block_table import num_blocks_for
from ellm.worker.engine.policies.full_recompute import FullRecompute
from ellm.worker.engine.sequence import Sequence, SequenceState
from ellm.worker.engine.state import EngineState


class FullSwap(FullRecompute):
    """See the module."""

    parks = True

    def __init__(self) -> None:
        super().__init__()
        self._waits = False

    def prepare(self, now: float) -> None:
        """Move out who was parked, once no plan names it; then bring back who fits."""
        copies = self.state.copies
        self._waits = copies is not None and copies.any_new  # of a step that came to nothing
        for seq in list(self.state.parked):
            if seq.seq_id >= 0 and not seq.num_outstanding:
                self._move_out(seq)
        if any(seq.seq_id >= 0 for seq in self.state.parked):
            return  # somebody still goes
        for seq in sorted(self.state.parked, key=lambda s: s.key):
            if not self._bring_back(seq, now):
                break

    def waits_for_copies(self) -> bool:
        return self._waits

    def decodes(self, state: EngineState, now: float) -> bool:
        return True if state.parked or self._restoring() else super().decodes(state, now)

    def prefill_rows(self, state: EngineState, num_decode: int, now: float) -> int:
        """What is left of one that was moved, a block at most, runs beside the others; so does the rest of a
        prompt that had begun when somebody was moved out."""
        if state.parked or self._restoring():
            return state.config.max_step_tokens - num_decode
        return super().prefill_rows(state, num_decode, now)

    def may_admit(self, state: EngineState, seq: Sequence, num_blocks: int, now: float) -> bool:
        return not state.parked and super().may_admit(state, seq, num_blocks, now)

    def blocks_coming(self) -> bool:
        return any(seq.seq_id >= 0 or seq.num_outstanding for seq in self.state.parked)

    def evict(self, seq: Sequence, now: float) -> None:
        host = self.state.host
        pause = seq.gap is None and seq.first_token_at is not None and len(self.state.running) > 1
        if host is not None and pause and host.num_available >= len(seq.table):
            self.residency.park(seq, now)
            self.state.totals.num_preemptions += 1
        else:
            super().evict(seq, now)

    def _restoring(self) -> bool:
        """Somebody who has put out tokens has more than its newest one to compute."""
        return any(
            seq.first_token_at is not None and len(seq.tokens) - seq.num_planned > 1
            for seq in self.state.running
        )

    def _move_out(self, seq: Sequence) -> None:
        if self.residency.save(seq, len(seq.table)):
            self._waits = True
        if seq.num_saved < len(seq.saved):
            return  # released when the copies have ended
        self.residency.forget_released(seq)
        self.residency.release_tail(seq, len(seq.table))

    def _bring_back(self, seq: Sequence, now: float) -> bool:
        state, size = self.state, self.state.block_size
        need = self.residency.blocks_to_resume(seq)
        if state.running:  # else nobody competes for blocks, and it might need all there are
            growing = sum(other.num_planned >= len(other.table) * size for other in state.running)
            need = num_blocks_for(len(seq.tokens) - 1, size) + 1 + growing + state.watermark_blocks
        if need > state.pool.num_available:
            return False
        if not self.residency.resume(seq, now):
            return False
        if seq.gap is not None:
            self.residency.load(seq, len(seq.table))
            self._waits = True
        self.residency.forget_saved(seq)
        return seq.state is SequenceState.RUNNING
