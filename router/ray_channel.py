"""WorkerChannel over a rank actor's handle: three calls, one a stream. Any end of it is ChannelClosed.

It does not suspect: a worker that is silent and not dead is for the dispatcher to judge.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from ray.exceptions import RayError

from ellm.worker.api.channel import ChannelClosed
from ellm.worker.api.report import WorkerInfo
from ellm.worker.api.wire import Message

# Messages that may be on their way. What the router has not taken beyond them waits in the worker's outbox,
# where it is merged and bounded.
STREAM_BACKPRESSURE = 16


class RayChannel:
    """One incarnation of one worker, seen from one router process."""

    def __init__(self, handle: Any, info: WorkerInfo) -> None:
        self._handle = handle
        self._info = info

    @property
    def info(self) -> WorkerInfo:
        return self._info

    async def submit(self, message: Message) -> None:
        try:
            await self._handle.submit.remote(message)
        except RayError as error:
            raise self._closed(error) from None

    async def abort(self, message: Message) -> None:
        try:
            await self._handle.abort.remote(message)
        except RayError as error:
            raise self._closed(error) from None

    async def outputs(self, router_id: str) -> AsyncIterator[Message]:
        options = {"num_returns": "streaming", "_generator_backpressure_num_objects": STREAM_BACKPRESSURE}
        try:
            async for ref in self._handle.outputs.options(**options).remote(router_id):
                yield await ref
        except RayError as error:
            raise self._closed(error) from None
        raise ChannelClosed(f"worker {self._info.worker_id} ({self._info.epoch}) has ended the stream")

    def _closed(self, error: RayError) -> ChannelClosed:
        first_line = str(error).strip().partition("\n")[0]
        return ChannelClosed(f"worker {self._info.worker_id} ({self._info.epoch}): {first_line}")
