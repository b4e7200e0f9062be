"""OpenAI's streaming endpoints as a generator speaks them: kept connections, callbacks, few tasks."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Callable

from ellm.loadtest.generator.http_connection import HttpConnection
from ellm.loadtest.generator.record import Record
from ellm.loadtest.generator.sse import EventReader
from ellm.loadtest.generator.target import Target

ERROR_BYTES = 2_000  # of an error's body that are read

Done = Callable[[Record], None]


class HttpClient:
    """All requests of one process. `start_s` is the run's zero by the loop's clock. `reader` takes an
    answer's events into its record."""

    def __init__(self, target: Target, reader: type[EventReader] = EventReader) -> None:
        self._target = target
        self.reader = reader
        self._loop = asyncio.get_running_loop()
        self.start_s = 0.0
        self._idle: list[HttpConnection] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._ssl = ssl.create_default_context() if target.tls else None
        lines = [
            f"POST {target.path} HTTP/1.1",
            f"Host: {target.authority}",
            "Content-Type: application/json",
            "Accept: text/event-stream",
            *(f"{name}: {value}" for name, value in target.headers.items()),
            "Content-Length: ",
        ]
        self._head = "\r\n".join(lines).encode()

    def now(self) -> float:
        return self._loop.time() - self.start_s

    def encode(self, body: dict[str, object]) -> bytes:
        """The whole request, ready to be written."""
        data = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
        return b"%b%d\r\n\r\n%b" % (self._head, len(data), data)

    def send(self, request: bytes, record: Record, done: Done, keep_text: bool = False) -> HttpCall:
        """Send now, on a kept connection or a new one; `done(record)` is called once."""
        call = HttpCall(self, request, record, done, keep_text)
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed:
                call.write(connection)
                return call
        self.connect(call)
        return call

    def connect(self, call: HttpCall) -> None:
        """Open a connection for `call`, in the background."""
        task = self._loop.create_task(self._connect(call))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def open(self, count: int) -> None:
        """Have `count` idle connections before the first request needs one. Raises OSError."""
        self._idle += await asyncio.gather(*(self._new() for _ in range(count)))

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        for connection in self._idle:
            connection.cut()
        await asyncio.sleep(0)

    def release(self, connection: HttpConnection) -> None:
        self._idle.append(connection)

    async def _connect(self, call: HttpCall) -> None:
        try:
            connection = await self._new()
        except OSError as error:
            call.broken(f"cannot connect: {error.strerror or error}")
            return
        if call.ended:
            self.release(connection)
        else:
            call.write(connection)

    async def _new(self) -> HttpConnection:
        _, connection = await self._loop.create_connection(
            lambda: HttpConnection(self.release),
            self._target.address,
            self._target.port,
            ssl=self._ssl,
            server_hostname=self._target.host if self._ssl else None,
        )
        return connection


class HttpCall:
    """One request on its way: an Exchange that fills a record in."""

    def __init__(
        self, client: HttpClient, request: bytes, record: Record, done: Done, keep_text: bool
    ) -> None:
        self._client = client
        self._request = request
        self._record = record
        self._done = done
        self._reader = client.reader(record, client.now, keep_text)
        self._connection: HttpConnection | None = None
        self._retried = False
        self._answered = False
        self._streamed = True
        self._rest = b""
        self.ended = False

    def write(self, connection: HttpConnection) -> None:
        self._connection = connection
        if not self._retried:
            self._record.sent_s = self._client.now()
        connection.send(self._request, self)

    def head(self, status: int, headers: dict[bytes, bytes]) -> None:
        self._answered = True
        self._record.status = status
        self._streamed = status == 200 and b"event-stream" in headers.get(b"content-type", b"")

    def body(self, data: bytes) -> None:
        if self._streamed:
            self._reader.feed(data)
        elif self._record.status == 200 or len(self._rest) < ERROR_BYTES:
            self._rest += data

    def finished(self) -> None:
        record = self._record
        if record.status != 200:
            record.error = f"HTTP {record.status}: {error_code(self._rest)}"
        else:
            if not self._streamed:
                self._reader.whole(self._rest)
            self._reader.end()
        self._end("failed" if record.error else "completed")

    def broken(self, why: str) -> None:
        kept = self._connection is not None and self._connection.used
        if kept and not self._answered and not self._retried and not self.ended:
            # The server may close a kept connection just as a request goes out: that is no answer of its.
            self._retried = True
            self._client.connect(self)
            return
        self._reader.end()
        self._record.error = why
        self._end("failed")

    def cancel(self, error: str = "") -> None:
        """Close its connection, as a client does that goes away; with `error` it has failed."""
        if self.ended:
            return
        if self._connection is not None:
            self._connection.cut()
        self._reader.end()
        self._record.error = error
        self._end("failed" if error else "cancelled")

    def _end(self, outcome: str) -> None:
        if self.ended:
            return
        self.ended = True
        self._record.outcome = outcome  # type: ignore[assignment]
        self._record.end_s = self._client.now()
        self._done(self._record)


def error_code(body: bytes) -> str:
    """What an error's body says in few words, the same for all requests that failed for one reason."""
    try:
        error = json.loads(body)["error"]
        return str(error.get("code") or error.get("message")) if isinstance(error, dict) else str(error)
    except (ValueError, KeyError, TypeError):
        return body[:80].decode(errors="replace").strip() or "no body"
