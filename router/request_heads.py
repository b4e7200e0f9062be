"""Bounds what the HTTP server keeps of a request's head, and how long it waits for its end.

uvicorn with httptools gathers headers without an end, for as long as a client likes; Ray Serve, which runs it
in a router's replica, has no setting for either. HAProxy bounds both before it, but its port is not the only
way to a replica. Within the bounds `Edge` counts again and answers with its own errors.
"""

from __future__ import annotations

import asyncio
import logging

import orjson
from uvicorn import config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ellm.router.config import LimitsConfig
from ellm.router.errors import HeadersTooLarge, TooSlow
from ellm.router.openai.answer import error_body
from ellm.worker.api.errors import EllmError

log = logging.getLogger(__name__)

SLACK = 2  # heads hold more than headers, and come in pieces: `Edge` is to judge all but the absurd
_REASONS = {408: b"Request Timeout", 431: b"Request Header Fields Too Large"}


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which refuses a head that is SLACK times as large as it may be, and one that has
    not come to its end in time."""

    limits: LimitsConfig
    _in_head = True
    _head_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        self._head_bytes += len(data)  # a head's end sets it back
        super().data_received(data)
        if not self._in_head or not self._head_bytes or self.transport.is_closing():
            return
        if self._head_bytes > SLACK * self.limits.max_header_bytes:
            self._refuse(HeadersTooLarge(f"more than {self.limits.max_header_bytes} bytes of headers"))
        elif self._head_timer is None and not self._answers():
            time_s = self.limits.receive_timeout_s
            error = TooSlow(f"the headers did not come within {time_s:g} s")
            self._head_timer = self.loop.call_later(time_s, self._refuse, error)

    def on_headers_complete(self) -> None:
        self._stop_timer()
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head, self._head_bytes = True, 0  # what has come of the next one already does not count
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _answers(self) -> bool:
        """Whether the answer to the request before is still on its way: the next head waits for that, and may
        not be answered into it. When it is done, uvicorn's own time for idle connections runs."""
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, error: EllmError) -> None:
        self._stop_timer()
        log.warning("a connection of %s is closed: %s", self.client, error.message)
        if self._answers():
            self.transport.abort()
            return
        body = orjson.dumps(error_body(error))
        self.transport.write(
            b"HTTP/1.1 %d %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
            b"connection: close\r\n\r\n%b" % (error.status, _REASONS[error.status], len(body), body)
        )
        self.transport.close()


def bounded(limits: LimitsConfig) -> type[asyncio.Protocol]:
    """A protocol for uvicorn."""
    return type("Bounded", (BoundedProtocol,), {"limits": limits})


def bound_heads(limits: LimitsConfig) -> None:
    """For every server that uvicorn starts in this process from now on."""
    config.HTTP_PROTOCOLS["auto"] = bounded(limits)  # type: ignore[assignment]  # it takes a class, too
