"""`full-predictive`: `full-chunked` with an admission that looks ahead.

A request starts only if the pool and the deadline of a token are expected to hold as everybody grows, by what
outputs have been like; how far above the expectation room is kept free follows from how many requests
attain their SLO. Everything else is `full-chunked`: it shows what admission alone is worth.
"""

from __future__ import annotations

from ellm.worker.api.cost_model import CostModel
from ellm.worker.engine.planner.admission import Admission, Room
from ellm.worker.engine.policies.base import Policy
from ellm.worker.engine.policies.forecast import Forecast
from ellm.worker.engine.policies.sharing import fits_at_full_length, found_tokens, shared_tokens, tightest
from ellm.worker.engine.residency import Residency
from ellm.worker.engine.sequence import Sequence
from ellm.worker.engine.state import EngineState

_REPLAN_S = 0.1


class FullPredictive(Policy):
    """Sums over those who run are kept for 0.1 s, and anew after an end or a preemption. Without pressure an
    arrival is let in before any of it: O(running) additions."""

    forecast: Forecast

    def __init__(self) -> None:
        self._admission: Admission | None = None
        self._planned_at = 0.0
        self._planned_for = 0  # preemptions at that time
        self._refused: Sequence | None = None  # by the sums as they stand

    def attach(self, state: EngineState, residency: Residency, cost_model: CostModel) -> None:
        super().attach(state, residency, cost_model)
        self.forecast = Forecast(cost_model)

    def may_admit(self, state: EngineState, seq: Sequence, num_blocks: int, now: float) -> bool:
        """An empty engine takes anyone who fits."""
        if not state.running:
            return True
        if fits_at_full_length(state, seq, self.forecast):
            return True
        admission = self._plan(state, now)
        if self._refused is seq:
            return False
        found = found_tokens(state, self.residency, seq)
        admitted = admission.admits(
            len(seq.tokens) - found,
            seq.max_total - found,
            1.0,
            self.forecast.survival(seq),
            tightest((seq,), self.forecast),
        )
        self._refused = None if admitted else seq
        return admitted

    def admitted(self, seq: Sequence, now: float) -> None:
        if self._admission is not None:
            shared = shared_tokens(self.state.pool, seq)
            survival = self.forecast.survival(seq)
            self._admission.add(len(seq.tokens) - shared, seq.max_total - shared, 1.0, survival)

    def emitted(self, seq: Sequence, now: float) -> None:
        self.forecast.emitted(seq)

    def finished(self, seq: Sequence, now: float) -> None:
        self.forecast.finished(seq)
        self._admission = None

    def aborted(self, seq: Sequence, now: float) -> None:
        self.forecast.aborted(seq)
        self._admission = None

    def _plan(self, state: EngineState, now: float) -> Admission:
        """The sums of those who run."""
        preemptions = state.totals.num_preemptions
        fresh = now < self._planned_at + _REPLAN_S and preemptions == self._planned_for
        if self._admission is not None and fresh:
            return self._admission
        running = state.running
        shared = [shared_tokens(state.pool, seq) for seq in running]
        twice, cost = sum(shared), self.forecast.step_cost  # read by each, held once
        self._admission = admission = Admission(
            Room(
                state.pool.num_blocks * state.block_size, 0, lambda rows, tokens: cost(rows, tokens + twice)
            ),
            z=self.forecast.safety.z,
            per_token_s=tightest([seq for seq in running if not seq.late], self.forecast),
        )
        admission.add_all(
            [len(seq.tokens) - n for seq, n in zip(running, shared, strict=True)],
            [seq.max_total - n for seq, n in zip(running, shared, strict=True)],
            [1.0] * len(running),
            [self.forecast.survival(seq) for seq in running],
        )
        self._planned_at, self._planned_for, self._refused = now, preemptions, None
        return admission
