"""Whether `adaptive` leaves a share of every running request uncached and recomputes it in each step.

Ten times a second the cost model says what share would give the most tokens per second within the SLO, rows
that a step has to spare included (`planner.literal`): 0, but where memory holds hardly more than such rows.
The share goes there by bounded steps. Holes widen as it grows; they stay with their requests as it shrinks,
and who has one is not parked for another: it has no KV of its own to come back to.
Without transient blocks there is nothing to make holes of, and nothing is asked.
"""

from __future__ import annotations

from functools import partial
from math import inf

from ellm.worker.api.cost_model import CostModel, StepFeatures
from ellm.worker.engine.holes import Holes
from ellm.worker.engine.planner.literal import best_ratio, output_rate, step_towards
from ellm.worker.engine.policies.prefix_holes import PrefixHoles
from ellm.worker.engine.sequence import Sequence
from ellm.worker.engine.state import EngineState

_PERIOD_S = 0.1
_OF_SLO = 0.985  # what a step may take: the cost model errs


class InStep:
    """One per policy."""

    def __init__(self, state: EngineState, holes: Holes, cost_model: CostModel) -> None:
        self._state = state
        self._cost_model = cost_model
        self._prefixes = PrefixHoles(state, holes, own_only=True)
        self._until = 0.0

    @property
    def ratio(self) -> float:
        """The share that is wanted now."""
        return self._prefixes.ratio

    def prepare(self, now: float) -> None:
        """Choose the share anew if it is time, and widen holes to it."""
        state = self._state
        if not state.limits.num_transient_blocks:
            return
        if now >= self._until and state.running:
            self._until = now + _PERIOD_S
            self._prefixes.ratio = step_towards(self.ratio, self._best())
        self._prefixes.widen_all()

    def has_rows(self, seq: Sequence) -> bool:
        """A step has the rows for all holes if `seq` starts, too."""
        return not self._state.limits.num_transient_blocks or self._prefixes.have_rows(seq)

    def _best(self) -> float:
        """Of requests as long as those are that have put out tokens; as many as there are want to run."""
        state = self._state
        tokens = [
            len(seq.tokens) for seq in (*state.running, *state.parked) if seq.first_token_at is not None
        ]
        if not tokens:
            return self.ratio
        mean = sum(tokens) / len(tokens)
        slos = [seq.tpot_slo_s for seq in state.running if seq.tpot_slo_s is not None]
        rate = partial(
            output_rate,
            num_tokens=state.pool.num_blocks * state.block_size,
            mean_tokens=mean,
            num_wanted=min(len(state.running) + len(state.parked) + len(state.waiting), state.max_num_seqs),
            step_time=self._step_s,
            limit_s=_OF_SLO * min(slos) if slos else None,
        )
        size = state.block_size
        return best_ratio(lambda ratio: rate(int(ratio * mean) // size * size / mean))  # whole blocks

    def _step_s(self, rows: float, recompute: float, context: float) -> float:
        """Seconds; without end where rows or transient blocks do not suffice."""
        state = self._state
        if rows + recompute > state.config.max_step_tokens:
            return inf
        if recompute > state.limits.num_transient_blocks * state.block_size:
            return inf
        pairs = 0.5 * recompute * recompute / max(rows, 1.0)  # a hole sees what lies before it in its request
        return self._cost_model.predict(
            StepFeatures(round(rows + recompute), round(rows), round(context), round(pairs), round(rows))
        )


def num_holed(seq: Sequence) -> int:
    """Blocks of its table that are not the pool's."""
    return seq.hole.end - seq.hole.first if seq.hole is not None else 0
