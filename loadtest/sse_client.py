"""A lean streaming client: raw HTTP/1.1 over a socket, so that many streams cost the client little.

It counts `data:` events and keeps their arrival times; it does not parse them.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class StreamResult:
    """One streamed request. Times are of `time.perf_counter`."""

    sent_at: float
    status: int = 0
    arrivals: list[float] = field(default_factory=list)  # of each event but [DONE]
    done: bool = False  # [DONE] was seen


async def stream(
    host: str, port: int, path: str, body: dict[str, Any], key: str | None = None
) -> StreamResult:
    """POST `body` and read the event stream to its end. Raises OSError when the connection breaks."""
    payload = json.dumps(body).encode()
    head = [
        f"POST {path} HTTP/1.1",
        f"Host: {host}:{port}",
        "Content-Type: application/json",
        f"Content-Length: {len(payload)}",
        "Connection: close",
    ]
    if key is not None:
        head.append(f"Authorization: Bearer {key}")
    reader, writer = await asyncio.open_connection(host, port)
    result = StreamResult(time.perf_counter())
    try:
        writer.write("\r\n".join(head).encode() + b"\r\n\r\n" + payload)
        await writer.drain()
        status_line = await reader.readline()
        result.status = int(status_line.split(b" ")[1])
        while line := await reader.readline():
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                result.done = True
                continue
            result.arrivals.append(time.perf_counter())
    finally:
        writer.close()
    return result
