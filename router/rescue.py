"""What becomes of sequences whose worker is lost, goes, or has no room: they move, wait, or end.

Deaths of workers count against a sequence, anything else does not: a prompt that kills what runs it must not
kill the fleet, and a fleet that is rolled over must lose nobody. Whoever was taken once waits for a worker as
long as `hold_s`; a new request that no worker has room for is refused with the shortest time that any of them
named.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Protocol

from ellm.router.config import FailoverConfig
from ellm.router.errors import typed_error
from ellm.router.failover import PoisonList
from ellm.router.sequence import Sequence as LiveSequence
from ellm.worker.api.errors import EllmError, QueueFull, Unavailable, WorkerFailed

log = logging.getLogger(__name__)

MOVE_PAUSE_S = 0.02
MAX_PAUSE_S = 1.0
MAX_MOVES = 16  # free ones included: a request that every worker gives back must end
HANDED_BACK = Unavailable.code  # with which a draining worker gives a request back


class Rescuer(Protocol):
    """The dispatcher, as it is seen from here."""

    def clock(self) -> float: ...

    def count_move(self, reason: str) -> None: ...

    def end(self, sequence: LiveSequence, error: EllmError) -> None:
        """End a sequence with an error, once."""
        ...

    def has_room_elsewhere(self, avoid: set[str]) -> bool:
        """A worker takes requests that is none of `avoid` (epochs)."""
        ...

    def spawn(self, work: Coroutine[Any, Any, None]) -> None: ...


class Rescue:
    """One per dispatcher; `place` brings a sequence to a worker, waiting for one if need be."""

    def __init__(
        self,
        owner: Rescuer,
        config: FailoverConfig,
        place: Callable[[LiveSequence], Awaitable[None]],
    ) -> None:
        self.poison = PoisonList()
        self._owner = owner
        self._config = config
        self._place = place
        self._placing: dict[str, asyncio.Task[None]] = {}  # request id -> who looks for a worker for it

    def forget(self, sequence: LiveSequence) -> None:
        """It has ended: nobody looks for a worker for it any more."""
        placing = self._placing.pop(sequence.request_id, None)
        if placing is not None:
            placing.cancel()

    def refused(self, sequence: LiveSequence, epoch: str) -> None:
        """A worker gives a sequence back with an error, or without one."""
        error, sequence.error = sequence.error, None
        code = error[0] if isinstance(error, tuple) else None
        if error is None or code == HANDED_BACK:
            self.move([sequence], "drain", death=False)
        elif code == QueueFull.code:
            sequence.attempt += 1
            sequence.avoid.add(epoch)
            sequence.note("moved", self._owner.clock(), "full")
            self._owner.count_move("full")
            self._owner.spawn(self._find_room(sequence, typed_error(error, sequence.retry_after_s)))
        else:
            self._owner.end(sequence, typed_error(error, sequence.retry_after_s))

    def move(self, sequences: Sequence[LiveSequence], reason: str, *, death: bool) -> None:
        """Place sequences anew, those that may."""
        for sequence in sequences:
            if sequence.finished is not None:
                continue
            sequence.attempt += 1
            sequence.num_moves += 1
            sequence.num_deaths += death
            sequence.kept = True
            sequence.avoid.clear()
            sequence.note("moved", self._owner.clock(), reason)
            self._owner.count_move(reason)
            if sequence.num_deaths > self._config.max_failovers:
                self.poison.add(sequence.prompt_ids, self._owner.clock())
                self._owner.end(sequence, WorkerFailed("the workers that ran this request have failed"))
            elif sequence.num_moves > MAX_MOVES:
                self._owner.end(sequence, Unavailable("no worker keeps this request", retry_after_s=5.0))
            else:
                # The first move is made at once; a request that nobody keeps is not sent round in circles.
                self._owner.spawn(self._place_after(sequence, MOVE_PAUSE_S * (sequence.num_moves - 1)))

    async def _find_room(self, sequence: LiveSequence, error: EllmError) -> None:
        """A worker is full: ask the others; when all are, a new request is refused and another one waits."""
        pause_s = 0.0
        wait_s = error.retry_after_s or MAX_PAUSE_S
        sequence.room_in_s = min(sequence.room_in_s, wait_s)
        if not self._owner.has_room_elsewhere(sequence.avoid):
            if not sequence.kept:
                error.retry_after_s = sequence.room_in_s
                self._owner.end(sequence, error)
                return
            sequence.avoid.clear()
            pause_s = min(wait_s, MAX_PAUSE_S)
        await self._place_after(sequence, pause_s)

    async def _place_after(self, sequence: LiveSequence, pause_s: float) -> None:
        current = asyncio.current_task()
        assert current is not None
        self._placing[sequence.request_id] = current
        try:
            await asyncio.sleep(pause_s)
            if sequence.finished is None:
                await self._place(sequence)
        except EllmError as error:
            self._owner.end(sequence, error)
        except Exception:  # a task of its own: nobody else would end the request
            log.exception("%s cannot be placed", sequence.request_id)
            self._owner.end(sequence, EllmError("internal error"))
        finally:
            if self._placing.get(sequence.request_id) is current:
                del self._placing[sequence.request_id]
