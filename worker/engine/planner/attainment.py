"""How careful admission must be so that enough requests attain their SLO.

The share of those that did sets z, the number of standard deviations that admission keeps free: a closed loop
over whatever the length estimate and the cost model get wrong. What attaining means is the caller's to say.
"""

from __future__ import annotations

from collections import deque

_WINDOW = 64  # finishes
_EVERY = 16  # finishes between two changes
_TARGET = 0.965
_FEW = 2  # late of the last 64
_LONGEST = 1024  # finishes
_UP, _DOWN = 0.5, 0.1
_LEAST, _START, _MOST = 0.0, 1.0, 3.0
_DEAR_TARGET = 0.90  # where memory that is kept empty costs more than a request that is late


class SafetyFactor:
    """z: up by 0.5 while too few attain, else down by 0.1, judged at every 16th finish by the last 64."""

    def __init__(self, start: float = _START, least: float = _LEAST, target: float = _TARGET) -> None:
        self.z = start
        self._least = least
        self._target = target
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
        if self.attainment < self._target:
            self.z = min(_MOST, self.z + _UP)
        else:
            self.z = max(self._least, self.z - _DOWN)


class Daring:
    """Whether to let requests in as long as they fit now, so that some must give way later: as long as few of
    them are late for it. Once more are, a time of care, each longer than the last.

    Care has a z of its own. It begins without a margin, since who does not fit after all loses its tail and
    no more, and takes one when, in times of care, fewer than nine of the last 64 in ten were in time.
    """

    def __init__(self) -> None:
        self.careful = False
        self._care = SafetyFactor(start=0.0, least=-1.0, target=_DEAR_TARGET)
        self._recent: deque[bool] = deque(maxlen=_WINDOW)
        self._left = 0  # finishes until it dares again
        self._unsettled = 0  # of them, of requests that were let in before
        self._length = _WINDOW
        self._since = 0  # finishes since the last time of care

    @property
    def settled(self) -> bool:
        """Who ends now was let in with care."""
        return self.careful and self._unsettled <= 0

    @property
    def z(self) -> float:
        """Standard deviations that care keeps free. What has gone well for long counts for a while when it
        no longer does: the loop's own z goes below 0."""
        return max(0.0, self._care.z)

    def finished(self, attained: bool, num_admitted: int) -> None:
        """A request with an SLO ended by itself, and `num_admitted` are left."""
        if self.settled:
            self._care.finished(attained)
        if self.careful:
            self._unsettled -= 1
            self._left -= 1
            if self._left <= 0:
                self.careful = False
                self._recent.clear()
            return
        self._recent.append(attained)
        self._since += 1
        if self._since >= 2 * self._length:  # it went well for long: the next time of care is short again
            self._length = _WINDOW
        if len(self._recent) - sum(self._recent) > _FEW:
            self.careful, self._since = True, 0
            self._unsettled = num_admitted
            self._left = self._length + num_admitted
            self._length = min(_LONGEST, 2 * self._length)
