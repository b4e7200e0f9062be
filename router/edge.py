"""The outermost layer of the HTTP edge: request ids, keys, and typed errors for whatever comes through.

Pure ASGI, so that a stream's chunks pass one closure and nothing else. Knows paths only to tell who may see
them: `/metrics` and `/admin` show all tenants, so they are for the admin key, and where there are API keys
but no admin key, for nobody. Without any key the server is open.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ellm.router.access import Access
from ellm.router.http_bodies import ClientLeft, header, send_error
from ellm.router.keys import ApiKey, KeyRing
from ellm.router.page_files import PATHS
from ellm.worker.api.errors import EllmError
from ellm.worker.api.json_log import REQUEST_ID

log = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health", "/health/ready", *PATHS})  # the page itself shows nothing
ADMIN_PATHS = ("/admin", "/metrics")  # and what is below
CONTEXT = "ellm.context"
_NOT_IN_ID = re.compile(r"[^A-Za-z0-9._:\-]")
_MAX_ID = 128


@dataclass(frozen=True, slots=True)
class RequestContext:
    """What the edge knows of a request."""

    request_id: str
    key: ApiKey | None  # None where none is needed
    send: Send  # past the framework's own layers, which would each pass on every chunk

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
        keys: KeyRing,
        admin_key: str | None = None,
        echo_request_id: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app = app
        self._echo = echo_request_id
        self._access = Access(keys, admin_key, clock)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        ident = request_id(scope)
        id_header = (b"x-request-id", ident.encode())
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if not started:
                started = True
                if self._echo:
                    message["headers"] = [*message.get("headers", ()), id_header]
            await send(message)

        REQUEST_ID.set(ident)
        try:
            scope[CONTEXT] = RequestContext(ident, self._owner(scope), send_with_id)
            await self._app(scope, receive, send_with_id)
        except EllmError as error:
            if not started:
                await send_error(send_with_id, error)
        except ClientLeft:
            log.info("request %s: 499, the client has left", ident)
        except Exception:  # the edge of the process: a client sees no internals
            log.exception("request %s failed", ident)
            if not started:
                await send_error(send_with_id, EllmError("internal error"))

    def _owner(self, scope: Scope) -> ApiKey | None:
        """Whose key it is; None where none is needed. Raises Unauthorized, Forbidden."""
        path = scope["path"]
        if path in OPEN_PATHS:
            return None
        return self._access.owner(bearer(scope), admin=path.startswith(ADMIN_PATHS))
