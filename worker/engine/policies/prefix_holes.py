"""Holes at the front of running requests, which every step fills again: how they grow with their requests."""

from __future__ import annotations

from ellm.worker.engine.hole import Hole
from ellm.worker.engine.holes import Holes
from ellm.worker.engine.sequence import Sequence
from ellm.worker.engine.state import EngineState


class PrefixHoles:
    """The share of every context that its policy wants uncached; of that, `stream` comes from the host."""

    def __init__(
        self,
        state: EngineState,
        holes: Holes,
        ratio: float = 0.0,
        stream: float = 0.0,
        *,
        own_only: bool = False,
    ) -> None:
        """`own_only`: leave those alone who share their first block, where a hole would free nothing."""
        self._state = state
        self._own_only = own_only
        self._holes = holes
        self.ratio = ratio
        self._stream = stream

    def widen_all(self) -> None:
        """What has grown since, of all who run."""
        for seq in self._state.running:
            if seq.first_token_at is not None and seq.gap is None:
                self._widen(seq)

    def have_rows(self, seq: Sequence) -> bool:
        """As many rows as a step has do for all holes, `seq`'s too, which may start now."""
        state = self._state
        share = self.ratio * (1.0 - self._stream)
        rows = sum(
            [max(share * len(other.tokens), self._held_rows(other)) for other in (*state.running, seq)]
        )
        return rows + len(state.running) + 1 <= state.config.max_step_tokens

    def _held_rows(self, seq: Sequence) -> int:
        """Holes stay as wide as they are when the share shrinks."""
        return seq.hole.num_rows(self._state.block_size) if seq.hole is not None else 0

    def _widen(self, seq: Sequence) -> None:
        """By whole blocks, once no plan names it; it rests for a step until then."""
        state, size = self._state, self._state.block_size
        seq.rests = False
        end = min(int(self.ratio * len(seq.tokens)), seq.num_computed) // size
        held = seq.hole.end if seq.hole is not None else 0
        if len(seq.tokens) - seq.num_computed > 1 or end <= held:
            return
        if self._own_only and state.pool.references(seq.table.block_ids[held]) > 1:
            return
        split = end - int(self._stream * end)
        if split < end and seq.num_saved < end:
            return  # not yet on the host
        hole = Hole(0, split, end)
        if end > len(state.transient) + held or hole.num_rows(size) >= state.config.max_step_tokens:
            return  # it stays as wide as it is
        seq.rests = bool(seq.num_outstanding)
        if not seq.rests:
            self._holes.open(seq, hole)
