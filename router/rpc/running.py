"""The calls that generate now, and what ends one from outside: an abort by name, its deadline, slow reading.

What is generated is `entrance`'s and `Generation`'s, as over HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from ellm.router.entrance import admitted
from ellm.router.errors import SlowReader
from ellm.router.exchange import Kind, Service
from ellm.router.rpc.guard import CALLER
from ellm.router.rpc.outputs import Outputs
from ellm.router.rpc.status import Aborted
from ellm.worker.api.errors import DeadlineExceeded, EllmError, InvalidRequest


class RunningCall:
    """One call's task, what it holds, and why it is to end."""

    def __init__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._sending = False
        self.release: Callable[[], None] = lambda: None  # gives up what is generated
        self.reason: EllmError | None = None

    def end(self, error: EllmError) -> None:
        """The first one counts. What it holds is free at once; the client is told when it takes what is on
        its way to it, for gRPC can neither call that back nor send a status past it."""
        if self.reason is not None:
            return
        self.reason = error
        if self._sending:
            asyncio.get_running_loop().call_soon(self.release)  # not within what tells of an output
        else:
            self._task.cancel()

    async def send(self, sending: Awaitable[None]) -> None:
        """Something to the client. Raises the reason if it is to end meanwhile."""
        self._sending = True
        try:
            await sending
        finally:
            self._sending = False
        if self.reason is not None:
            raise self.reason

    def ended(self) -> None:
        """Its task was cancelled. Raises the reason if it was for one."""
        if self.reason is not None:
            self._task.uncancel()
            raise self.reason from None


@asynccontextmanager
async def running(service: Service) -> AsyncIterator[RunningCall]:
    """Within it, what ends the call from outside is raised as the error it is, and errors are counted. The
    client's own end (it left, its deadline is over) stays a cancellation."""
    deadline_s, call = service.config.limits.request_deadline_s, RunningCall()
    error = DeadlineExceeded(f"the request took longer than {deadline_s:g} s")
    timer = asyncio.get_running_loop().call_later(deadline_s, call.end, error)
    try:
        try:
            yield call
            if call.reason is not None:  # it came too late to be noticed
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            call.ended()
            raise
    except EllmError as found:
        service.metrics.refused(found)
        raise
    finally:
        timer.cancel()


class RunningCalls:
    """By tenant and request id: nobody ends another tenant's."""

    def __init__(self) -> None:
        self._calls: dict[tuple[str, str], RunningCall] = {}

    def __len__(self) -> int:
        return len(self._calls)

    @contextmanager
    def named(self, tenant: str, request_id: str, call: RunningCall) -> Iterator[None]:
        """Raises InvalidRequest for an id that is in use."""
        name = tenant, request_id
        if name in self._calls:
            raise InvalidRequest("request_id: in use by another request", param="request_id")
        self._calls[name] = call
        try:
            yield
        finally:
            del self._calls[name]

    def abort(self, tenant: str, request_id: str) -> bool:
        """Whether there was one."""
        call = self._calls.get((tenant, request_id))
        if call is None:
            return False
        call.end(Aborted("the request was aborted"))
        return True


@asynccontextmanager
async def generating(
    service: Service, kind: Kind, body: dict[str, Any], call: RunningCall, whole: bool, session_id: str = ""
) -> AsyncIterator[Outputs]:
    """What comes of the body, on its way. Raises EllmError."""
    caller = CALLER.get()
    session = session_id or caller.header(b"x-session-id")
    asked = service, kind, body, caller.headers, caller.key, session, caller.record
    async with admitted(*asked) as generation:
        limit = service.config.limits.max_client_buffer_bytes
        slow = SlowReader("the client reads its stream too slowly")
        outputs = Outputs(generation.job.num_sequences, limit, lambda: call.end(slow), whole=whole)

        def release() -> None:
            generation.close()
            outputs.drop()

        call.release = release
        await generation.submit(outputs)
        yield outputs
