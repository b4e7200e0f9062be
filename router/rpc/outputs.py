"""Where a call's output goes: what has come of each choice since the last message, bounded in bytes.

Told by the readers of workers' streams, which it never blocks. What comes while a message is on its way is
joined to one message per choice, so a client that falls behind gets fewer and longer ones; one that falls
behind by more than the bound is cut off. Knows no protobuf.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ellm.router.sequence import ScoredToken
from ellm.router.sequence import Sequence as LiveSequence
from ellm.worker.api.errors import EllmError
from ellm.worker.api.output import FinishReason

_SCORE_BYTES = 32  # of one score on the wire, about


@dataclass(slots=True)
class Delta:
    """New output of one choice."""

    sequence: LiveSequence
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    scored: list[ScoredToken] = field(default_factory=list)
    finish_reason: FinishReason | None = None


class Outputs:
    """A sink. `whole`: nothing is handed out before all choices have ended, and nothing is bounded."""

    def __init__(self, count: int, max_bytes: int, cut_off: Callable[[], None], *, whole: bool) -> None:
        """`cut_off` is called once when more than `max_bytes` wait for a client that reads."""
        self._left = count
        self._max_bytes = max_bytes
        self._cut_off = cut_off
        self._whole = whole
        self._waiting: dict[int, Delta] = {}
        self._num_waiting = 0  # bytes, about
        self._sending = False  # what was handed out is on its way to the client
        self._error: EllmError | None = None
        self._sleeper: asyncio.Future[None] | None = None

    def emit(
        self,
        sequence: LiveSequence,
        text: str,
        token_ids: Sequence[int],
        scored: Sequence[ScoredToken],
        finish_reason: FinishReason | None,
    ) -> None:
        if self._error is not None:
            return
        delta = self._waiting.get(sequence.index)
        if delta is None:
            delta = self._waiting[sequence.index] = Delta(sequence)
        delta.texts.append(text)
        delta.token_ids.extend(token_ids)
        delta.scored.extend(scored)
        self._num_waiting += len(text) + 3 * len(token_ids) + sum(map(_size, scored))
        if finish_reason is not None:
            delta.finish_reason = finish_reason
            self._left -= 1
        if not self._whole or not self._left:
            self._wake()
        if self._sending and self._num_waiting > self._max_bytes:
            self._max_bytes = 1 << 62  # once
            self._cut_off()

    def fail(self, sequence: LiveSequence, error: EllmError) -> None:
        self._error = self._error or error
        self._wake()

    async def more(self) -> list[Delta]:
        """All since the last call, a choice once; [] at the end. Raises EllmError behind what there was."""
        self._sending = False
        while not self._waiting or (self._whole and self._left and self._error is None):
            if self._error is not None:
                raise self._error
            if not self._left:
                return []
            self._sleeper = asyncio.get_running_loop().create_future()
            await self._sleeper
        if self._whole and self._error is not None:
            raise self._error
        found = [self._waiting[index] for index in sorted(self._waiting)]
        self._waiting.clear()
        self._num_waiting = 0
        self._sending = True  # until the next call
        return found

    def drop(self) -> None:
        """Nobody takes what waits."""
        self._waiting.clear()

    def _wake(self) -> None:
        sleeper, self._sleeper = self._sleeper, None
        if sleeper is not None and not sleeper.done():
            sleeper.set_result(None)


def _size(scored: ScoredToken) -> int:
    return _SCORE_BYTES * (1 + (0 if scored.logprobs is None else len(scored.logprobs.top)))
