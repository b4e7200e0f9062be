"""When a silent worker is given up, how often a request may move, and which prompts are held back.

Pure: time is an argument. Knows nothing of channels or requests' output.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum
from hashlib import blake2b

from ellm.router.config import FailoverConfig
from ellm.worker.api.errors import WorkerFailed
from ellm.worker.api.report import WorkerReport

POISON_S = 600.0
LEARNED_S = 30.0
MAX_POISON = 1024
STANDSTILL_S = 2.0
STANDSTILL_STEPS = 10


class Hearing(Enum):
    """How a worker sounds."""

    HEARD = "heard"
    SUSPECT = "suspect"  # chosen only where nothing else is
    SILENT = "silent"  # given up


def stands_still(report: WorkerReport) -> bool:
    """There is work and no step has ended for far longer than steps take: a device hangs, or a rank is
    frozen. The worker may come round, and its supervisor ends it if not."""
    return report.since_last_step_s > max(STANDSTILL_S, STANDSTILL_STEPS * report.step_time_s)


class SilenceWatch:
    """How long a worker has been silent while this router was listening.

    Silence is added up tick by tick, and a tick counts for two periods at most: time in which our own event
    loop stood still says nothing about the worker, whose messages wait in our sockets.
    """

    __slots__ = ("_config", "_last_tick", "_period_s", "silence_s")

    def __init__(self, config: FailoverConfig, period_s: float, now: float) -> None:
        self._config = config
        self._period_s = period_s
        self._last_tick = now
        self.silence_s = 0.0

    def heard(self) -> None:
        """A message came."""
        self.silence_s = 0.0

    def tick(self, now: float) -> Hearing:
        """Called about every period."""
        self.silence_s += min(now - self._last_tick, 2 * self._period_s)
        self._last_tick = now
        return self.hearing

    @property
    def hearing(self) -> Hearing:
        if self.silence_s >= self._config.fail_s:
            return Hearing.SILENT
        return Hearing.SUSPECT if self.silence_s >= self._config.suspect_s else Hearing.HEARD


class PoisonList:
    """Prompts that were on too many dying workers: they are refused for ten minutes, so that one request
    sent again and again does not end the fleet."""

    def __init__(self) -> None:
        self._until: dict[bytes, float] = {}
        self._own: dict[bytes, float] = {}  # added here

    def add(self, prompt_ids: Sequence[int], now: float) -> None:
        digest = _digest(prompt_ids)
        self._hold(digest, now)
        self._own.pop(digest, None)
        if len(self._own) >= MAX_POISON:
            del self._own[next(iter(self._own))]
        self._own[digest] = now + POISON_S

    def own(self, now: float) -> tuple[bytes, ...]:
        """Those that were added here and are held back still, for the other routers."""
        self._own = {digest: until for digest, until in self._own.items() if until > now}
        return tuple(self._own)

    def learn(self, digests: Iterable[bytes], now: float) -> None:
        """Hold back what other routers hold back, for as long as that is said again and again."""
        for digest in digests:
            self._hold(digest, now, LEARNED_S)

    def _hold(self, digest: bytes, now: float, for_s: float = POISON_S) -> None:
        until = max(now + for_s, self._until.pop(digest, 0.0))
        if len(self._until) >= MAX_POISON:
            del self._until[next(iter(self._until))]
        self._until[digest] = until

    def check(self, prompt_ids: Sequence[int], now: float) -> None:
        """Raises WorkerFailed for a prompt that is held back."""
        if not self._until:
            return
        digest = _digest(prompt_ids)
        until = self._until.get(digest)
        if until is None:
            return
        if until <= now:
            del self._until[digest]
            return
        raise WorkerFailed("workers have died on this prompt; it is held back for some minutes")


def _digest(prompt_ids: Sequence[int]) -> bytes:
    return blake2b(",".join(map(str, prompt_ids)).encode(), digest_size=16).digest()
