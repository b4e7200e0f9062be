"""The clients of a chaos run: requests that come by the clock, and streams that are checked to the last byte.

Every request is one of a few templates whose answers are known from an undisturbed pass. Nothing is sent
twice: what is not answered in full is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

PATH = "/v1/completions"
OPENINGS = (
    "The function returns", "Été à São Paulo: ", "class Größe:\n    ", "東京の天気は", "def parse(text) ->",
    "Raised when ", "Привет, ", "A module that 🙂 ",
)  # fmt: skip


@dataclass(slots=True)
class Answer:
    """What came of one request. Times are of `time.monotonic`."""

    template: int
    sent_at: float
    ended_at: float = 0.0
    status: int = 0
    texts: list[str] = field(default_factory=list)  # of each choice
    reasons: list[str | None] = field(default_factory=list)
    done: bool = False  # [DONE] was seen
    error: str = ""
    first_at: float = 0.0
    longest_pause_s: float = 0.0  # between two events
    pause_at: float = 0.0  # when that one ended

    @property
    def whole(self) -> bool:
        return self.done and not self.error and all(self.reasons)


@dataclass(slots=True)
class Template:
    """A request, and what an undisturbed server says to it."""

    body: dict[str, Any]
    texts: list[str] = field(default_factory=list)

    def fits(self, answer: Answer) -> bool:
        """Whether what came is what should have come, or the beginning of it where more should have come."""
        if answer.whole:
            return answer.texts == self.texts
        pairs = zip(answer.texts, self.texts, strict=False)
        return all(expected.startswith(text) for text, expected in pairs)


def make_templates(count: int, max_tokens: int, seed: int, model: str) -> list[Template]:
    """Half are greedy, half seeded at temperature 1 (a few hotter: any bytes may come); one in eight asks
    for two choices."""
    rng = random.Random(seed)
    templates = []
    for i in range(count):
        body: dict[str, Any] = {
            "model": model,
            "prompt": OPENINGS[i % len(OPENINGS)] + " ".join(str(rng.randint(0, 99)) for _ in range(8)),
            "max_tokens": max_tokens + rng.randint(0, max_tokens // 4),
            "ignore_eos": True,
            "stream": True,
            "seed": rng.randint(0, 2**31),
            "temperature": 0.0 if i % 2 == 0 else (2.0 if i % 8 == 3 else 1.0),
        }
        if i % 8 == 5:
            body["n"] = 2
        templates.append(Template(body))
    return templates


def with_stops(templates: list[Template]) -> list[Template]:
    """One in eight more, with a stop string found in the last third of a known answer."""
    more = []
    for template in templates[1::8]:  # not greedy: those soon repeat themselves
        text = template.texts[0]
        for start in range(2 * len(text) // 3, len(text) - 6):
            stop = text[start : start + 5]
            if "\ufffd" not in stop and text.find(stop) == start:
                body = {**template.body, "stop": [stop]}
                more.append(Template(body, [text[:start]]))
                break
    return more


async def ask(host: str, port: int, number: int, template: Template, request_id: str | None = None) -> Answer:
    """One streamed request. Whatever goes wrong stands in the answer."""
    answer = Answer(number, time.monotonic())
    choices = template.body.get("n", 1)
    answer.texts, answer.reasons = [""] * choices, [None] * choices
    payload = json.dumps(template.body).encode()
    head = (
        f"POST {PATH} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\nConnection: close\r\n"
    )
    if request_id is not None:
        head += f"X-Request-Id: {request_id}\r\n"
    writer = None
    try:
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(f"{head}\r\n".encode() + payload)
        await _read(reader, answer)
    except (OSError, ValueError, IndexError, asyncio.IncompleteReadError) as error:
        answer.error = answer.error or f"connection: {error!r}"
    finally:
        if writer is not None:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
    answer.ended_at = time.monotonic()
    if not answer.error and not answer.whole:
        answer.error = "connection: it ended before the answer did"
    return answer


async def _read(reader: asyncio.StreamReader, answer: Answer) -> None:
    answer.status = int((await reader.readline()).split(b" ")[1])
    chunked = False
    while (line := await reader.readline()).strip():
        chunked = chunked or line.lower().startswith(b"transfer-encoding: chunked")
    last = answer.sent_at
    async for line in _lines(reader, chunked):
        if answer.status != 200:
            answer.error = f"{answer.status}: {_code(line)}"
        if not line.startswith(b"data: "):
            continue
        now = time.monotonic()
        if answer.first_at and now - last > answer.longest_pause_s:
            answer.longest_pause_s, answer.pause_at = now - last, now
        answer.first_at = answer.first_at or now
        last = now
        if line.startswith(b"data: [DONE]"):
            answer.done = True
            return
        _take(json.loads(line[6:]), answer)
    if answer.status != 200 and not answer.error:
        answer.error = f"{answer.status}"


async def _lines(reader: asyncio.StreamReader, chunked: bool) -> AsyncIterator[bytes]:
    """Lines of the body, however it is cut into pieces."""
    rest = b""
    while True:
        if chunked:
            head = await reader.readline()
            if not head:
                raise ConnectionError("it broke off")
            size = int(head.split(b";")[0], 16)
            data = (await reader.readexactly(size + 2))[:size]
        else:
            data = await reader.read(65536)
        if not data:
            break
        *whole, rest = (rest + data).split(b"\n")
        for line in whole:
            yield line
    if rest:
        yield rest


def _code(line: bytes) -> str:
    try:
        return str(json.loads(line)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return line[:80].decode(errors="replace")


def _take(event: dict[str, Any], answer: Answer) -> None:
    if "error" in event:
        answer.error = f"stream: {event['error']['code']}"
        return
    for choice in event["choices"]:
        answer.texts[choice["index"]] += choice["text"]
        if choice["finish_reason"] is not None:
            answer.reasons[choice["index"]] = choice["finish_reason"]


async def learn(host: str, port: int, templates: list[Template], at_once: int) -> None:
    """Fill in the answers of an undisturbed server. Raises RuntimeError where one is not whole."""
    places = asyncio.Semaphore(at_once)

    async def one(number: int, template: Template) -> None:
        async with places:
            answer = await ask(host, port, number, template)
        if not answer.whole:
            raise RuntimeError(f"undisturbed, and not answered: {answer.error}")
        if template.texts and template.texts != answer.texts:
            raise RuntimeError("undisturbed, and not the same twice")
        template.texts = answer.texts

    await asyncio.gather(*(one(i, t) for i, t in enumerate(templates)))


class OpenLoop:
    """Sends a request every `1 / rate` seconds on average, whatever becomes of the others."""

    def __init__(self, host: str, port: int, templates: list[Template], rate: float, seed: int) -> None:
        self.answers: list[Answer] = []
        self._host, self._port = host, port
        self.templates = templates
        self._rate = rate
        self._rng = random.Random(seed)
        self._open: set[asyncio.Task[None]] = set()

    @property
    def num_open(self) -> int:
        return len(self._open)

    async def run(self, over: Callable[[], bool]) -> None:
        """Returns when it is `over` and everything sent before has ended."""
        due = time.monotonic()
        while not over():
            number = self._rng.randrange(len(self.templates))
            task = asyncio.create_task(self._one(number))
            self._open.add(task)
            task.add_done_callback(self._open.discard)
            due += self._rng.expovariate(self._rate)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
        await asyncio.gather(*self._open)

    async def _one(self, number: int) -> None:
        self.answers.append(await ask(self._host, self._port, number, self.templates[number]))
