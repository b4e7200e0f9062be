"""Admission that knows who can pause: each admitted request counts by the share of steps that it needs."""

from __future__ import annotations

from ellm.worker.engine.planner.admission import Admission, Room, is_cheap, is_dear, restorable_tokens
from ellm.worker.engine.planner.attainment import Daring
from ellm.worker.engine.planner.slack import (
    PAUSING,
    FullSpeed,
    duty,
    is_hopeless,
    mean_pause,
    seconds_per_token,
    slack,
)
from ellm.worker.engine.policies.forecast import Forecast
from ellm.worker.engine.policies.sharing import fits_at_full_length, found_tokens, shared_tokens, tightest
from ellm.worker.engine.residency import Residency
from ellm.worker.engine.sequence import Sequence
from ellm.worker.engine.state import EngineState

_RENEW_S = 0.1


class Foresight:
    """Sums over the admitted set, kept for 0.1 s and made anew after an end; who was refused by them stays
    refused."""

    def __init__(self, state: EngineState, residency: Residency, forecast: Forecast) -> None:
        self._state = state
        self._residency = residency
        self._forecast = forecast
        self._speed = FullSpeed()
        self._admission: Admission | None = None
        self._until = 0.0
        self._full_step_s = 0.0
        self._seats = 0.0  # sum of duties
        self._refused: Sequence | None = None
        self._cheap = False
        self._dear = False
        self._daring = Daring()
        self._weighed_until = 0.0

    @property
    def step_s(self) -> float:
        """Moving average of measured steps."""
        return self._speed.step_s

    def stepped(self, elapsed_s: float, num_decode: int) -> None:
        """A step is over."""
        if num_decode:
            self._speed.observe(elapsed_s, num_decode, len(self._state.running))

    def is_refused(self, seq: Sequence) -> bool:
        """By the sums as they stand: asking again is no use yet."""
        return self._refused is seq

    def finished(self, seq: Sequence) -> None:
        """`seq` has ended by itself."""
        state = self._state
        self._forecast.finished(seq, judged=not self._dear)
        if self._dear and self._forecast.could_be_kept(seq):
            self._daring.finished(not seq.late, len(state.running) + len(state.parked))
        self.forget()

    def forget(self) -> None:
        """Somebody has ended."""
        self._admission = None
        self._refused = None

    def admitted(self, seq: Sequence) -> None:
        """`seq` has started."""
        self._refused = None
        if self._admission is not None:
            shared = shared_tokens(self._state.pool, seq)
            duty = self._new_duty(seq)
            self._admission.add(
                len(seq.tokens) - shared, seq.max_total - shared, duty, self._forecast.survival(seq)
            )
            self._seats += duty

    def admits(self, seq: Sequence, now: float) -> bool:
        """Whether `seq`, which has not started, would find room as everybody grows. An empty engine takes
        anyone; who has put out tokens was admitted once."""
        state = self._state
        if seq.first_token_at is not None or not (state.running or state.parked):
            return True
        if self.is_roomy(seq):
            return True
        if self._admission is None or now >= self._until:
            self._admission = self._sums(now)
            self._until = now + _RENEW_S
            self._refused = None
        if self._refused is seq:
            return False
        duty = self._new_duty(seq)
        found = found_tokens(state, self._residency, seq)
        # Not more than there are seats in a step: else one would have to leave for each that comes.
        admitted = self._seats + duty <= state.max_num_seqs and self._admission.admits(
            len(seq.tokens) - found,
            seq.max_total - found,
            duty,
            self._forecast.survival(seq),
            tightest((seq,), self._forecast),
        )
        self._refused = None if admitted else seq
        return admitted

    def is_roomy(self, seq: Sequence) -> bool:
        """Everybody at full length, `seq` too, would be in the pool, blocks rounded up, and in time."""
        return not self._state.parked and fits_at_full_length(self._state, seq, self._forecast)

    def looks_ahead(self, now: float) -> bool:
        """Whether room is kept for what is to come, which leaves memory empty. Not where all of it can be
        computed again at once, in rows that cost nothing; nor where pauses are dear, as long as few are late
        for it: who came last and gives way has little to compute again."""
        self._weigh(now)
        return not self._cheap and (not self._dear or self._daring.careful)

    def pauses_are_dear(self, now: float) -> bool:
        """There is no host tier, and every row costs, even in the smallest step: computing again takes the
        place of decoding."""
        self._weigh(now)
        return self._dear

    def has_time(self, now: float) -> bool:
        """Whether prompts that are let in may lengthen steps. Not where nobody looked ahead: those who give
        way for them take longer to come back; nor where pauses are dear."""
        return self.looks_ahead(now) and not self._dear

    def _weigh(self, now: float) -> None:
        if now < self._weighed_until or self._speed.step_s <= 0.0:
            return
        self._weighed_until = now + _RENEW_S
        state = self._state
        num_admitted = len(state.running) + len(state.parked)
        self._cheap = is_cheap(self._spare_rate(num_admitted), self._pool_tokens)
        self._dear = state.host is None and is_dear(
            *self._forecast.step_cost.alone(self._pool_tokens, state.config.max_step_tokens)
        )

    def growth(self, period_s: float, now: float) -> int:
        """Tokens to leave room for: a block, or those of `period_s` where a block is much of the memory."""
        size, step_s = self._state.block_size, self._speed.step_s
        if step_s <= 0.0 or self.looks_ahead(now):
            return size
        return min(size, int(period_s / step_s) + 2)

    def slack(self, seq: Sequence, now: float) -> float | None:
        """Seconds until its next token is due; None for one that has no deadline, or no token yet."""
        per_token_s = seconds_per_token(seq.tpot_slo_s)
        if seq.first_token_at is None or per_token_s is None:
            return None
        return slack(seq.first_token_at, per_token_s, len(seq.tokens) - seq.first_index, now)

    def is_hopeless(self, seq: Sequence, slack_s: float | None) -> bool:
        """Late at its end even with a token from every step."""
        per_token_s = seconds_per_token(seq.tpot_slo_s)
        if slack_s is None or slack_s >= 0.0 or per_token_s is None:
            return False
        return is_hopeless(slack_s, self._forecast.remaining(seq), per_token_s, self._speed.step_s)

    def _sums(self, now: float) -> Admission:
        """The admitted set, by what each is expected to need."""
        state, size = self._state, self._state.block_size
        admitted = [*state.running, *state.parked]
        host = state.host.num_blocks * size if state.host is not None else 0
        shared = [shared_tokens(state.pool, seq) for seq in admitted]
        twice = sum(shared)  # read by each, held once
        cost, dear = self._forecast.step_cost, self.pauses_are_dear(now)
        room = Room(
            state.pool.num_blocks * size,
            host,
            lambda rows, tokens: cost(rows, tokens + twice),
            0 if dear else self._restorable(admitted, now),
        )
        per_token_s = tightest(admitted, self._forecast)
        z = self._daring.z if dear else self._forecast.safety.z
        admission = Admission(room, z=z, per_token_s=per_token_s)
        rows = min(len(admitted), state.max_num_seqs)
        self._full_step_s = self._speed.seconds(self._forecast.step_cost(rows, room.num_tokens))
        duties = [self._duty(seq, now) for seq in admitted]
        self._seats = sum(duties)
        admission.add_all(
            [len(seq.tokens) - n for seq, n in zip(admitted, shared, strict=True)],
            [seq.max_total - n for seq, n in zip(admitted, shared, strict=True)],
            duties,
            [self._forecast.survival(seq) for seq in admitted],
        )
        return admission

    def _restorable(self, admitted: list[Sequence], now: float) -> int:
        """Tokens of the admitted that need no place: they are computed again, pause by pause."""
        state = self._state
        pause_s = mean_pause(
            [len(seq.tokens) for seq in admitted], [self.slack(seq, now) for seq in admitted]
        )
        if pause_s <= 0.0:
            return 0
        waiting = state.waiting
        wanted = waiting.num_tokens + len(waiting) * self._forecast.mean_output
        return restorable_tokens(self._spare_rate(len(admitted)), pause_s, wanted)

    @property
    def _pool_tokens(self) -> int:
        return self._state.pool.num_blocks * self._state.block_size

    def _spare_rate(self, num_admitted: int) -> float:
        """Rows per second that cost nothing, with the memory full."""
        state = self._state
        rows = min(num_admitted, state.max_num_seqs)
        return self._forecast.step_cost.spare_rate(rows, self._pool_tokens, state.config.max_step_tokens)

    def _duty(self, seq: Sequence, now: float) -> float:
        per_token_s, slack_s = seconds_per_token(seq.tpot_slo_s), self.slack(seq, now)
        if slack_s is None or per_token_s is None or self._dear:
            return self._new_duty(seq)
        # The hopeless count in full: were they left out, newcomers would take their places till all are late.
        remaining = self._forecast.remaining(seq)
        return duty(slack_s, remaining, per_token_s, self._full_step_s, self._state.host is not None)

    def _new_duty(self, seq: Sequence) -> float:
        per_token_s = seconds_per_token(seq.tpot_slo_s)
        if per_token_s is None or self._dear:
            return 1.0
        return min(1.0, PAUSING * self._full_step_s / per_token_s)
