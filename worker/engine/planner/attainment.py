"""Who met its SLO, counted token by token, and how careful admission must be so that enough do.

A request attains its SLO if its token i, from 0, comes by t_first + SLO * (i + 4) for every i, and its first
within the TTFT SLO where it has one. The share of those that did sets z, the number of standard deviations
that admission keeps free: a closed loop over whatever the length estimate and the cost model get wrong.
"""

from __future__ import annotations

from collections import deque

GRACE = 4  # tokens that any one may be behind the schedule

_WINDOW = 64  # finishes
_EVERY = 16  # finishes between two changes
_TARGET = 0.965
_UP, _DOWN = 0.5, 0.1
_LEAST, _START, _MOST = 0.0, 1.0, 3.0


def is_late(index: int, first_token_at: float, tpot_slo_s: float, now: float) -> bool:
    """Whether output token `index` came too late, now being when it came."""
    return now > first_token_at + tpot_slo_s * (index + GRACE)


class Punctuality:
    """One request: late once, late for good."""

    __slots__ = ("first_token_at", "late", "tpot_slo_s", "ttft_slo_s")

    def __init__(self, tpot_slo_s: float | None, ttft_slo_s: float | None = None) -> None:
        self.tpot_slo_s = tpot_slo_s
        self.ttft_slo_s = ttft_slo_s
        self.first_token_at: float | None = None
        self.late = False

    def emitted(self, index: int, arrived_at: float, now: float) -> None:
        """Output token `index` came now. Tokens of a former residence elsewhere need not be told."""
        if self.first_token_at is None:
            self.first_token_at = now - (self.tpot_slo_s or 0.0) * index  # resumed: as if it had been on time
            if self.ttft_slo_s is not None and index == 0 and now - arrived_at > self.ttft_slo_s:
                self.late = True
        elif self.tpot_slo_s is not None and not self.late:
            self.late = is_late(index, self.first_token_at, self.tpot_slo_s, now)


class SafetyFactor:
    """z: up by 0.5 while too few attain, else down by 0.1, judged at every 16th finish by the last 64."""

    def __init__(self) -> None:
        self.z = _START
        self._recent: deque[bool] = deque(maxlen=_WINDOW)
        self._num_attained = 0
        self._since = 0

    @property
    def attainment(self) -> float:
        """Of the last 64 finishes; 1 before the first."""
        return self._num_attained / len(self._recent) if self._recent else 1.0

    def finished(self, attained: bool) -> None:
        """A request with an SLO ended by itself."""
        if len(self._recent) == _WINDOW:
            self._num_attained -= self._recent[0]
        self._recent.append(attained)
        self._num_attained += attained
        self._since += 1
        if self._since < _EVERY:
            return
        self._since = 0
        if self.attainment < _TARGET:
            self.z = min(_MOST, self.z + _UP)
        else:
            self.z = max(_LEAST, self.z - _DOWN)
