"""A stream of events whose chunks wait until they are due: see `pacing`. One timer for all its choices.

A chunk is made when its tokens come, so usage and log-probabilities say what they say without pacing. What is
held is bounded in tokens, in seconds and in bytes; a client that reads too slowly is found as in any stream,
by what was released to it. An error, or the request's deadline, lets go of everything first: a client never
loses a token that was there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from ellm.router.config import RouterConfig
from ellm.router.generation import Generation
from ellm.router.openai.answer import Answer
from ellm.router.pacing import PacedQueue
from ellm.router.sequence import ScoredToken
from ellm.router.sequence import Sequence as LiveSequence
from ellm.router.sinks import EventStream
from ellm.worker.api.errors import EllmError
from ellm.worker.api.output import FinishReason

TICK_S = 0.001  # no timer is shorter


class PacedStream(EventStream):
    """An EventStream that holds chunks back. `close` must follow."""

    def __init__(
        self,
        generation: Generation,
        answer: Answer,
        config: RouterConfig,
        cut_off: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        """`clock` is that of the sequences' times; the job's SLO is set."""
        self._max_held_bytes = config.limits.max_client_buffer_bytes
        super().__init__(generation, answer, self._max_held_bytes, cut_off)
        slo_s = generation.job.level.tpot_slo_s
        assert slo_s is not None, "a stream without an SLO has no pace"
        self._slo_s = slo_s
        self._config = config
        self._clock = clock
        self._queues: dict[int, PacedQueue[bytes]] = {}  # by choice
        self._next_token = [0] * generation.job.num_sequences  # the oldest that is in no chunk yet
        self._made: list[bytes] | None = None  # what `emit` is making now
        self._tail = b""  # what follows the last chunk of all
        self._num_held = 0
        self._held_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._fires_at = 0.0

    def emit(
        self,
        sequence: LiveSequence,
        text: str,
        token_ids: Sequence[int],
        scored: Sequence[ScoredToken],
        finish_reason: FinishReason | None,
    ) -> None:
        if self._ended:
            return
        made: list[bytes] = []
        self._made = made
        try:
            super().emit(sequence, text, token_ids, scored, finish_reason)
        finally:
            self._made = None
        now = self._clock()
        if made:
            self._hold(sequence, b"".join(made), now)
        if not self._num_held:
            self._put_tail()

    def end(self, error: EllmError) -> None:
        for queue in self._queues.values():
            for data in queue.flush():
                self._pass_on(data)
        self._put_tail()
        super().end(error)  # of a generation that has ended, nothing but its pace was left: no error

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _hold(self, sequence: LiveSequence, data: bytes, now: float) -> None:
        """Until it is due, which may be now."""
        index = sequence.index
        queue = self._queues.get(index)
        if queue is None:
            hold = (self._config.pace_max_hold_s, self._config.pace_max_hold_tokens)
            queue = self._queues[index] = PacedQueue(sequence.first_token_at or now, self._slo_s, *hold)
        end = len(sequence.output_ids)
        queue.push(data, self._next_token[index], end, now)
        self._next_token[index] = end
        self._num_held += 1
        self._held_bytes += len(data)
        for due in queue.pop(now):
            self._pass_on(due)
        while self._held_bytes > self._max_held_bytes and queue:
            self._pass_on(queue.pop_oldest(now))
        due_at = queue.due_at
        if due_at is not None and (self._timer is None or due_at < self._fires_at):
            self._set_timer(due_at, now)

    def _pass_on(self, data: bytes) -> None:
        self._num_held -= 1
        self._held_bytes -= len(data)
        self._put(data)

    def _put_tail(self) -> None:
        """Empty until the generation has ended."""
        tail, self._tail = self._tail, b""
        self._put(tail)

    def _set_timer(self, due_at: float, now: float) -> None:
        """It fires when the first chunk of all choices is due."""
        self.close()
        self._fires_at = due_at
        self._timer = self._loop.call_later(max(TICK_S, due_at - now), self._fire)

    def _fire(self) -> None:
        self._timer = None
        now = self._clock()
        for queue in self._queues.values():
            for data in queue.pop(now):
                self._pass_on(data)
        due = [queue.due_at for queue in self._queues.values() if queue.due_at is not None]
        if due:
            self._set_timer(min(due), now)
        else:
            self._put_tail()

    # What EventStream makes passes through here.

    @property
    def _pending(self) -> bool:
        return self._num_held > 0

    def _put(self, data: bytes) -> None:
        if self._made is not None:
            if data:
                self._made.append(data)
        else:
            super()._put(data)

    def _finish(self, data: bytes) -> None:
        self._tail = data
        self._ended = True
