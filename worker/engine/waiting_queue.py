"""Who waits: bounded, by priority, then first come first served.

A preempted sequence keeps the arrival number it had, so it comes back in front of everyone of its priority
who has not run yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heappop, heappush

from ellm.worker.engine.sequence import Sequence, SequenceState

_SLACK = 64  # dead entries that are not worth a clean-up


class WaitingQueue:
    """A heap with lazy deletion: push and pop O(log n), discard O(1) amortised."""

    def __init__(self, max_waiting: int) -> None:
        self.max_waiting = max_waiting
        self._heap: list[tuple[int, int, Sequence]] = []
        self._num_live = 0
        self._num_tokens = 0

    def __len__(self) -> int:
        return self._num_live

    def __iter__(self) -> Iterator[Sequence]:
        """Live sequences in no particular order."""
        return (seq for _, _, seq in self._heap if seq.state is not SequenceState.FINISHED)

    @property
    def full(self) -> bool:
        """No room for another request; a preempted sequence always has room."""
        return self._num_live >= self.max_waiting

    @property
    def num_tokens(self) -> int:
        """Prompt tokens of all who wait."""
        return self._num_tokens

    def push(self, seq: Sequence) -> None:
        heappush(self._heap, (*seq.key, seq))
        self._num_live += 1
        self._num_tokens += seq.num_prompt

    def peek(self) -> Sequence | None:
        heap = self._heap
        while heap and heap[0][2].state is SequenceState.FINISHED:
            heappop(heap)
        return heap[0][2] if heap else None

    def pop(self) -> Sequence:
        """Remove and return what `peek` has just shown."""
        seq = heappop(self._heap)[2]
        assert seq.state is not SequenceState.FINISHED
        self._forget(seq)
        return seq

    def discard(self, seq: Sequence) -> None:
        """`seq`, which waits here, has just become FINISHED."""
        assert seq.state is SequenceState.FINISHED
        self._forget(seq)
        if len(self._heap) > 2 * self._num_live + _SLACK:
            self._heap = [entry for entry in self._heap if entry[2].state is not SequenceState.FINISHED]
            heapify(self._heap)

    def _forget(self, seq: Sequence) -> None:
        self._num_live -= 1
        self._num_tokens -= seq.num_prompt

    def check(self) -> None:
        """Raise AssertionError unless the counters agree with the heap."""
        live = list(self)
        assert len(live) == self._num_live, "queue: wrong number of live sequences"
        assert len({id(seq) for seq in live}) == len(live), "queue: a sequence waits twice"
        assert sum(seq.num_prompt for seq in live) == self._num_tokens, "queue: wrong number of tokens"
        allowed = (SequenceState.WAITING, SequenceState.PREEMPTED)
        assert all(seq.state in allowed for seq in live), "queue: a sequence waits and runs"
