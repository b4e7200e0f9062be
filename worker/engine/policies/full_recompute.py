"""`full-recompute`: prompts first and alone, whole requests dropped and computed again: vLLM's first engine.

While a prompt can be taken, a step holds prompts and nothing else, and every decode waits; prompts are not
cut, but for one that no step could hold whole. Admission is optimistic above a watermark. When blocks run
out, the last to arrive goes back to the queue and all its known tokens are computed again, as one prompt.
"""

from __future__ import annotations

from ellm.worker.engine.policies.base import Policy
from ellm.worker.engine.sequence import Sequence, SequenceState
from ellm.worker.engine.state import EngineState


class FullRecompute(Policy):
    """Knows nothing of time, lengths to come or SLOs."""

    def __init__(self) -> None:
        self._started: list[Sequence] = []  # not known to be computed to the end of their prompts
        self._prompts_alone = False  # this step
        self._rows = 0  # left in this step for prompts that have not started

    def decodes(self, state: EngineState, now: float) -> bool:
        """No, if this step will have rows of prompts: of one that was cut, or of the front of the queue."""
        cut = [seq for seq in self._started if _is_cut(seq)]
        self._started = cut
        self._rows = state.config.max_step_tokens - sum(len(seq.tokens) - seq.num_planned for seq in cut)
        self._prompts_alone = bool(cut) or self._front_can_start(state, now)
        return not self._prompts_alone

    def prefill_rows(self, state: EngineState, num_decode: int, now: float) -> int:
        return state.config.max_step_tokens if self._prompts_alone else 0

    def may_admit(self, state: EngineState, seq: Sequence, num_blocks: int, now: float) -> bool:
        """In a step of prompts, if the watermark stays free and the prompt fits whole beside those before it;
        one that is longer than a step goes alone."""
        if not self._prompts_alone or not super().may_admit(state, seq, num_blocks, now):
            return False
        return self._uncached(state, seq) <= self._rows or self._rows == state.config.max_step_tokens

    def admitted(self, seq: Sequence, now: float) -> None:
        self._rows -= len(seq.tokens) - seq.num_planned
        self._started.append(seq)

    def _front_can_start(self, state: EngineState, now: float) -> bool:
        """Whether the scheduler, asked for no decode rows, will start the front of the queue."""
        seq = state.waiting.peek()
        if seq is None or seq.num_outstanding or len(state.running) >= state.max_num_seqs:
            return False
        num_blocks = self.residency.find(seq).num_taken
        return num_blocks <= state.pool.num_available and super().may_admit(state, seq, num_blocks, now)

    def _uncached(self, state: EngineState, seq: Sequence) -> int:
        found = len(seq.table) + len(self.residency.find(seq).blocks)
        return len(seq.tokens) - found * state.block_size


def _is_cut(seq: Sequence) -> bool:
    """It runs, and more than its newest token is still to be planned."""
    left = len(seq.tokens) - seq.num_planned
    return seq.state is SequenceState.RUNNING and (left > 1 or (left > 0 and seq.prefill_only))
