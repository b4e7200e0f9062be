"""Aborts that came before the request they are for: the request is dead on arrival.

Messages of one router may overtake one another; an abort is never lost for it.
"""

from __future__ import annotations

from collections import OrderedDict

TTL_S = 60.0  # far longer than two messages of one router can lie apart
MAX_TOMBSTONES = 65_536


class Tombstones:
    """(request id, attempt) pairs, each kept for `TTL_S`; the oldest go first when there are too many."""

    def __init__(self) -> None:
        self._stones: OrderedDict[str, tuple[int, float]] = OrderedDict()  # id -> (attempt, expiry)

    def __len__(self) -> int:
        return len(self._stones)

    def put(self, request_id: str, attempt: int, now: float) -> None:
        """No attempt up to `attempt` may start any more."""
        former = self._stones.pop(request_id, (attempt, 0.0))[0]
        self._stones[request_id] = (max(attempt, former), now + TTL_S)
        while len(self._stones) > MAX_TOMBSTONES or next(iter(self._stones.values()))[1] <= now:
            self._stones.popitem(last=False)

    def covers(self, request_id: str, attempt: int, now: float) -> bool:
        """Whether this attempt was aborted before it came."""
        stone = self._stones.get(request_id)
        return stone is not None and attempt <= stone[0] and now < stone[1]
