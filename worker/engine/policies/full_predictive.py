"""`full-predictive`: `full-chunked` with an admission that looks ahead.

A request starts only if the pool and the deadline of a token are expected to hold as everybody grows, by what
outputs have been like; how far above the expectation room is kept free follows from how many requests
attain their SLO. Everything else is `full-chunked`: it shows what admission alone is worth.
"""

from __future__ import annotations

from ellm.worker.api.cost_model import CostModel
from ellm.worker.engine.planner.admission import TIMELY, Admission, Room
from ellm.worker.engine.planner.slack import seconds_per_token
from ellm.worker.engine.policies.base import Policy
from ellm.worker.engine.policies.forecast import Forecast
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
        if self._fits_whatever_comes(state, seq):
            return True
        admission = self._plan(state, now)
        if self._refused is seq:
            return False
        per_token_s = seconds_per_token(seq.tpot_slo_s)
        admitted = admission.admits(
            len(seq.tokens), seq.max_total, 1.0, self.forecast.survival(seq), per_token_s
        )
        self._refused = None if admitted else seq
        return admitted

    def admitted(self, seq: Sequence, now: float) -> None:
        if self._admission is not None:
            self._admission.add(len(seq.tokens), seq.max_total, 1.0, self.forecast.survival(seq))

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
        slos = [seq.tpot_slo_s for seq in running if seq.tpot_slo_s is not None and not seq.late]
        self._admission = admission = Admission(
            Room(state.pool.num_blocks * state.block_size, 0, self.forecast.step_cost),
            z=self.forecast.safety.z,
            per_token_s=seconds_per_token(min(slos, default=None)),
        )
        admission.add_all(
            [len(seq.tokens) for seq in running],
            [seq.max_total for seq in running],
            [1.0] * len(running),
            [self.forecast.survival(seq) for seq in running],
        )
        self._planned_at, self._planned_for, self._refused = now, preemptions, None
        return admission

    def _fits_whatever_comes(self, state: EngineState, seq: Sequence) -> bool:
        """Everybody at full length is in time and in the pool, blocks rounded up."""
        running, size = state.running, state.block_size
        most = sum([other.max_total for other in running]) + seq.max_total + size * (len(running) + 1)
        if most > state.pool.num_blocks * size:
            return False
        slos = [other.tpot_slo_s for other in (*running, seq) if other.tpot_slo_s is not None]
        if not slos:
            return True
        limit_s = TIMELY * (seconds_per_token(min(slos)) or 0.0)
        return self.forecast.step_cost(len(running) + 1, most) <= limit_s
