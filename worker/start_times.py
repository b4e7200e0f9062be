"""What a worker's start took, by phase: its process, importing, weights, warm-up.

The phases are those that loading reports anyway; each lasts until the next one begins. Only durations are
kept: they cross nodes. Time before this process could count is told by whoever waited for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

PROCESS = "process"  # from the request for a process until it loads


class StartTimes:
    """One writer at a time; reading is safe from any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Begins in the phase PROCESS."""
        self._clock = clock
        self._begun = self._since = clock()
        self._phase = PROCESS
        self._seconds: dict[str, float] = {PROCESS: 0.0}

    def enter(self, phase: str) -> None:
        """The next phase begins; one that goes on may be entered again."""
        if phase != self._phase:
            self._count()
            self._phase = phase

    def waited(self, seconds: float) -> None:
        """Somebody has waited so long for this process and all it has done so far."""
        self._seconds[PROCESS] += max(0.0, seconds - (self._clock() - self._begun))

    def seconds(self) -> tuple[tuple[str, float], ...]:
        """(phase, seconds) in the order in which they began, the present one up to now."""
        self._count()
        return tuple(self._seconds.items())

    def _count(self) -> None:
        now = self._clock()
        self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + now - self._since
        self._since = now
