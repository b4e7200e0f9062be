"""Where a request's output goes: gathered for one answer, or written to a stream of events as it comes.

Both are told by the readers of workers' streams and never block them; the request's own task waits for them.
A client that reads too slowly is found here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import orjson

from ellm.router.generation import Generation
from ellm.router.openai.answer import DONE, Answer, ChoiceText, error_body, event
from ellm.router.sequence import ScoredToken
from ellm.router.sequence import Sequence as LiveSequence
from ellm.worker.api.errors import EllmError
from ellm.worker.api.output import FinishReason


class Gathered:
    """Keeps everything until all choices have ended."""

    def __init__(self, generation: Generation, answer: Answer) -> None:
        count = generation.job.num_sequences
        self._generation = generation
        self._answer = answer
        self._texts: list[list[str]] = [[] for _ in range(count)]
        self._scored: list[list[ScoredToken]] = [[] for _ in range(count)]
        self._left = count
        self._error: EllmError | None = None
        self._done = asyncio.Event()

    def emit(
        self,
        sequence: LiveSequence,
        text: str,
        token_ids: Sequence[int],
        scored: Sequence[ScoredToken],
        finish_reason: FinishReason | None,
    ) -> None:
        self._texts[sequence.index].append(text)
        self._answer.take(sequence.index, text, token_ids)
        if scored:
            self._scored[sequence.index].extend(scored)
        if finish_reason is not None:
            self._left -= 1
            if not self._left:
                self._done.set()

    def fail(self, sequence: LiveSequence, error: EllmError) -> None:
        self.end(error)

    def end(self, error: EllmError) -> None:
        """The whole request has failed."""
        self._error = self._error or error
        self._done.set()

    async def answer(self) -> bytes:
        """The whole answer as JSON, when all choices have ended. Raises EllmError."""
        await self._done.wait()
        if self._error is not None:
            raise self._error
        sequences = self._generation.sequences
        if self._generation.job.score_only:  # the prompt was scored; what was generated is dropped
            choices = [ChoiceText("", (), (), "length") for _ in sequences]
        else:
            choices = [
                ChoiceText("".join(self._texts[s.index]), s.output_ids, self._scored[s.index], s.finished)
                for s in sequences
            ]
        return self._answer.whole(sequences, choices, self._generation.usage())


class EventStream:
    """Events that wait to be written to one client."""

    def __init__(
        self, generation: Generation, answer: Answer, max_bytes: int, cut_off: Callable[[], None]
    ) -> None:
        """`cut_off` is called once when more than `max_bytes` wait."""
        job = generation.job
        self._generation = generation
        self._answer = answer
        self._max_bytes = max_bytes
        self._cut_off = cut_off
        self._templates = answer.templates() if answer.templated and not job.score_only else None
        self._opened = [False] * job.num_sequences
        self._left = job.num_sequences
        self._waiting: list[bytes] = []
        self._num_waiting = 0  # bytes
        self._started = False  # something was taken: an error can only be an event
        self._sending = False  # what was taken is on its way to the client
        self._num_taken = 0  # times
        self._ended = False
        self._error: EllmError | None = None
        self._loop = asyncio.get_running_loop()
        self._sleeper: asyncio.Future[None] | None = None

    def emit(
        self,
        sequence: LiveSequence,
        text: str,
        token_ids: Sequence[int],
        scored: Sequence[ScoredToken],
        finish_reason: FinishReason | None,
    ) -> None:
        if self._ended:  # failed; what still comes is for nobody
            return
        index = sequence.index
        if not self._opened[index]:
            self._opened[index] = True
            self._put(self._answer.opening(sequence))
        if finish_reason is None and self._templates is not None:
            if text:
                before, after = self._templates[index]
                self._put(before + orjson.dumps(text) + after)
        else:
            self._emit(index, text, token_ids, scored, finish_reason)

    def fail(self, sequence: LiveSequence, error: EllmError) -> None:
        self.end(error)

    def end(self, error: EllmError) -> None:
        """The whole request has failed."""
        if self._ended:
            return
        self._ended = True
        self._error = error
        if self._started:
            self._put(event(error_body(error)) + DONE)
        self._wake()

    def close(self) -> None:
        """Nobody takes events any more."""

    async def first(self) -> bytes:
        """The first events. Raises EllmError when the request failed before there were any."""
        while not self._waiting and self._error is None:
            await self._sleep()
        if self._error is not None:
            raise self._error
        self._started = True
        return self._take()

    async def more(self) -> bytes | None:
        """All events since the last; None at the end."""
        self._sending = False
        while not self._waiting:
            if self._ended and not self._pending:
                return None
            await self._sleep()
        return self._take()

    def _emit(
        self,
        index: int,
        text: str,
        token_ids: Sequence[int],
        scored: Sequence[ScoredToken],
        finish_reason: FinishReason | None,
    ) -> None:
        """A chunk with more than text, or the last of a choice."""
        job = self._generation.job
        if job.score_only:
            text, token_ids, scored, finish_reason = "", (), (), finish_reason and "length"
        with_ids = job.return_token_ids and token_ids
        if finish_reason is not None or text or scored or with_ids or self._answer.parses:
            usage = self._generation.usage() if job.continuous_usage else None
            self._put(self._answer.chunk(index, text, token_ids, scored, finish_reason, usage))
        if finish_reason is not None:
            self._left -= 1
            if not self._left:
                last = self._answer.usage_chunk(self._generation.usage()) if job.include_usage else b""
                self._finish(last + DONE)

    @property
    def _pending(self) -> bool:
        """Something is still to come although the generation has ended."""
        return False

    def _finish(self, data: bytes) -> None:
        """`data` follows the last chunk of all choices."""
        self._put(data)
        self._ended = True

    def _put(self, data: bytes) -> None:
        if not data:
            return
        self._waiting.append(data)
        self._num_waiting += len(data)
        if self._sleeper is not None:
            self._wake()
        elif self._sending and self._num_waiting > self._max_bytes:
            self._max_bytes = 1 << 62  # once
            self._cut_off()

    def _take(self) -> bytes:
        waiting = self._waiting
        data = waiting[0] if len(waiting) == 1 else b"".join(waiting)
        waiting.clear()
        self._num_waiting = 0
        self._num_taken += 1
        self._sending = True  # until `more` is called: what comes meanwhile waits for the client
        return data

    def _wake(self) -> None:
        sleeper, self._sleeper = self._sleeper, None
        if sleeper is not None and not sleeper.done():  # it may be cancelled, with its task not yet told
            sleeper.set_result(None)

    async def _sleep(self) -> None:
        self._sleeper = self._loop.create_future()  # one per sleep: an Event costs more
        await self._sleeper

    @property
    def sending(self) -> int:
        """Which of all that was taken is on its way to the client; 0: none."""
        return self._num_taken if self._sending else 0


class StallWatch:
    """Finds a client that takes nothing at all of what is sent to it; `cancel` must follow.

    The bound on what waits finds one that falls behind while there is output. This finds one that stops to
    read at the end, when nothing more comes to wait: its request would stay counted for ever.
    """

    def __init__(self, stream: EventStream, period_s: float, cut_off: Callable[[], None]) -> None:
        """It is cut off when one send takes longer than a period, and then within another."""
        self._stream = stream
        self._period_s = period_s
        self._cut_off = cut_off
        self._seen = 0
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(period_s, self._look)

    def cancel(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        sending = self._stream.sending
        if sending and sending == self._seen:
            self._cut_off()
            return
        self._seen = sending
        self._timer = self._loop.call_later(self._period_s, self._look)
