"""One line of JSON per request: who asked for what, when, and how it ended. Never a text, never a key.

Lines are written by a thread of their own: a disk that hangs delays no request. What waits for it is bounded;
beyond that lines are lost, and counted. A file that was moved away is made anew, so that it can be rotated.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from urllib.parse import unquote

import orjson

from ellm.router import metrics_declared as declared
from ellm.router.errors import typed_error
from ellm.router.keys import ApiKey
from ellm.worker.api.errors import EllmError
from ellm.worker.api.metrics import Key

if TYPE_CHECKING:
    from ellm.router.generation import Generation

log = logging.getLogger(__name__)

STDOUT = "-"
MAX_WAITING = 20_000  # lines, of about 400 bytes
GATHER_S = 0.05  # lines of so long a time are written at once
MAX_ENDPOINT = 128
CLIENT_LEFT = 499


@dataclass(slots=True)
class RequestRecord:
    """What is told of one request; filled in by whoever knows."""

    request_id: str
    protocol: str  # http, grpc
    endpoint: str
    client: str = ""  # its address, as far as the server knows it
    began_at: float = 0.0  # wall clock, seconds
    key: str = ""  # its id
    tenant: str = ""  # its name
    model: str = ""
    status: int = 0  # HTTP's, for gRPC too
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    finish_reasons: tuple[str, ...] = ()
    error: str = ""  # its code
    _started: float = field(default_factory=time.perf_counter)

    def belongs_to(self, key: ApiKey | None) -> None:
        if key is not None:
            self.key, self.tenant = key.id, key.name

    def refused(self, error: EllmError) -> None:
        self.status, self.error = error.status, error.code

    def left(self) -> None:
        """The client has, before it was told of anything else."""
        if not self.error:
            self.error = "client_left"
            self.status = CLIENT_LEFT

    def ended(self, generation: Generation) -> None:
        """Of a generation that is closed."""
        usage = generation.usage()
        self.prompt_tokens, self.cached_tokens = usage.prompt_tokens, usage.cached_tokens
        self.output_tokens = usage.completion_tokens
        self.finish_reasons = tuple(s.finished or "abort" for s in generation.sequences)
        failed = next((s.error for s in generation.sequences if s.error is not None), None)
        if failed is not None:
            self.error = self.error or typed_error(failed).code

    def line(self) -> bytes:
        """With its newline."""
        reasons = self.finish_reasons
        shown = {
            "time": datetime.fromtimestamp(self.began_at, UTC).isoformat(timespec="milliseconds"),
            "request_id": self.request_id,
            "protocol": self.protocol,
            "endpoint": self.endpoint[:MAX_ENDPOINT],
            "client": self.client,
            "key": self.key or None,
            "tenant": self.tenant or None,
            "model": self.model or None,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "output_tokens": self.output_tokens,
            "status": self.status,
            "finish_reason": reasons[0] if len(set(reasons)) == 1 else list(reasons) or None,
            "error": self.error or None,
            "duration_s": round(time.perf_counter() - self._started, 6),
        }
        return orjson.dumps(shown, option=orjson.OPT_APPEND_NEWLINE)


class AuditLog:
    """Where records go. Without a path, nowhere."""

    def __init__(self, path: str | None, clock: Callable[[], float] = time.time) -> None:
        """`path`: a file, or "-" for the process's standard output. `clock` is the wall's."""
        self.num_written = 0
        self.num_lost = 0
        self._path = path
        self._clock = clock
        self._lines: deque[bytes] = deque()
        self._wake = threading.Event()
        self._closing = False
        self._file = -1
        self._thread: threading.Thread | None = None

    def record(self, request_id: str, protocol: str, endpoint: str, client: str) -> RequestRecord:
        return RequestRecord(request_id, protocol, endpoint, client, self._clock())

    def write(self, record: RequestRecord) -> None:
        """Never blocks, never raises."""
        if self._path is None:
            return
        if len(self._lines) >= MAX_WAITING:
            self.num_lost += 1
            return
        self._lines.append(record.line())
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="ellm-audit", daemon=True)
            self._thread.start()
        self._wake.set()

    def close(self, timeout_s: float = 5.0) -> None:
        """Write what waits."""
        self._closing = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def series(self) -> Iterator[tuple[Key, float]]:
        """What has been counted."""
        yield (declared.AUDIT_LINES.name, "written"), self.num_written
        yield (declared.AUDIT_LINES.name, "lost"), self.num_lost

    def gauges(self, router: str) -> Iterator[tuple[Key, float]]:
        """Nothing of what holds now."""
        return iter(())

    # In the thread

    def _run(self) -> None:
        while not self._closing or self._lines:
            self._wake.wait()
            self._wake.clear()
            if not self._closing:
                time.sleep(GATHER_S)
            lines = [self._lines.popleft() for _ in range(len(self._lines))]
            try:
                if lines:
                    self._put(b"".join(lines))
                    self.num_written += len(lines)
            except OSError as error:
                if not self.num_lost:  # once; the metrics go on counting
                    log.error("audit lines are lost: %s: %s", self._path, error.strerror)
                self.num_lost += len(lines)
        if self._file > 2:
            os.close(self._file)

    def _put(self, data: bytes) -> None:
        """Several processes may append to one file: a line is never torn, for it goes out in one write."""
        self._open()
        while data:
            data = data[os.write(self._file, data) :]

    def _open(self) -> None:
        assert self._path is not None
        if self._path == STDOUT:
            self._file = 1
            return
        try:
            found = os.stat(self._path)
            known = None if self._file < 0 else os.fstat(self._file)
            if known is not None and (found.st_ino, found.st_dev) == (known.st_ino, known.st_dev):
                return
        except FileNotFoundError:
            pass
        opened = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if self._file >= 0:
            os.close(self._file)
        self._file = opened


def audit_path(setting: str, guarded: bool) -> str | None:
    """Of `router.audit_log`; "auto" is the standard output of a server that has keys."""
    if setting == "auto":
        return STDOUT if guarded else None
    return None if setting in ("", "off") else setting


def peer_address(peer: str) -> str:
    """Of gRPC's "ipv4:127.0.0.1:5000"."""
    return unquote(peer.partition(":")[2] or peer)
