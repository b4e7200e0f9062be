"""Whether one more request fits, now and as everybody grows.

For each horizon h, in tokens that everyone puts out from now on, the requests still there hold f = s + h
tokens each, at most what their max_tokens allow, with probability q; of them a share d (duty) is in device
memory and in the step at a time. With N the device's tokens and D the seconds allowed per token:

    (a)  sum d q f + z sqrt(sum d^2 q (1 - q) f^2) <= 0.95 Ne      Ne: tokens at which T is 0.985 D, <= N
    (b)  T(sum d q rows and the prefill that comes with them, sum d q f) <= 0.985 D
    (c)  sum q f <= 0.95 (N + host) + restorable               paused ones need a place too

(a) is the expected peak with z standard deviations, outputs being independent. Without (b) or (c) single
settings collapse: steps too long for anybody's deadline, and dropping that feeds on itself. What is
restorable needs no place: it is dropped in every pause and computed again in rows that cost nothing.

It does not know who the requests are, nor why one has the duty it has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt

from ellm.worker.engine.planner.lengths import HORIZONS
from ellm.worker.engine.planner.slack import GUARD_S

StepTime = Callable[[float, float], float]  # (decode rows, KV tokens read) -> seconds

_MEMORY = 0.95  # of the capacity
TIMELY = 0.985  # of the deadline
_BISECTIONS = 12  # the capacity is found to 1 / 4096 of it


@dataclass(frozen=True, slots=True)
class Room:
    """What there is to share out."""

    num_tokens: int  # of the device's pool
    num_host_tokens: int  # of the host tier
    step_time: StepTime  # with the share of prompts that decode rows bring along
    num_restorable_tokens: int = 0  # without a place: see `restorable_tokens`


def timely_tokens(room: Room, limit_s: float, rows: float) -> int:
    """The most KV tokens that a step of `rows` may read and take no longer than `limit_s`; at most the
    pool."""
    if room.step_time(rows, room.num_tokens) <= limit_s:
        return room.num_tokens
    low, high = 0.0, float(room.num_tokens)
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        if room.step_time(rows, middle) <= limit_s:
            low = middle
        else:
            high = middle
    return int(low)


def restorable_tokens(spare_rate: float, pause_s: float, num_waiting_tokens: float) -> int:
    """Tokens that need no place anywhere, of requests that pause for `pause_s` at a time: each is computed
    again once per pause, and `spare_rate` of them can be per second at no cost.

    That serves a burst. A queue that it cannot empty would only keep everybody rotating, for no gain to those
    at its end: what is waiting beyond all that is taken off.
    """
    return int(max(0.0, spare_rate * pause_s - num_waiting_tokens))


def is_cheap(spare_rate: float, num_tokens: int) -> bool:
    """Whether all of a memory of `num_tokens` can be computed again within the guard's second, at the
    `spare_rate` per second that costs nothing. Then looking ahead only leaves memory empty: who must give way
    comes back for nothing, in time."""
    return spare_rate * GUARD_S >= num_tokens


def is_dear(spare_rate: float, output_rate: float) -> bool:
    """Whether to compute again what a pause drops takes the place of tokens that could be put out: fewer rows
    are spare than those, both per second. Then taking turns only burns time."""
    return spare_rate < output_rate


class Admission:
    """The admitted set as sums by horizon: built by `add_all` and `add`, O(horizons) per request, as
    `admits` is.

    `per_token_s` is the tightest of the admitted set, None where nobody has an SLO: then (b) does not apply
    and Ne is N. So is one that not even a lone request could meet: turning everybody else away would help
    nobody.
    """

    def __init__(
        self, room: Room, *, z: float, per_token_s: float | None, horizons: Sequence[int] = HORIZONS
    ) -> None:
        self.room = room
        self.z = z
        self._horizons = tuple(horizons)
        self._per_token_s: float | None = None
        self._timely: int | None = room.num_tokens  # None: not known for the deadline of now
        size = len(self._horizons)
        self._rows = [0.0] * size  # sum d q
        self._active = [0.0] * size  # sum d q f
        self._variance = [0.0] * size  # sum d^2 q (1 - q) f^2
        self._held = [0.0] * size  # sum q f
        self._tighten(per_token_s)

    @property
    def timely_tokens(self) -> int:
        """Ne, by the rows of those added when it is first asked for."""
        if self._timely is None:
            assert self._per_token_s is not None
            self._timely = timely_tokens(self.room, TIMELY * self._per_token_s, max(1.0, self._rows[0]))
        return self._timely

    def add(self, num_tokens: int, max_total: int, duty: float, survival: Sequence[float]) -> None:
        """A request with `num_tokens` of context, which never holds more than `max_total`, joins. `survival`
        is q by horizon, as `OutputLengths.conditional` gives it."""
        self.add_all((num_tokens,), (max_total,), (duty,), (survival,))

    def add_all(
        self,
        num_tokens: Sequence[int],
        max_totals: Sequence[int],
        duties: Sequence[float],
        survivals: Sequence[Sequence[float]],
    ) -> None:
        """Many join, each given by its place in the four: half the time of adding them one by one."""
        if not num_tokens:
            return
        for index, (h, column) in enumerate(zip(self._horizons, zip(*survivals, strict=True), strict=True)):
            if not any(column):
                return
            rows = active = variance = held = 0.0
            for s, most, d, q in zip(num_tokens, max_totals, duties, column, strict=True):
                f = s + h
                if f > most:
                    f = most
                x = d * f
                y = q * x
                rows += d * q
                active += y
                variance += y * (x - y)
                held += q * f
            self._rows[index] += rows
            self._active[index] += active
            self._variance[index] += variance
            self._held[index] += held

    def admits(
        self,
        num_tokens: int,
        max_total: int,
        duty: float,
        survival: Sequence[float],
        per_token_s: float | None = None,
    ) -> bool:
        """Whether (a), (b) and (c) hold with this request added, at every horizon. A request tighter than all
        before it makes the tests tighter from then on, whether it is added or not."""
        if per_token_s is not None and (self._per_token_s is None or per_token_s < self._per_token_s):
            self._tighten(per_token_s)
        room, z = self.room, self.z
        most_active = _MEMORY * self.timely_tokens
        most_held = _MEMORY * (room.num_tokens + room.num_host_tokens) + room.num_restorable_tokens
        rows, active = [], []
        sums = zip(
            self._horizons, survival, self._rows, self._active, self._variance, self._held, strict=True
        )
        for h, q, others, tokens, spread, held in sums:
            f = min(num_tokens + h, max_total)
            x = duty * f
            y = q * x
            tokens += y
            spread += y * (x - y)
            if tokens + z * sqrt(max(0.0, spread)) > most_active or held + q * f > most_held:
                return False
            rows.append(others + duty * q)
            active.append(tokens)
        return self._in_time(rows, active)

    def _in_time(self, rows: list[float], active: list[float]) -> bool:
        """(b). Mostly the largest rows and the largest context together pass, and one prediction is
        enough."""
        if self._per_token_s is None:
            return True
        limit_s, step_time = TIMELY * self._per_token_s, self.room.step_time
        if step_time(max(rows), max(active)) <= limit_s:
            return True
        return all(step_time(n, tokens) <= limit_s for n, tokens in zip(rows, active, strict=True))

    def _tighten(self, per_token_s: float | None) -> None:
        if per_token_s is None:
            return
        if self.room.step_time(1.0, 0.0) <= TIMELY * per_token_s:
            self._per_token_s = per_token_s
            self._timely = None
