"""`full-chunked`: every running sequence keeps all its KV; prompts run in chunks beside decode rows.

First come first served, optimistic admission above a watermark, preemption by recompute of the latest: the
policy of vLLM V1, and the baseline of every other.
"""

from __future__ import annotations

from ellm.worker.engine.sequence import Sequence
from ellm.worker.engine.state import EngineState


class FullChunked:
    """Knows nothing of time, lengths to come or SLOs."""

    def prefill_rows(self, state: EngineState, num_decode: int, now: float) -> int:
        return state.config.max_step_tokens - num_decode

    def may_admit(self, state: EngineState, seq: Sequence, num_blocks: int, now: float) -> bool:
        """Keeps the watermark free for the growth of those who run; an empty engine takes anyone who fits."""
        if not state.running:
            return True
        return num_blocks + state.watermark_blocks <= state.pool.num_available

    def victim(self, state: EngineState, seq: Sequence) -> Sequence:
        """The last to arrive among the lowest priority: `running` is in that order."""
        return state.running[-1]
