"""The outermost layer of the HTTP edge: request ids, keys, audit lines, and typed errors for all that comes.

Pure ASGI, so that a stream's chunks pass one closure and nothing else. Knows paths only to tell who may see
them: `/metrics` and `/admin` show all tenants, so they are for the admin key, and where there are API keys
but no admin key, for nobody. Without any key the server is open.
"""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from dataclasses import dataclass

from starlette._utils import get_route_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ellm.router.access import Access
from ellm.router.audit import AuditLog, RequestRecord
from ellm.router.config import LimitsConfig
from ellm.router.errors import HeadersTooLarge
from ellm.router.http_bodies import ClientLeft, header, send_error
from ellm.router.keys import ApiKey
from ellm.router.page_files import PATHS
from ellm.worker.api.errors import EllmError
from ellm.worker.api.json_log import REQUEST_ID

log = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health", "/health/ready", *PATHS})  # the page itself shows nothing
ADMIN_PATHS = ("/admin", "/metrics")  # and what is below
CONTEXT = "ellm.context"
ADMIN = "admin"  # stands for the admin key in audit lines
_NOT_IN_ID = re.compile(r"[^A-Za-z0-9._:\-]")
_MAX_ID = 128


@dataclass(frozen=True, slots=True)
class RequestContext:
    """What the edge knows of a request."""

    request_id: str
    key: ApiKey | None  # None where none is needed
    send: Send  # past the framework's own layers, which would each pass on every chunk
    record: RequestRecord

    @property
    def tenant(self) -> str:
        """Stands for the key; "" where none is needed."""
        return "" if self.key is None else self.key.id


def request_id(scope: Scope) -> str:
    """The client's X-Request-Id without what does not belong in one, or a new one."""
    given = header(scope, b"x-request-id")
    return _NOT_IN_ID.sub("", given or "")[:_MAX_ID] or f"req-{uuid.uuid4().hex}"


def bearer(scope: Scope) -> str:
    scheme, _, key = (header(scope, b"authorization") or "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


class Edge:
    """Wraps the application."""

    def __init__(
        self,
        app: ASGIApp,
        access: Access,
        limits: LimitsConfig,
        audit: AuditLog,
        echo_request_id: bool = True,
    ) -> None:
        self._app = app
        self._access = access
        self._limits = limits
        self._audit = audit
        self._echo = echo_request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = self._audit.record(request_id(scope), "http", route(scope), client_address(scope))
        try:
            await self._answer(scope, receive, send, record)
        finally:
            if record.endpoint not in OPEN_PATHS:
                self._audit.write(record)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, record: RequestRecord) -> None:
        ident = record.request_id
        id_header = (b"x-request-id", ident.encode())
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if not started:
                started = True
                record.status = message["status"]
                if self._echo:
                    message["headers"] = [*message.get("headers", ()), id_header]
            await send(message)

        REQUEST_ID.set(ident)
        try:
            self._check_headers(scope)
            key = self._owner(scope, record)
            scope[CONTEXT] = RequestContext(ident, key, send_with_id, record)
            await self._app(scope, receive, send_with_id)
        except EllmError as error:
            record.error = error.code
            if not started:
                await send_error(send_with_id, error)
        except ClientLeft:
            record.left()
            log.info("request %s: 499, the client has left", ident)
        except asyncio.CancelledError:  # as Serve ends the call of a client that has left
            record.left()
            raise
        except Exception:  # the edge of the process: a client sees no internals
            record.error = EllmError.code
            log.exception("request %s failed", ident)
            if not started:
                await send_error(send_with_id, EllmError("internal error"))

    def _check_headers(self, scope: Scope) -> None:
        """Raises HeadersTooLarge."""
        headers = scope["headers"]
        if len(headers) > self._limits.max_headers:
            raise HeadersTooLarge(f"more than {self._limits.max_headers} headers")
        size = sum(len(name) + len(value) for name, value in headers)
        if size + len(scope.get("query_string", b"")) > self._limits.max_header_bytes:
            raise HeadersTooLarge(f"more than {self._limits.max_header_bytes} bytes of headers and query")

    def _owner(self, scope: Scope, record: RequestRecord) -> ApiKey | None:
        """Whose key it is; None where none is needed. Raises Unauthorized, Forbidden."""
        path = record.endpoint
        if path in OPEN_PATHS:
            return None
        admin = path.startswith(ADMIN_PATHS)
        key = self._access.owner(bearer(scope), admin=admin)
        record.belongs_to(key)
        if admin and self._access.guarded:
            record.key = ADMIN
        return key


def route(scope: Scope) -> str:
    """The path within the application, by the very function that routes it: the two cannot disagree on whose
    path it is."""
    return get_route_path(scope)


def key_of(scope: Scope) -> ApiKey | None:
    """The caller's, of a request that has come through the edge; None where none is needed."""
    context: RequestContext = scope[CONTEXT]
    return context.key


def client_address(scope: Scope) -> str:
    """Of the one that the server talks to: a client, or a proxy that does not say for whom."""
    client = scope.get("client")
    return "" if not client else f"{client[0]}:{client[1]}"
