"""One router's line to one worker. Bodies: a Ray actor handle, and a worker in the same process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Protocol

from ellm.worker.api.report import WorkerInfo
from ellm.worker.api.wire import Message


class ChannelClosed(ConnectionError):
    """The worker is gone, or has cut this router off; every request on it must move."""


class WorkerChannel(Protocol):
    """Messages as `wire.py` writes them. Submitting never waits for the engine: errors of a request come
    back as an output with finish_reason "error"."""

    @property
    def info(self) -> WorkerInfo: ...

    async def submit(self, message: Message) -> None:
        """Send a SUBMIT message. Raises ChannelClosed."""
        ...

    async def abort(self, message: Message) -> None:
        """Send an ABORT message; idempotent. Raises ChannelClosed."""
        ...

    def outputs(self, router_id: str) -> AsyncIterator[Message]:
        """Open the one output stream of this router: STEP messages, at least one every heartbeat.

        Opening it again ends the former one, and its requests with it. Raises ChannelClosed when the
        worker dies, drains or cuts this router off.
        """
        ...


class WorkerDirectory(Protocol):
    """Which workers there are now."""

    async def refresh(self) -> Mapping[str, WorkerChannel]:
        """Epoch -> channel of every worker that is up. The same channel object for the same epoch."""
        ...
