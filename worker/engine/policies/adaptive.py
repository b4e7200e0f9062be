"""`adaptive`: requests that are ahead of their deadlines give way to those that are not.

Admission looks ahead, as in `full-predictive`, but a request that can afford to pause counts by the share of
steps that it needs. Who is resident is decided by slack (`planner.ranking`), anew every 0.1 s, when blocks
run short and when somebody new may start. Whoever must give way is parked: its blocks stay until somebody
takes them, from its end on, at no cost where the host has a copy. Without pressure it does what
`full-chunked` does. Where pauses are dear (no host tier, no spare rows) the last to come gives way, and comes
back in its turn. With transient blocks and a starved memory, part of each request is recomputed in every step
(`in_step`).
"""

from __future__ import annotations

from collections.abc import Iterator

from ellm.worker.api.cost_model import CostModel
from ellm.worker.cache.block_table import num_blocks_for
from ellm.worker.engine.plan import BatchPlan, StepResult
from ellm.worker.engine.planner.ranking import Rank, Standing, by_arrival, in_order, residents
from ellm.worker.engine.policies.base import Policy
from ellm.worker.engine.policies.forecast import Forecast
from ellm.worker.engine.policies.foresight import Foresight
from ellm.worker.engine.policies.host_traffic import HostTraffic
from ellm.worker.engine.policies.in_step import InStep, num_holed
from ellm.worker.engine.policies.sharing import found_tokens, shared_tokens
from ellm.worker.engine.policies.step_rows import free_rows, timely_rows
from ellm.worker.engine.residency import Residency
from ellm.worker.engine.sequence import Sequence, SequenceState
from ellm.worker.engine.state import EngineState

_BEFORE_ALL = -(2**40)  # a priority
_REPLAN_S = 0.1
_URGENT_S = 0.3  # with less slack than this somewhere, prompts lengthen no step beyond its deadline
_WRITE_THROUGH = 0.5  # of the pool in use: below it nobody will be parked soon


