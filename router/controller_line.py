"""A router's line to the controller over Ray: found by name, and asked for anew after each failure.

A controller that does not answer is not dead to Ray: a process that stands still keeps its name for ever.
After `HUNG_S` without an answer it is ended here, and the next one found or made.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from ellm.worker.api.wire import Message

log = logging.getLogger(__name__)

HUNG_S = 15.0  # of one that has answered before
START_S = 60.0  # of one that has not: its process may be starting
TRIES = 3  # that took too long, at least


class RayControllerLine:
    """`find` returns the controller's actor handle, and may make the actor; it blocks for a moment. The
    handle is held: an actor that was made here lives as long as somebody holds it. `end` ends one that hangs.
    """

    def __init__(
        self,
        find: Callable[[], Any],
        end: Callable[[Any], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._find = find
        self._end = end or _kill
        self._clock = clock
        self._handle: Any = None
        self._search: asyncio.Task[Any] | None = None
        self._answered = False  # the one that is held, ever
        self._waiting_since: float | None = None  # it answers nothing
        self._num_late = 0

    async def exchange(self, note: Message) -> Message | None:
        """Raises RayError, TimeoutError. Whoever waits for no longer cancels it."""
        if self._hangs():
            self._replace()
        if self._handle is None:
            self._handle = await self._found()
            self._answered = False
            self._heard()
        if self._waiting_since is None:
            self._waiting_since = self._clock()
        try:
            answer: Message | None = await self._handle.exchange.remote(note)
        except asyncio.CancelledError:
            self._num_late += 1
            raise
        except Exception as error:
            self._heard()  # Ray knows what is wrong with it, and sees to it
            if _is_dead(error):
                self._handle = None
            raise
        self._answered = True
        self._heard()
        return answer

    async def counters(self, message: Message) -> Message:
        """The same for what routers count (cluster/api/counters.py); it does not search. Raises LookupError
        while there is no controller, and what `exchange` raises."""
        if self._handle is None:
            raise LookupError("no controller has been found yet")
        answer: Message = await self._handle.counters.remote(message)
        return answer

    async def _found(self) -> Any:
        """A search goes on when nobody waits any more, and its result is for the next who asks."""
        if self._search is None:
            self._search = asyncio.create_task(asyncio.to_thread(self._find))
        search = self._search
        try:
            return await asyncio.shield(search)
        finally:
            if search.done():
                self._search = None

    def _heard(self) -> None:
        self._waiting_since, self._num_late = None, 0

    def _hangs(self) -> bool:
        if self._handle is None or self._waiting_since is None or self._num_late < TRIES:
            return False
        return self._clock() - self._waiting_since >= (HUNG_S if self._answered else START_S)

    def _replace(self) -> None:
        """End it, so that its name is free, and search once more."""
        log.warning("the controller does not answer any more; another one takes its place")
        handle, self._handle = self._handle, None
        self._heard()

        def end_and_find() -> Any:
            self._end(handle)
            return self._find()

        self._search = asyncio.create_task(asyncio.to_thread(end_and_find))


def _kill(handle: Any) -> None:
    import ray

    ray.kill(handle, no_restart=True)


def _is_dead(error: Exception) -> bool:
    """Ray restarts an actor under the same handle, unless it says that it is dead."""
    from ray.exceptions import ActorDiedError

    return isinstance(error, ActorDiedError)
