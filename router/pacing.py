"""When a chunk of a stream may go to its client: tokens that come ahead of their SLO are released evenly.

A worker computes some tokens well ahead of their time and then pauses the request while others need its
memory. Passed on as they come, that reads as a burst and a silence. Here token i of a sequence is due at

    origin + RATE * SLO * i - LEAD_S        (never before the origin, which is when the first token came)

and is released when it is due or when it comes, whichever is later. So pacing alone never makes a token late:
it is always due before t_first + SLO * i. RATE lies between what the worker's planner aims at (0.97 of the
SLO: a faster release would use up what is held before a paused request goes on) and 1; LEAD_S is for timers
and for the way to the client.

At most so many tokens are held, by number and by the seconds that they last at this rate. When more come, the
oldest goes at once and the origin moves earlier by what it was ahead: those behind keep their distance, and
the stream flows as fast as tokens come. The end of the output changes nothing: what is held goes on evenly,
so a client waits for at most those seconds.

Pure: time is an argument. Knows neither text nor sockets.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

RATE = 0.98
LEAD_S = 0.005
ROUNDING_S = 1e-6  # of sums of clock readings

Chunk = TypeVar("Chunk")


class PacedQueue(Generic[Chunk]):
    """The chunks of one sequence that wait for their moment, oldest first."""

    __slots__ = ("_held", "_interval_s", "_max_tokens", "_origin")

    def __init__(self, first_token_at: float, slo_s: float, max_hold_s: float, max_hold_tokens: int) -> None:
        self._origin = first_token_at
        self._interval_s = RATE * slo_s
        self._max_tokens = min(max_hold_tokens, int(max_hold_s / self._interval_s))
        self._held: deque[tuple[int, Chunk]] = deque()

    def __len__(self) -> int:
        return len(self._held)

    @property
    def due_at(self) -> float | None:
        """Of the oldest chunk; None where none is held."""
        return self._origin + self._after(self._held[0][0]) if self._held else None

    def push(self, chunk: Chunk, first: int, end: int, now: float) -> None:
        """A chunk has come with the text of the output's tokens [first, end). It is due with the first of
        them. With none it belongs to the token before it."""
        self._held.append((first if first < end else max(0, end - 1), chunk))
        too_many = end - 1 - self._max_tokens  # tokens up to this one are not held any longer
        if too_many >= 0:
            self._origin = min(self._origin, now - self._after(too_many))

    def pop_oldest(self, now: float) -> Chunk:
        """Take out the oldest chunk before its time; those behind it keep their distance."""
        index, chunk = self._held.popleft()
        self._origin = min(self._origin, now - self._after(index))
        return chunk

    def pop(self, now: float) -> Iterator[Chunk]:
        """Take out what is due."""
        held = self._held
        while held and self._origin + self._after(held[0][0]) <= now + ROUNDING_S:
            yield held.popleft()[1]

    def flush(self) -> Iterator[Chunk]:
        """Take out everything."""
        while self._held:
            yield self._held.popleft()[1]

    def _after(self, index: int) -> float:
        return max(0.0, self._interval_s * index - LEAD_S)