class Adaptive(Policy):
    """See the module."""

    parks = True

    def __init__(self) -> None:
        self._next_plan = 0.0
        self._order: list[Sequence] = []  # who is parked first comes first
        self._save_order: list[Sequence] = []  # whose copies are worth most comes first
        self._wanted: list[Sequence] = []  # parked, and should be resident
        self._newcomer: Sequence | None = None  # the front of the queue, if it should start now
        self._least_slack = float("inf")
        self._blocked = False  # somebody waits whom admission refuses

    def attach(self, state: EngineState, residency: Residency, cost_model: CostModel) -> None:
        super().attach(state, residency, cost_model)
        self.forecast = Forecast(cost_model)
        self.foresight = Foresight(state, residency, self.forecast)
        self.traffic = HostTraffic(state, residency)
        self.in_step = InStep(state, self.holes, cost_model)

    # What the scheduler asks.

    def prepare(self, now: float) -> None:
        state = self.state
        self.in_step.prepare(now)
        if state.parked or self._shortage() > 0 or self._is_tight():
            if now >= self._next_plan or self._somebody_new():
                self._replan(now)
            self._relieve(now)
            self._let_in()
            self._bring_back(now)
        elif self._next_plan or self._blocked:
            self._forget_plan()
        if state.host is not None:
            step_s = self.foresight.step_s
            self.traffic.load(step_s, lambda: self.restore_rows(state, len(state.running), now))
            if state.pool.num_available < _WRITE_THROUGH * state.pool.num_blocks:
                self.traffic.save(self._save_order or state.running, step_s)

    def prefill_rows(self, state: EngineState, num_decode: int, now: float) -> int:
        if not self._blocked and self._least_slack >= _URGENT_S:
            return state.config.max_step_tokens - num_decode
        if self._blocked or not self.foresight.has_time(now):
            return free_rows(state, self.forecast, num_decode)
        return timely_rows(state, self.forecast, num_decode)

    def restore_rows(self, state: EngineState, num_decode: int, now: float) -> int:
        return free_rows(state, self.forecast, num_decode)

    def may_admit(self, state: EngineState, seq: Sequence, num_blocks: int, now: float) -> bool:
        if not state.running and not state.parked:
            return True
        if num_blocks + self._reserve() > state.pool.num_available or not self.in_step.has_rows(seq):
            return False
        ahead = self.foresight.looks_ahead(now)
        self._blocked = ahead and not self.foresight.admits(seq, now)
        return not self._blocked and (ahead or not state.parked)

    def blocks_coming(self) -> bool:
        return any(seq.num_outstanding for seq in self.state.parked)

    def reclaim(self, now: float) -> bool:
        if self._release(1):
            return True
        self._wanted.clear()  # they wait for blocks, and those who run need one now
        return self._release(1) > 0

    def evict(self, seq: Sequence, now: float) -> None:
        if _can_pause(seq) and not seq.num_outstanding and len(self.state.running) > 1:
            self.residency.park(seq, now)
        else:
            super().evict(seq, now)

    # What it is told.

    def admitted(self, seq: Sequence, now: float) -> None:
        self.foresight.admitted(seq)

    def emitted(self, seq: Sequence, now: float) -> None:
        self.forecast.emitted(seq)

    def finished(self, seq: Sequence, now: float) -> None:
        self.foresight.finished(seq)

    def aborted(self, seq: Sequence, now: float) -> None:
        self.forecast.aborted(seq)
        self.foresight.forget()

    def stepped(self, plan: BatchPlan, result: StepResult, now: float) -> None:
        self.traffic.observe(result.copy_times)
        self.foresight.stepped(result.elapsed_s, plan.num_decode)

    # Who is resident.

    def _is_tight(self) -> bool:
        """Somebody waits, and there would not be room for all at their full length."""
        seq = self.state.waiting.peek()
        return seq is not None and not self.foresight.is_roomy(seq)

    def _somebody_new(self) -> bool:
        """The front of the queue is not refused by the sums of now, and needs somebody else's blocks."""
        seq = self.state.waiting.peek()
        if seq is None or seq.num_outstanding or self.foresight.is_refused(seq):
            return False
        need = num_blocks_for(len(seq.tokens), self.state.block_size) + self._reserve()
        return need > self.state.pool.num_available

    def _forget_plan(self) -> None:
        """The pressure is over."""
        self._next_plan = 0.0
        self._order, self._save_order, self._wanted = [], [], []
        self._newcomer, self._least_slack, self._blocked = None, float("inf"), False

    def _replan(self, now: float) -> None:
        """Rank everybody, and the front of the queue if it may start; park who should give way."""
        state = self.state
        self._next_plan = now + _REPLAN_S
        newcomer = self._admissible(now)
        everybody = [*state.running, *state.parked, *([newcomer] if newcomer is not None else [])]
        num_running, more = len(state.running), self.foresight.growth(_REPLAN_S, now)
        dear = self.foresight.pauses_are_dear(now)
        order = (by_arrival if dear else in_order)(
            self._standing(i, s, i < num_running, now, more) for i, s in enumerate(everybody)
        )
        room = state.pool.num_blocks - self._reserve()
        chosen = {s.index for s in residents(order, room, state.max_num_seqs, in_turn=dear)}
        self._newcomer = newcomer if len(everybody) - 1 in chosen else None
        if newcomer is not None:
            order = [pair for pair in order if pair[1].index != len(everybody) - 1]
        self._order = [everybody[s.index] for _, s in reversed(order)]
        self._wanted = [everybody[s.index] for _, s in order if s.index in chosen and not s.resident]
        alive = [s for which, s in order if which is not Rank.HOPELESS]
        self._least_slack = min((s.slack_s for s in alive if s.slack_s is not None), default=float("inf"))
        alive.sort(key=lambda s: (s.resident, -(s.slack_s or 0.0)))
        self._save_order = [everybody[s.index] for s in alive]
        if not self._wanted and newcomer is None and self._shortage() <= 0:
            return  # everybody may stay who is here
        for i in range(num_running):
            if i not in chosen and len(state.running) > 1 and _can_pause(everybody[i]):
                self.residency.park(everybody[i], now)

    def _standing(self, index: int, seq: Sequence, resident: bool, now: float, more: int) -> Standing:
        """`more`: tokens that it is left room for."""
        state, size = self.state, self.state.block_size
        blocks = num_blocks_for(len(seq.tokens) + more, size)
        held = max(blocks, len(seq.table)) - num_holed(seq) - shared_tokens(state.pool, seq) // size
        if not resident and seq.state is not SequenceState.PARKED:
            held -= found_tokens(state, self.residency, seq) // size
        if resident and not _can_pause(seq):
            return Standing(index, _BEFORE_ALL, seq.order, resident, False, False, None, held)
        slack_s = self.foresight.slack(seq, now)
        return Standing(
            index,
            seq.request.priority,
            seq.order,
            resident,
            seq.first_token_at is not None,
            self.foresight.is_hopeless(seq, slack_s),
            slack_s,
            held,
            now - seq.since,
            1.0 if state.host is None else min(1.0, (seq.num_saved + 1) / blocks),
        )

    def _admissible(self, now: float) -> Sequence | None:
        """The front of the queue, if admission lets it in."""
        seq = self.state.waiting.peek()
        self._blocked = False
        if seq is None or seq.num_outstanding:
            return None
        admitted = self.foresight.admits(seq, now)
        self._blocked = not admitted and self.foresight.looks_ahead(now)
        return seq if admitted else None

    def _relieve(self, now: float) -> None:
        """Blocks for those who grow in this step and the next: from the parked, else somebody is parked."""
        missing = self._shortage()
        if missing <= 0:
            return
        missing -= self._release(missing)
        coming = sum(len(seq.table) for seq in self.state.parked if seq.num_outstanding)
        for seq in self._order:
            if missing <= coming or len(self.state.running) <= 1:
                return
            if seq.state is SequenceState.RUNNING and _can_pause(seq):
                self.residency.park(seq, now)
                coming += len(seq.table)

    def _let_in(self) -> None:
        """Blocks for the front of the queue, from the parked, if it is to start."""
        newcomer = self._newcomer
        if newcomer is None or self.state.waiting.peek() is not newcomer:
            return
        # Those who run take theirs of the reserve before it is the newcomer's turn.
        need = num_blocks_for(len(newcomer.tokens), self.state.block_size) + 2 * self._reserve()
        self._release(need - self.state.pool.num_available)

    def _bring_back(self, now: float) -> None:
        """Resume those who should run, in order; the first for whom there is no room waits for it."""
        state = self.state
        self._wanted = [seq for seq in self._wanted if seq.state is SequenceState.PARKED]
        while self._wanted and self._resume(self._wanted[0], self._reserve(), now):
            del self._wanted[0]
        if not state.running and state.parked:
            # Nobody runs, whatever the plan says: the first in order goes on.
            any(self._resume(seq, 0, now) for seq in sorted(state.parked, key=lambda s: s.key))

    def _resume(self, seq: Sequence, reserve: int, now: float) -> bool:
        need = self.residency.blocks_to_resume(seq) + reserve - self.state.pool.num_available
        if need > 0 and self._release(need, spare=seq) < need and self.state.running:
            return False
        return self.residency.resume(seq, now)

    def _release(self, count: int, spare: Sequence | None = None) -> int:
        """Free up to `count` blocks of parked sequences, of those first that are parked first."""
        freed = 0
        for seq in self._releasable(spare):
            if freed >= count:
                break
            while freed < count and (held := self.residency.num_releasable(seq)):
                freed += self.residency.release_tail(seq, min(held, count - freed))
        return freed

    def _releasable(self, spare: Sequence | None) -> Iterator[Sequence]:
        """Parked sequences, those that should not come back soon first; `spare` not at all."""
        parked = self.state.parked
        if not parked:
            return
        kept = {id(seq) for seq in (*self._wanted, spare)}
        ranked = {id(seq) for seq in self._order}
        unranked = [seq for seq in parked if id(seq) not in ranked]
        for seq in (*self._order, *unranked):
            if seq.state is SequenceState.PARKED and id(seq) not in kept:
                yield seq
        if not self.state.running:  # somebody must run
            yield from [seq for seq in reversed(self._wanted) if seq is not spare]

    def _reserve(self) -> int:
        """Blocks for those who run to grow into before anybody can be parked and give way: two steps."""
        return 1 + len(self.state.running) // 8

    def _shortage(self) -> int:
        """Blocks that those who run need within two steps, beyond those there are; O(1) where there are
        plenty."""
        state = self.state
        available = state.pool.num_available
        if available >= len(state.running):
            return 0
        short = sum(seq.num_planned + 2 > len(seq.table) * state.block_size for seq in state.running)
        return short - available


def _can_pause(seq: Sequence) -> bool:
    """It has put out a token, all its KV is in blocks of its own, and nothing is on its way to it."""
    return seq.gap is None and seq.hole is None and seq.first_token_at is not None and not seq.prefill_only
