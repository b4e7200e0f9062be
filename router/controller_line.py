"""A router's line to the controller over Ray: found by name, and asked for anew after each failure."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from ellm.worker.api.wire import Message


class RayControllerLine:
    """`find` returns the controller's actor handle, and may make the actor; it blocks for a moment. The
    handle is held: an actor that was made here lives as long as somebody holds it."""

    def __init__(self, find: Callable[[], Any]) -> None:
        self._find = find
        self._handle: Any = None
        self._search: asyncio.Task[Any] | None = None

    async def exchange(self, note: Message) -> Message | None:
        """Raises RayError, TimeoutError."""
        if self._handle is None:
            if self._search is None or self._search.done():  # one that hangs shall not take more threads
                self._search = asyncio.create_task(asyncio.to_thread(self._find))
            self._handle = await asyncio.shield(self._search)
        try:
            answer: Message | None = await self._handle.exchange.remote(note)
        except Exception as error:
            if _is_dead(error):
                self._handle = None
            raise
        return answer


def _is_dead(error: Exception) -> bool:
    """Ray restarts an actor under the same handle, unless it says that it is dead."""
    from ray.exceptions import ActorDiedError

    return isinstance(error, ActorDiedError)
