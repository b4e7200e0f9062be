"""One request that generates, from its body to its last byte: parse, convert, admit, submit, answer.

Its own task listens for the client all the while: one that leaves frees its blocks at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ellm.router.config import RouterConfig
from ellm.router.dispatch import Dispatcher
from ellm.router.edge import CONTEXT, RequestContext
from ellm.router.entrance import admitted
from ellm.router.errors import SlowReader
from ellm.router.generation import Generation
from ellm.router.http_bodies import (
    BodyReader,
    ClientLeft,
    header,
    send_error,
    send_json,
    stream_start,
    unfinished,
)
from ellm.router.keys import ApiKey
from ellm.router.metrics import RouterMetrics
from ellm.router.openai.answer import Answer
from ellm.router.openai.convert import Converter, Job, ModelBounds
from ellm.router.openai.schema import ChatRequest, CompletionRequest, parse
from ellm.router.openai.shapes import ChatShape, CompletionShape
from ellm.router.paced_stream import PacedStream
from ellm.router.service_level import ServiceLevel
from ellm.router.sinks import EventStream, Gathered, StallWatch
from ellm.router.tenants import TenantLimits
from ellm.router.timeline import Timelines
from ellm.router.tokenizer import Tokenizer
from ellm.worker.api.errors import DeadlineExceeded, EllmError

log = logging.getLogger(__name__)

Kind = Literal["completion", "chat"]


@dataclass(frozen=True, slots=True)
class Service:
    """What every request needs: made once per router."""

    config: RouterConfig
    model: str  # the served name
    fingerprint: str
    tokenizer: Tokenizer
    converter: Converter
    dispatcher: Dispatcher
    metrics: RouterMetrics
    tenants: TenantLimits
    timelines: Timelines

    async def bounds(self) -> ModelBounds:
        """Raises Unavailable when no worker is up in time."""
        info = self.dispatcher.info() or await self.dispatcher.wait_for_worker()
        default = ServiceLevel(info.tpot_slo_s, info.ttft_slo_s)
        # While releases are mixed a worker of an older one would answer as if no grammar had come.
        grammars = info.grammars and all(link.info.grammars for link in self.dispatcher.links.values())
        return ModelBounds(info.max_model_len, info.vocab_size, default, grammars)

    async def job(self, kind: Kind, body: Any) -> Job:
        """Raises InvalidRequest, Unavailable."""
        if kind == "chat":
            return await self.converter.chat(parse(ChatRequest, body), await self.bounds())
        return await self.converter.completion(parse(CompletionRequest, body), await self.bounds())


class ServiceFinder(Protocol):
    """The router's models."""

    services: dict[str, Service]

    def find_for(self, body: Any, key: ApiKey | None = None) -> Service:
        """The service that a request's body means, of those that the key may use. Raises InvalidRequest,
        ModelNotFound, Unavailable."""
        ...


class Exchange(Response):
    """An ASGI response that does all its work when it is called, past FastAPI to the client's connection."""

    def __init__(self, models: ServiceFinder, kind: Kind, bodies: BodyReader) -> None:
        self.background = None
        self._bodies = bodies
        self._models = models
        self._kind = kind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        context: RequestContext = scope[CONTEXT]
        send = context.send
        self._service = next(iter(self._models.services.values()))  # until the body says which
        try:
            body = await self._bodies.json(scope, receive)
            self._service = self._models.find_for(body, context.key)
            await _while_client_stays(receive, lambda: self._answer(body, scope, send, context))
        except EllmError as error:
            context.record.error = error.code
            self._service.metrics.refused(error)
            await send_error(send, error, receive if unfinished(error) else None)

    async def _answer(self, body: Any, scope: Scope, send: Send, context: RequestContext) -> None:
        service, session = self._service, header(scope, b"x-session-id")
        asked = service, self._kind, body, scope["headers"], context.key, session, context.record
        async with admitted(*asked) as generation:
            job = generation.job
            shape = ChatShape() if self._kind == "chat" else CompletionShape()
            answer = Answer(shape, job, service.tokenizer, service.model, service.fingerprint)
            if job.stream:
                await self._stream(generation, answer, context)
            else:
                await self._whole(generation, answer, context)

    async def _whole(self, generation: Generation, answer: Answer, context: RequestContext) -> None:
        sink = Gathered(generation, answer)
        timer = self._deadline(generation, sink.end)
        try:
            await generation.submit(sink)
            body = await sink.answer()
        finally:
            timer.cancel()
        generation.close()  # a client that reads slowly holds no place
        try:
            await send_json(context.send, body, limit_s=self._service.config.limits.receive_timeout_s)
        except TimeoutError:
            self._cut_off(asyncio.current_task(), context)
            await asyncio.sleep(0)

    async def _stream(self, generation: Generation, answer: Answer, context: RequestContext) -> None:
        send, task = context.send, asyncio.current_task()
        cut_off = partial(self._cut_off, task, context)
        sink = self._event_stream(generation, answer, cut_off)
        timer = self._deadline(generation, sink.end)
        watch = StallWatch(sink, self._service.config.limits.receive_timeout_s, cut_off)
        try:
            await generation.submit(sink)
            data: bytes | None = await sink.first()
            await send(stream_start())
            while data is not None:
                await send({"type": "http.response.body", "body": data, "more_body": True})
                data = await sink.more()
            await send({"type": "http.response.body", "body": b""})
        finally:
            timer.cancel()
            watch.cancel()
            sink.close()

    def _event_stream(
        self, generation: Generation, answer: Answer, cut_off: Callable[[], None]
    ) -> EventStream:
        config, job = self._service.config, generation.job
        paced = config.pace_streams if job.pace is None else job.pace
        if paced and job.level.tpot_slo_s is not None:
            return PacedStream(generation, answer, config, cut_off, self._service.dispatcher.clock)
        return EventStream(generation, answer, config.limits.max_client_buffer_bytes, cut_off)

    def _cut_off(self, task: asyncio.Task[None] | None, context: RequestContext) -> None:
        """The stream's client reads too slowly: there is no way to tell it."""
        assert task is not None
        error = SlowReader("the client reads its stream too slowly")
        context.record.error = error.code
        self._service.metrics.refused(error)
        log.warning("request %s: the client reads too slowly and is cut off", context.request_id)
        task.cancel()

    def _deadline(self, generation: Generation, end: Callable[[EllmError], None]) -> asyncio.TimerHandle:
        """Counted from the request's arrival."""
        deadline_s = self._service.config.limits.request_deadline_s
        error = DeadlineExceeded(f"the request took longer than {deadline_s:g} s")
        left = deadline_s - (self._service.dispatcher.clock() - generation.arrived_at)
        return asyncio.get_running_loop().call_later(max(0.0, left), end, error)


async def _while_client_stays(receive: Receive, work: Callable[[], Awaitable[None]]) -> None:
    """Run `work` in a task of its own until the client disconnects. Raises what it raises, ClientLeft when it
    was cancelled: by a disconnection, or since the client reads too slowly."""
    task = asyncio.ensure_future(_run(work))
    listener = asyncio.create_task(_disconnected(receive))
    listener.add_done_callback(lambda _: task.cancel())
    try:
        await asyncio.wait([task])
    finally:
        # Also when this task itself is cancelled (a server that shuts down): nothing may go on.
        listener.cancel()
        task.cancel()
        await asyncio.gather(task, listener, return_exceptions=True)
    if task.cancelled():
        raise ClientLeft
    task.result()


async def _run(work: Callable[[], Awaitable[None]]) -> None:
    await work()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
