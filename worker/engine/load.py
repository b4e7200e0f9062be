"""How busy the engine is, for those who send it work."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as List
from dataclasses import asdict

from ellm.worker.api.cost_model import CostModel
from ellm.worker.api.output import SequenceOutput
from ellm.worker.api.report import WorkerReport
from ellm.worker.engine.state import EngineState

_SMOOTHING = 0.05  # of a new step in the moving average
_MIN_RETRY_S, _MAX_RETRY_S = 1.0, 60.0


class Load:
    """Watches steps go by; reads the state."""

    def __init__(self, state: EngineState) -> None:
        self._state = state
        self._seq = 0
        self._step_time_s = 0.0
        self._last_progress = 0.0
        self._finishes: deque[float] = deque(maxlen=64)  # when the last requests ended

    def work_came(self, now: float) -> None:
        """The engine had nothing to do until now."""
        self._last_progress = now

    def step_finished(self, elapsed_s: float, outputs: List[SequenceOutput], now: float) -> None:
        """A step that computed something; one that waited for copies is `waited`."""
        self._last_progress = now
        totals = self._state.totals
        share = _SMOOTHING if totals.num_steps else 1.0
        totals.num_steps += 1
        totals.busy_s += elapsed_s
        self._step_time_s += share * (elapsed_s - self._step_time_s)
        self._finishes.extend(now for output in outputs if output.finish_reason is not None)

    def waited(self, now: float) -> None:
        """A plan without rows has come back."""
        self._last_progress = now

    def retry_after_s(self) -> float:
        """Time in which a tenth of the queue is worked off at the recent rate: soon enough to find a place,
        late enough that those who were refused do not all come back to a full queue."""
        finishes = self._finishes
        span = finishes[-1] - finishes[0] if len(finishes) > 1 else 0.0
        if span <= 0.0:
            return _MIN_RETRY_S
        rate = (len(finishes) - 1) / span
        return min(_MAX_RETRY_S, max(_MIN_RETRY_S, 0.1 * len(self._state.waiting) / rate))

    def report(self, cost_model: CostModel, has_work: bool, now: float) -> WorkerReport:
        """Headroom keeps back one block for each running sequence and the watermark: what they grow into."""
        self._seq += 1
        state = self._state
        pool = state.pool
        reserve = len(state.running) + state.watermark_blocks
        missing, known = state.uncached_tokens()
        return WorkerReport(
            seq=self._seq,
            num_running=len(state.running),
            num_waiting=len(state.waiting),
            free_blocks=pool.num_free,
            cached_blocks=pool.num_cached,
            num_blocks=pool.num_blocks,
            headroom_tokens=state.block_size * max(0, pool.num_available - reserve),
            running_tokens=sum(len(seq.tokens) for seq in state.running),
            uncached_tokens=missing,
            uncached_token_ratio=missing / known if known else 0.0,
            num_parked=len(state.parked),
            waiting_tokens=state.waiting.num_tokens,
            step_time_s=self._step_time_s,
            cost_model_error=cost_model.error_median,
            since_last_step_s=max(0.0, now - self._last_progress) if has_work else 0.0,
            **asdict(state.totals),
        )
