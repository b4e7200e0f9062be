"""How busy the engine is, for those who send it work.

Per step it adds to a few sums; what takes a look at every sequence is done when a report is asked for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as List
from dataclasses import asdict
from math import ceil
from statistics import median

from ellm.worker.api.cost_model import CostModel, StepFeatures
from ellm.worker.api.output import SequenceOutput
from ellm.worker.api.report import WorkerReport
from ellm.worker.engine.plan import BatchPlan, CopyTimes, StepResult
from ellm.worker.engine.planner.link import LinkCost
from ellm.worker.engine.planner.slack import seconds_per_token, slack
from ellm.worker.engine.state import EngineState
from ellm.worker.engine.uncached import debt_s, uncached

_SMOOTHING = 0.05  # of a new step in the moving averages
_MIN_RETRY_S, _MAX_RETRY_S = 1.0, 60.0
_LEAST_RATE = 0.05  # of a full step's rows per second: a queue that stands still for a moment goes on
_RECENT_S = 60.0  # an end longer ago says nothing of attainment now
_LEVELS = 8  # of headroom and uncached tokens: crossing one is a change worth telling
_BEYOND = 0.25  # of a level: so far across, lest a pool that hovers at the line tells of it again and again


class Load:
    """Watches steps go by; reads the state."""

    def __init__(self, state: EngineState) -> None:
        self._state = state
        self._seq = 0
        self._step_time_s = 0.0
        self._last_progress = 0.0
        self._finishes: deque[float] = deque(maxlen=64)  # when the last requests ended
        self._hole_tokens = 0  # as of the last step
        self._prefill = (0.0, 0.0)  # weight * rows, weight * seconds of steps with prompts, forgetting
        self._level = _LEVELS  # of memory, as `pressure` told it last
        self._load_cost = LinkCost(state.limits.block_bytes)

    def work_came(self, now: float) -> None:
        """The engine had nothing to do until now."""
        self._last_progress = now

    def step_finished(
        self, plan: BatchPlan, result: StepResult, outputs: List[SequenceOutput], now: float
    ) -> None:
        """A step that computed something; one that waited for copies is `waited`."""
        self._last_progress = now
        totals, elapsed_s = self._state.totals, result.elapsed_s
        share = _SMOOTHING if totals.num_steps else 1.0
        totals.num_steps += 1
        totals.busy_s += elapsed_s
        totals.streamed_tokens += len(plan.streams) * self._state.block_size
        self._step_time_s += share * (elapsed_s - self._step_time_s)
        rows = plan.num_rows - plan.num_decode - (totals.hole_tokens - self._hole_tokens)
        self._hole_tokens = totals.hole_tokens
        self._note_prompts(rows, elapsed_s)
        self._note_copies(result.copy_times)
        self._finishes.extend(now for output in outputs if output.finish_reason is not None)

    def waited(self, result: StepResult, now: float) -> None:
        """A plan without rows has come back."""
        self._last_progress = now
        self._note_copies(result.copy_times)

    def retry_after_s(self) -> float:
        """Time in which a tenth of the queue is worked off at the recent rate: soon enough to find a place,
        late enough that those who were refused do not all come back to a full queue."""
        finishes = self._finishes
        span = finishes[-1] - finishes[0] if len(finishes) > 1 else 0.0
        if span <= 0.0:
            return _MIN_RETRY_S
        rate = (len(finishes) - 1) / span
        return min(_MAX_RETRY_S, max(_MIN_RETRY_S, 0.1 * len(self._state.waiting) / rate))

    def pressure(self) -> tuple[int, bool, bool]:
        """Equal as long as nothing has changed that others should hear of before the next report is due:
        memory in eighths, whether somebody waits, whether somebody is parked. O(1)."""
        state = self._state
        eighths = _LEVELS * state.pool.num_available / state.pool.num_blocks
        if not eighths or not self._level - 1 - _BEYOND < eighths <= self._level + _BEYOND:
            self._level = ceil(eighths)
        return self._level, bool(len(state.waiting)), bool(state.parked)

    def report(self, cost_model: CostModel, has_work: bool, now: float) -> WorkerReport:
        """Headroom keeps back one block for each running sequence and the watermark: what they grow into.
        O(sequences)."""
        self._seq += 1
        state = self._state
        pool, host = state.pool, state.host
        reserve = len(state.running) + state.watermark_blocks
        found = uncached(state)
        return WorkerReport(
            seq=self._seq,
            num_running=len(state.running),
            num_waiting=len(state.waiting),
            free_blocks=pool.num_free,
            cached_blocks=pool.num_cached,
            num_blocks=pool.num_blocks,
            headroom_tokens=state.block_size * max(0, pool.num_available - reserve),
            running_tokens=found.known - found.parked,
            waiting_tokens=state.waiting.num_tokens,
            uncached_tokens=found.total,
            uncached_token_ratio=found.ratio,
            num_parked=len(state.parked),
            recompute_debt_s=debt_s(found, state, cost_model, self._load_cost.block_s),
            step_time_s=self._step_time_s,
            cost_model_error=cost_model.error_median,
            since_last_step_s=max(0.0, now - self._last_progress) if has_work else 0.0,
            prefill_rate_tok_s=self._prefill_rate(cost_model),
            parked_tokens=found.parked,
            host_tokens=found.host,
            dropped_now_tokens=found.dropped,
            recomputing_tokens=found.recomputing,
            streaming_tokens=found.streaming,
            host_blocks_used=0 if host is None else host.num_blocks - host.num_free,
            num_host_blocks=0 if host is None else host.num_blocks,
            slack_s=self._slack(now),
            slo_attainment=self._attainment(now),
            max_running=state.max_num_seqs,
            prefix_digest=pool.index.digest.packed(now) if state.prefix_caching else b"",
            prefill_tokens=sum(max(0, seq.num_prompt - seq.num_planned) for seq in state.running),
            decode_step_s=self._decode_step(cost_model),
            **asdict(state.totals),
        )

    def _note_copies(self, times: CopyTimes | None) -> None:
        if times is not None:
            self._load_cost.observe(times.loaded_bytes, times.loaded_s)

    def _note_prompts(self, rows: int, elapsed_s: float) -> None:
        """A step weighs by its prompt rows: a few short prompts say nothing of a long one. Where prompts go
        on waiting behind it, it gave them all that SLOs, memory and places allow: it weighs as a full one."""
        weight = self._state.config.max_step_tokens if len(self._state.waiting) else max(0, rows)
        if weight:
            keep = 1.0 - _SMOOTHING
            done, times = self._prefill
            self._prefill = (keep * done + weight * max(0, rows), keep * times + weight * elapsed_s)

    def _prefill_rate(self, cost_model: CostModel) -> float:
        """Rows per second. Before the first prompt what the cost model predicts of a full step, and never
        less than a fraction of that; 0 where nothing is known."""
        rows = self._state.config.max_step_tokens
        seconds = cost_model.predict(StepFeatures(rows, 0, rows, rows * (rows + 1) // 2, 1))
        full = rows / seconds if seconds > 0.0 else 0.0
        done, times = self._prefill
        return max(done / times, _LEAST_RATE * full) if times > 0.0 else full

    def _decode_step(self, cost_model: CostModel) -> tuple[float, float, float]:
        """A step of decode rows alone as a line through two that the pool has room for."""
        state, few = self._state, 1
        many = max(2, min(64, state.max_num_seqs))
        kv = state.block_size * state.pool.num_blocks // 2
        least = cost_model.predict(StepFeatures(few, few, 0, 0, few))
        per_row = (cost_model.predict(StepFeatures(many, many, 0, 0, many)) - least) / (many - few)
        per_token = (cost_model.predict(StepFeatures(few, few, kv, 0, few)) - least) / max(1, kv)
        return max(0.0, least - per_row), max(0.0, per_row), max(0.0, per_token)

    def _slack(self, now: float) -> tuple[float, float, float]:
        """Least, median and most of those who run and have a deadline; zeros where nobody has."""
        found = []
        for seq in self._state.running:
            per_token_s = seconds_per_token(seq.tpot_slo_s)
            if per_token_s is not None and seq.first_token_at is not None:
                found.append(slack(seq.first_token_at, per_token_s, len(seq.tokens) - seq.first_index, now))
        return (min(found), median(found), max(found)) if found else (0.0, 0.0, 0.0)

    def _attainment(self, now: float) -> float:
        """1 where nobody with a promise has ended of late."""
        kept = self._state.kept
        while kept and now - kept[0][0] > _RECENT_S:
            kept.popleft()
        return sum(ok for _, ok in kept) / len(kept) if kept else 1.0
