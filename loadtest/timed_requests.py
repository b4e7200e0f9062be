"""Given requests at given times over HTTP, and the token ids that came back: what `ellm bench` does not keep.

The bodies ask for `return_token_ids`, which vLLM and our server know. One process of its own sends them all.
"""

from __future__ import annotations

import asyncio
import multiprocessing
from array import array
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from ellm.loadtest.generator.http_client import HttpClient
from ellm.loadtest.generator.options import Options
from ellm.loadtest.generator.record import Record
from ellm.loadtest.generator.sender import PreciseSelector, raise_file_limit
from ellm.loadtest.generator.sse import EventReader
from ellm.loadtest.generator.target import parse_target

OPEN_AHEAD = 64  # connections
START_S = 0.5
Body = dict[str, Any]


@dataclass(slots=True)
class Answers:
    """By request, in the order given. Seconds since the start."""

    token_times: list[array[float]]
    tokens: list[list[int]]
    finish_reasons: list[str]
    late_p99_s: float  # by which requests were sent after they were due


class TokenReader(EventReader):
    """Only chunks with token ids are output; the times of all tokens and the ids go into the record."""

    def __init__(self, record: Record, now: Any, keep_text: bool = False) -> None:
        super().__init__(record, now, keep_text)
        self._into = record
        self.tokens: list[int] = []

    def _take(self, event: Body, time: float) -> None:
        super()._take({name: value for name, value in event.items() if name != "choices"}, time)
        for choice in event.get("choices") or ():
            ids = choice.get("token_ids") or []
            if ids:
                self._into.chunk_times.append(time)
                self._into.chunk_tokens.append(len(ids))
                self.tokens += ids
            if reason := choice.get("finish_reason"):
                self._into.finish_reason = reason
                self.done = True

    def end(self) -> None:
        super().end()
        self._into.text = ",".join(map(str, self.tokens))


def send_timed(url: str, bodies: Sequence[Body], due_s: Sequence[float], timeout_s: float) -> Answers:
    """Send body i at `due_s[i]` (ascending); returns when all have ended. Raises RuntimeError if one
    fails."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        records = pool.submit(_send, url, list(bodies), list(due_s), timeout_s).result()
    failed = [record for record in records if record.outcome != "completed"]
    if failed:
        raise RuntimeError(f"{url}: {len(failed)} of {len(records)} requests failed: {failed[0].error}")
    late = sorted(record.late_s for record in records)
    return Answers(
        [array("d", record.token_times()) for record in records],
        [[int(word) for word in record.text.split(",")] for record in records],
        [record.finish_reason for record in records],
        late[int(0.99 * (len(late) - 1))],
    )


def _send(url: str, bodies: list[Body], due_s: list[float], timeout_s: float) -> list[Record]:
    raise_file_limit()
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(PreciseSelector())) as runner:
        return runner.run(_run(url, bodies, due_s, timeout_s))


async def _run(url: str, bodies: list[Body], due_s: list[float], timeout_s: float) -> list[Record]:
    loop = asyncio.get_running_loop()
    client = HttpClient(parse_target(Options(url)), TokenReader)
    encoded = [client.encode(body) for body in bodies]
    await client.open(min(OPEN_AHEAD, len(bodies)))
    records = [Record(i, i, 0, due, 0, 0) for i, due in enumerate(due_s)]
    client.start_s = loop.time() + START_S
    left, all_done, calls = len(bodies), asyncio.Event(), []

    def done(record: Record) -> None:
        nonlocal left
        left -= 1
        if not left:
            all_done.set()

    def send(i: int) -> None:
        calls.append(client.send(encoded[i], records[i], done))

    for i, due in enumerate(due_s):
        loop.call_at(client.start_s + due, send, i)
    try:
        await asyncio.wait_for(all_done.wait(), START_S + due_s[-1] + timeout_s)
    except TimeoutError:
        for call in calls:
            call.cancel(f"no end within {timeout_s:g} s")
    await client.close()
    return records
