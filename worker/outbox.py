"""Outbox: what one worker owes one router, and when the router was heard last.

Holds the router's live requests and the outputs that its stream has not taken yet. Short steps that wait are
merged, so that a full outbox always means a router that has taken nothing for about a whole lease, however
fast the engine steps. Time is an argument; it wakes whoever waits through a future of the running loop.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence

from ellm.worker.api.output import SequenceOutput


class _Item:
    """Outputs that go out in one message."""

    __slots__ = ("opened_at", "outputs")

    def __init__(self, outputs: list[SequenceOutput], opened_at: float) -> None:
        self.outputs = outputs
        self.opened_at = opened_at


class Outbox:
    """Used on the front's event loop alone."""

    def __init__(self, router_id: str, tenure: int, max_items: int, lease_s: float, now: float) -> None:
        self.router_id = router_id
        self.tenure = tenure  # which arrival of the router this is for
        self.live: dict[str, int] = {}  # request id -> attempt
        self.last_heard = now
        self.last_sent = now
        self.report_due = True
        self.report_seq = 0  # of the last report that was sent
        self.closed = False
        self.seq = 0  # of the next message
        self.stream = 0  # how often a stream was opened; the newest alone may take
        self._items: deque[_Item] = deque()
        self._max_items = max_items
        self._lease_s = lease_s
        self._window_s = lease_s / max_items
        self._waiter: asyncio.Future[None] | None = None

    @property
    def num_items(self) -> int:
        return len(self._items)

    def fault(self, now: float) -> str | None:
        """Why this router cannot be served any more."""
        if now - self.last_heard > self._lease_s:
            return "is silent"
        return f"lags {self.num_items} items behind" if self.lags(now) else None

    def lags(self, now: float) -> bool:
        """The router is further behind than it may: in items, or by the age of the oldest."""
        items = self._items
        return len(items) > self._max_items or bool(items and now - items[0].opened_at > self._lease_s)

    def put(self, outputs: Sequence[SequenceOutput], now: float) -> None:
        """Add one step's outputs."""
        if self._items and now - self._items[-1].opened_at < self._window_s:
            self._items[-1].outputs += outputs
        else:
            self._items.append(_Item(list(outputs), now))
        self.wake()

    def make_report_due(self) -> None:
        """The next message carries a report, and goes out now."""
        self.report_due = True
        self.wake()

    def open(self) -> int:
        """A new stream takes over; the former one ends. Returns the new one's number."""
        self.stream += 1
        self.report_due = True
        self.wake()
        return self.stream

    def close(self) -> None:
        """Every stream ends; what was not taken is lost."""
        self.closed = True
        self._items.clear()
        self.wake()

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self, stream: int) -> list[SequenceOutput] | None:
        """The oldest item, or nothing but the wish for a report ([]); None when this stream is over."""
        while not self.closed and stream == self.stream:
            if self._items:
                return self._items.popleft().outputs
            if self.report_due:
                return []
            waiter = asyncio.get_running_loop().create_future()
            self._waiter = waiter
            await waiter
        return None
