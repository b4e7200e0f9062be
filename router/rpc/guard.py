"""What stands before every method: the key, an audit line, a message that can be read, and typed errors.

The key is checked before the message is read. Whatever a method raises becomes a status without internals.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import grpc

from ellm.router.access import Access
from ellm.router.audit import AuditLog, RequestRecord, peer_address
from ellm.router.edge import ADMIN as ADMIN_KEY
from ellm.router.keys import ApiKey
from ellm.router.rpc.call_context import CallContext
from ellm.router.rpc.status import status_of
from ellm.worker.api.errors import EllmError, InvalidRequest
from ellm.worker.api.json_log import REQUEST_ID

log = logging.getLogger(__name__)

OPEN = frozenset(
    {
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/List",
        "/grpc.health.v1.Health/Watch",
        "/inference.GRPCInferenceService/ServerLive",
        "/inference.GRPCInferenceService/ServerReady",
    }
)
ADMIN = frozenset({"/ellm.v1.Inference/GetLoads"})  # shows all tenants
_NOT_IN_ID = re.compile(r"[^A-Za-z0-9._:\-]")
_MAX_ID = 128
_UNREADABLE = object()
_Run = Callable[..., Awaitable[Any]]  # of a message and its context


@dataclass(frozen=True, slots=True)
class Caller:
    """What the guard knows of a call."""

    key: ApiKey | None  # None where none is needed
    headers: tuple[tuple[bytes, bytes], ...]  # its metadata, as HTTP's headers
    request_id: str
    record: RequestRecord

    @property
    def tenant(self) -> str:
        """Stands for the key; "" where none is needed."""
        return "" if self.key is None else self.key.id

    def header(self, name: bytes) -> str | None:
        return _header(self.headers, name)


CALLER: ContextVar[Caller] = ContextVar("ellm_rpc_caller")  # of the method that runs


class Guard(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # gRPC has no types
    """Wraps every method of the server."""

    def __init__(self, access: Access, audit: AuditLog) -> None:
        self._access = access
        self._audit = audit

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        handler = await continuation(details)
        if handler is None:  # gRPC says UNIMPLEMENTED
            return None
        method, headers = details.method, _headers(details.invocation_metadata)
        ident = _NOT_IN_ID.sub("", _header(headers, b"x-request-id") or "")[:_MAX_ID]
        record = self._audit.record(ident or f"req-{uuid.uuid4().hex}", "grpc", method, "")
        try:
            caller = Caller(self._owner(method, headers, record), headers, record.request_id, record)
        except EllmError as error:
            record.refused(error)
            return _with(handler, self._audited(_refusing(error), record), None)
        guarded = _guarded(_behaviour(handler), caller, method)
        return _with(handler, guarded if method in OPEN else self._audited(guarded, record), caller)

    def _owner(
        self, method: str, headers: tuple[tuple[bytes, bytes], ...], record: RequestRecord
    ) -> ApiKey | None:
        """Raises Unauthorized, Forbidden."""
        if method in OPEN:
            return None
        key = self._access.owner(_key(headers), admin=method in ADMIN)
        record.belongs_to(key)
        if method in ADMIN and self._access.guarded:
            record.key = ADMIN_KEY
        return key

    def _audited(self, run: _Run, record: RequestRecord) -> _Run:
        async def audited(request: Any, context: CallContext) -> Any:
            record.client = peer_address(context.peer())
            try:
                answer = await run(request, context)
                record.status = 200
                return answer
            except asyncio.CancelledError:
                record.left()
                raise
            finally:
                self._audit.write(record)

        return audited


def _headers(metadata: Sequence[tuple[str, str | bytes]] | None) -> tuple[tuple[bytes, bytes], ...]:
    return tuple(
        (name.encode(), value if isinstance(value, bytes) else value.encode("utf-8", "replace"))
        for name, value in metadata or ()
    )


def _header(headers: tuple[tuple[bytes, bytes], ...], name: bytes) -> str | None:
    return next((value.decode("utf-8", "replace") for key, value in headers if key == name), None)


def _key(headers: tuple[tuple[bytes, bytes], ...]) -> str:
    scheme, _, key = (_header(headers, b"authorization") or "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return (_header(headers, b"x-api-key") or "").strip()


def _behaviour(handler: Any) -> Callable[..., Any]:
    """The one that there is for what streams and what does not."""
    found = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    assert found is not None
    return found  # type: ignore[no-any-return]


def _with(handler: Any, behaviour: Callable[..., Any], caller: Caller | None) -> Any:
    """The handler with another behaviour. A message that cannot be parsed reaches it as _UNREADABLE; for a
    caller who is refused, nothing is parsed."""
    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[handler.request_streaming, handler.response_streaming]
    parse = None if caller is None else _parsing(handler.request_deserializer)
    return make(behaviour, parse, handler.response_serializer)


def _parsing(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def careful(data: bytes) -> Any:
        try:
            return parse(data)
        except Exception:  # protobuf's own, and what it raises of text that is not UTF-8
            return _UNREADABLE

    return careful


def _refusing(error: EllmError) -> Callable[..., Awaitable[None]]:
    async def refuse(_: Any, context: CallContext) -> None:
        await _refuse(context, error)

    return refuse


async def _refuse(context: CallContext, error: EllmError) -> None:
    status = status_of(error)
    metadata = (*(context.trailing_metadata() or ()), *status.metadata)
    try:
        await context.abort(status.code, status.details, metadata)
    except grpc.aio.InternalError:
        raise _left() from None


def _guarded(behaviour: Callable[..., Any], caller: Caller, method: str) -> Callable[..., Awaitable[Any]]:
    async def run(request: Any, context: CallContext) -> Any:
        CALLER.set(caller)
        REQUEST_ID.set(caller.request_id)
        context.set_trailing_metadata((("x-request-id", caller.request_id),))
        try:
            return await _call(behaviour, request, context)
        except EllmError as error:
            refusal = error
        except grpc.aio.AbortError:
            raise
        except grpc.aio.InternalError:  # nothing can be sent any more, and gRPC has not yet said why
            raise _left() from None
        except Exception:  # the edge of the process: a client sees no internals
            log.exception("%s failed for request %s", method, caller.request_id)
            refusal = EllmError("internal error")
        caller.record.refused(refusal)
        return await _refuse(context, refusal)

    return run


def _left() -> asyncio.CancelledError:
    """What gRPC itself raises in a call whose client has left."""
    return asyncio.CancelledError("the client has left")


async def _call(behaviour: Callable[..., Any], request: Any, context: CallContext) -> Any:
    """Methods are coroutines, or generators of answers."""
    if hasattr(request, "__aiter__"):
        request = _readable(request)
    elif request is _UNREADABLE:
        raise _unreadable()
    if not inspect.isasyncgenfunction(behaviour):
        return await behaviour(request, context)
    async for answer in behaviour(request, context):
        await context.write(answer)
    return None


async def _readable(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        if request is _UNREADABLE:
            raise _unreadable()
        yield request


def _unreadable() -> InvalidRequest:
    return InvalidRequest("the message is not of this method's type")
