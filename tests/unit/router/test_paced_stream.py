"""A paced stream as its client sees it: the same events, at other times. On a clock that jumps."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import pytest
from support.events import deltas
from support.router_server import FOLDER, MODEL
from support.virtual_time import VirtualTimeLoop, run_virtually

from ellm.router.config import LimitsConfig, RouterConfig
from ellm.router.dispatch import Dispatcher
from ellm.router.generation import Generation
from ellm.router.metrics import RouterMetrics
from ellm.router.openai.answer import Answer
from ellm.router.openai.convert import Converter, ModelBounds
from ellm.router.openai.schema import CompletionRequest, parse
from ellm.router.openai.shapes import CompletionShape
from ellm.router.paced_stream import PacedStream
from ellm.router.pacing import LEAD_S, RATE
from ellm.router.sinks import EventStream
from ellm.router.tokenizer import Tokenizer
from ellm.worker.api import wire
from ellm.worker.api.errors import DeadlineExceeded
from ellm.worker.api.output import FinishReason, SequenceOutput, TokenLogprobs
from ellm.worker.local_channel import LocalDirectory

TOKENIZER = Tokenizer.load(FOLDER)
TEXT = "The quick brown fox jumps over the lazy dog and then goes home again. " * 4
IDS = TOKENIZER.encode(TEXT, add_special_tokens=False)
SLO_S = 0.1
STEP_S = RATE * SLO_S


@dataclass
class Client:
    """Takes events as they come; `slow_s` after each batch."""

    slow_s: float = 0.0
    raw: bytes = b""
    times: list[float] = field(default_factory=list)  # of each event but [DONE]

    async def read(self, stream: EventStream) -> None:
        loop = asyncio.get_running_loop()
        data: bytes | None = await stream.first()
        while data is not None:
            self.raw += data
            self.times.extend([loop.time()] * (data.count(b"data: {")))
            if self.slow_s:
                await asyncio.sleep(self.slow_s)
            data = await stream.more()
        assert self.raw.endswith(b"data: [DONE]\n\n")
        assert self.raw.count(b"[DONE]") == 1

    @property
    def events(self) -> list[dict[str, Any]]:
        return [
            json.loads(line[6:]) for line in self.raw.decode().split("\n\n") if line.startswith("data: {")
        ]

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in pairwise(self.times)]


class Paced:
    """One request with its stream, and what its worker says, when the test says so."""

    def __init__(self, config: RouterConfig | None = None, paced: bool = True, **body: Any) -> None:
        self.config = config or RouterConfig()
        self.body = {"prompt": [5, 6, 7], "max_tokens": len(IDS), "stream": True, **body}
        self.cut_off = 0
        self._paced = paced

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        request = parse(CompletionRequest, {"tpot_slo_ms": 1e3 * SLO_S, **self.body})
        job = await Converter(TOKENIZER, self.config.limits).completion(request, ModelBounds(4096, 8192))
        metrics = RouterMetrics(MODEL, loop.time)
        dispatcher = Dispatcher(LocalDirectory(), self.config, metrics, loop.time)
        generation = Generation(job, dispatcher, TOKENIZER, loop.time())
        answer = Answer(CompletionShape(), job, TOKENIZER, MODEL, "fp")
        if self._paced:
            self.stream: EventStream = PacedStream(generation, answer, self.config, self._cut_off, loop.time)
        else:
            size = self.config.limits.max_client_buffer_bytes
            self.stream = EventStream(generation, answer, size, self._cut_off)
        self.sequences = generation.sequences = generation._make(self.stream)

    def _cut_off(self) -> None:
        self.cut_off += 1

    def say(self, count: int = 1, end: FinishReason | None = None, index: int = 0) -> None:
        """The next tokens of a choice come."""
        sequence = self.sequences[index]
        start = len(sequence.output_ids)
        scores = None
        if sequence.sampling.logprobs is not None:
            scores = tuple(TokenLogprobs(-1.0, 1) for _ in range(count))
        output = SequenceOutput(
            sequence.request_id,
            sequence.attempt,
            start,
            tuple(IDS[start : start + count]),
            end,
            logprobs=scores,
        )
        sequence.accept(wire.pack_output(output), asyncio.get_running_loop().time())

    async def say_all(self, count: int, period_s: float, index: int = 0, ends: bool = True) -> None:
        for i in range(count):
            self.say(1, "length" if ends and i == count - 1 else None, index)
            if i < count - 1:
                await asyncio.sleep(period_s)


def run(
    request: Paced, work: Callable[[], Coroutine[Any, Any, None]], client: Client | None = None
) -> Client:
    """What the client has when the stream is over."""
    client = client or Client()

    async def whole() -> None:
        await request.start()
        await asyncio.gather(client.read(request.stream), work())
        request.stream.close()
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        assert loop.num_timers == 1  # of the test itself

    run_virtually(whole())
    return client


def test_a_parked_request_reads_as_a_steady_stream() -> None:
    def flow(paced: bool) -> Client:
        request = Paced(paced=paced)

        async def work() -> None:
            await request.say_all(40, 0.01, ends=False)
            await asyncio.sleep(40 * 0.97 * SLO_S - 0.39)  # parked until its slack is used up
            await request.say_all(20, 0.01)

        return run(request, work)

    plain, paced = flow(False), flow(True)
    assert max(plain.gaps) > 3.0
    assert max(paced.gaps) <= STEP_S + 0.003
    assert deltas(paced.events) == deltas(plain.events) == TOKENIZER.decode(IDS[:60])
    assert len(paced.times) == len(plain.times)
    assert paced.times[0] == plain.times[0]


def test_every_token_comes_by_its_own_slo_and_the_end_is_even_too() -> None:
    request = Paced(stream_options={"include_usage": True})
    client = run(request, lambda: request.say_all(50, 0.001))
    due = [max(0.0, STEP_S * i - LEAD_S) for i in range(50)]
    for i, (at, due_at) in enumerate(zip(client.times, due, strict=False)):
        assert due_at - 1e-6 <= at <= max(due_at, 0.001 * i) + 0.0011
        assert at <= SLO_S * i + 1e-6 or i == 0
    assert client.events[-1]["usage"]["completion_tokens"] == 50
    assert client.events[-2]["choices"][0]["finish_reason"] == "length"
    assert client.times[-1] == client.times[-2]  # the usage comes with the last token


@pytest.mark.parametrize(("hold_s", "hold_tokens"), [(1.0, 1000), (100.0, 10)])
def test_what_is_held_is_bounded(hold_s: float, hold_tokens: int) -> None:
    request = Paced(RouterConfig(pace_max_hold_s=hold_s, pace_max_hold_tokens=hold_tokens))
    client = run(request, lambda: request.say_all(60, 0.001))
    assert 0.9 <= client.times[-1] <= 0.06 + 11 * STEP_S
    assert deltas(client.events) == TOKENIZER.decode(IDS[:60])


def test_what_is_held_is_bounded_in_bytes() -> None:
    request = Paced(RouterConfig(limits=LimitsConfig(max_client_buffer_bytes=3000)), logprobs=0)
    held: list[int] = []

    async def work() -> None:
        for i in range(60):
            request.say(1, "length" if i == 59 else None)
            assert isinstance(request.stream, PacedStream)
            held.append(request.stream._held_bytes)
            await asyncio.sleep(0.001)

    client = run(request, work)
    assert 2000 < max(held) <= 3000
    assert deltas(client.events) == TOKENIZER.decode(IDS[:60])
    assert not request.cut_off


@pytest.mark.parametrize("stop", ["lazy", " fox jumps over the lazy cat"])
def test_stop_strings_are_seen_when_tokens_come_and_hold_nothing_up(stop: str) -> None:
    """Text that waited for a stop string which did not come is due with its first token."""
    request = Paced(stop=stop)
    said = 0

    async def work() -> None:
        nonlocal said
        while request.sequences[0].finished is None:
            said += 1
            request.say(1, "length" if said == 40 else None)
        assert asyncio.get_running_loop().time() == 0.0

    client = run(request, work)
    assert deltas(client.events) == TOKENIZER.decode(IDS[:40]).split(stop)[0]
    count = 0
    for event, at in zip(client.events, client.times, strict=True):
        # Token `count` is the first whose text is in this event, or the one whose text goes on in it.
        assert at <= SLO_S * count + 1e-6
        count += len(TOKENIZER.encode(event["choices"][0]["text"], add_special_tokens=False)) or 1


def test_choices_have_a_pace_each_and_the_stream_ends_after_all() -> None:
    request = Paced(n=2, stream_options={"include_usage": True})

    async def work() -> None:
        await request.say_all(30, 0.001, 0)
        await asyncio.sleep(0.5)
        await request.say_all(10, 0.001, 1)

    client = run(request, work)
    for index, count, start in ((0, 30, 0.0), (1, 10, 0.529)):
        assert deltas(client.events, index) == TOKENIZER.decode(IDS[:count])
        times = [
            at
            for at, event in zip(client.times, client.events, strict=True)
            if event["choices"] and event["choices"][0]["index"] == index
        ]
        assert times[0] == pytest.approx(start, abs=0.002)
        assert times[-1] - times[0] == pytest.approx(STEP_S * (count - 1) - LEAD_S, abs=0.003)
    assert client.events[-1]["usage"]["completion_tokens"] == 40


def test_a_worker_that_is_replaced_goes_unnoticed() -> None:
    """Held tokens flow on while the request moves; the schedule is that of its first token."""
    request = Paced()

    async def work() -> None:
        await request.say_all(20, 0.001, ends=False)
        await asyncio.sleep(1.5)
        sequence = request.sequences[0]
        sequence.attempt += 1
        moved = sequence.engine_request(asyncio.get_running_loop().time())
        assert (len(moved.output_ids), moved.tpot_slo_s) == (20, SLO_S)
        await request.say_all(20, 0.001)

    client = run(request, work)
    assert max(client.gaps) <= STEP_S + 0.002
    assert deltas(client.events) == TOKENIZER.decode(IDS[:40])


def test_an_error_comes_after_all_that_was_held() -> None:
    request = Paced()

    async def work() -> None:
        await request.say_all(20, 0.001, ends=False)
        request.stream.end(DeadlineExceeded("too long"))
        request.say()  # for nobody

    client = run(request, work)
    assert client.events[-1]["error"]["code"] == DeadlineExceeded.code
    text = "".join(event["choices"][0]["text"] for event in client.events[:-1])
    assert text == TOKENIZER.decode(IDS[:20])
    assert client.times[-1] < 0.03


def test_the_deadline_of_a_generation_that_has_ended_is_no_error() -> None:
    request = Paced(stream_options={"include_usage": True})

    async def work() -> None:
        await request.say_all(20, 0.001)
        await asyncio.sleep(0.5)
        request.stream.end(DeadlineExceeded("too long"))
        request.stream.end(DeadlineExceeded("too long"))

    client = run(request, work)
    assert deltas(client.events) == TOKENIZER.decode(IDS[:20])
    assert client.events[-1]["usage"]["completion_tokens"] == 20
    assert client.times[-1] == pytest.approx(0.519, abs=0.002)


def test_a_slow_client_is_cut_off_by_what_was_released_to_it() -> None:
    limits = LimitsConfig(max_client_buffer_bytes=2000)
    request = Paced(RouterConfig(limits=limits, pace_max_hold_tokens=0))
    client = run(request, lambda: request.say_all(60, 0.001), Client(slow_s=60.0))
    assert request.cut_off == 1
    request = Paced(RouterConfig(limits=replace(limits, max_client_buffer_bytes=10**6)))
    client = run(request, lambda: request.say_all(60, 0.001), Client(slow_s=60.0))
    assert request.cut_off == 0
    assert deltas(client.events) == TOKENIZER.decode(IDS[:60])


def test_a_client_that_leaves_takes_the_timer_with_it() -> None:
    request = Paced()

    async def whole() -> None:
        await request.start()
        await request.say_all(20, 0.001, ends=False)
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        assert loop.num_timers == 2
        request.stream.close()
        assert loop.num_timers == 1

    run_virtually(whole())
