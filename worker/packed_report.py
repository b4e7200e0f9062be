"""One report for all routers: packed once, not once for each of them."""

from __future__ import annotations

from collections.abc import Callable

from ellm.worker.api import wire
from ellm.worker.api.report import WorkerReport


class PackedReport:
    """Time is an argument."""

    def __init__(self, max_age_s: float) -> None:
        """`max_age_s`: parts of a report tell of the moment at which it is packed."""
        self._max_age_s = max_age_s
        self._key: tuple[int, str] | None = None
        self._packed_at = 0.0
        self._packed: wire.Message = ()

    def get(self, key: tuple[int, str], make: Callable[[], WorkerReport], now: float) -> wire.Message:
        """What `make` returns, as a part of a STEP message; made again once `key` or the time says so."""
        if key != self._key or now - self._packed_at >= self._max_age_s:
            self._packed = wire.pack_report(make())
            self._key, self._packed_at = key, now
        return self._packed
