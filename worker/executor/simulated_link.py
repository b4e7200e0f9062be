"""Copies between two simulated memories: when each ends, and what it moved.

The two directions run beside each other and beside the steps; copies of one direction one after the other, in
the order in which they were asked for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from ellm.worker.engine.plan import BlockCopy, CopyTimes


@dataclass(frozen=True, slots=True)
class LinkSpeed:
    """seconds = latency + bytes / rate for each copy of a block."""

    bytes_per_s: float = 25e9
    latency_s: float = 0.0


class SimulatedLink:
    """Knows its own clock: the sum of the steps' durations."""

    def __init__(self, speed: LinkSpeed, block_bytes: int) -> None:
        self._seconds = speed.latency_s + block_bytes / speed.bytes_per_s
        self._block_bytes = block_bytes
        self.saves: deque[tuple[float, BlockCopy]] = deque()  # (end, copy)
        self.loads: deque[tuple[float, BlockCopy]] = deque()
        self._free_at = {True: 0.0, False: 0.0}

    def seconds(self, num_blocks: int) -> float:
        """How long that many blocks take."""
        return num_blocks * self._seconds

    def start(self, copies: Iterable[BlockCopy], now: float, *, save: bool) -> None:
        queue = self.saves if save else self.loads
        for copy in copies:
            end = max(now, self._free_at[save]) + self._seconds
            self._free_at[save] = end
            queue.append((end, copy))

    @property
    def next_end(self) -> float | None:
        """When the next copy ends; None if none is under way."""
        ends = [queue[0][0] for queue in (self.saves, self.loads) if queue]
        return min(ends) if ends else None

    @property
    def last_end(self) -> float:
        """When all copies have ended."""
        return max(self._free_at.values())

    def ended(self, now: float) -> tuple[list[BlockCopy], list[BlockCopy], CopyTimes | None]:
        """Saves and loads that have ended by `now`, each once."""
        lists: list[list[BlockCopy]] = []
        for queue in (self.saves, self.loads):
            done: list[BlockCopy] = []
            while queue and queue[0][0] <= now:
                done.append(queue.popleft()[1])
            lists.append(done)
        saved, loaded = len(lists[0]), len(lists[1])
        if not saved and not loaded:
            return [], [], None
        size, seconds = self._block_bytes, self._seconds
        return lists[0], lists[1], CopyTimes(saved * size, saved * seconds, loaded * size, loaded * seconds)
