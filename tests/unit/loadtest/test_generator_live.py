"""The line that a person watches, and the server of a known pace that the generator is measured against."""

from __future__ import annotations

import asyncio
import io
import time
from array import array

from ellm.loadtest.generator.http_client import HttpClient
from ellm.loadtest.generator.live import LiveLine, Progress, line_of, summed
from ellm.loadtest.generator.null_server import MODEL, serve
from ellm.loadtest.generator.record import Record
from ellm.loadtest.generator.sender import PreciseSelector
from ellm.loadtest.generator.target import Target


def ended(outcome: str = "completed") -> Record:
    record = Record(0, 0, 0, 1.0, 4, 3, outcome=outcome)  # type: ignore[arg-type]
    record.chunk_times = array("d", [1.2, 1.3, 1.4])
    record.output_tokens = 3
    return record


def test_the_line_says_how_it_goes() -> None:
    one, other = Progress(sent=5), Progress(sent=2)
    one.ended(ended())
    one.ended(ended("failed"))
    other.ended(ended("cancelled"))
    total = summed([one.take(0.5), other.take(0.25)])
    assert total.cpu_s == 0.75
    line = line_of(total, 12.0, 10, 3.5, 40.0)
    for part in ("12 s", "sent 7/10", "3.5 req/s", "in flight 4", "40 tok/s", "TTFT 200.0 ms", "errors 1"):
        assert part in line
    assert one.take().ttft_s == []  # what was taken is not shown twice


def test_without_a_terminal_a_line_comes_now_and_then() -> None:
    out = io.StringIO()
    line = LiveLine(10, out)
    for _ in range(50):
        line.show(Progress(sent=1, ttft_s=[0.2], tpot_s=[0.1]))
    assert out.getvalue() == ""
    line._shown -= 60.0
    line.show(Progress(sent=1))
    line.clear()
    assert out.getvalue().count("\n") == 1
    assert "TTFT 200.0 ms  TPOT 100.0 ms" in out.getvalue()


def test_the_null_server_keeps_its_pace() -> None:
    """Never early, and lateness does not add up: the ninth token is due 8 steps after the first."""

    async def test() -> list[float]:
        server = await serve("127.0.0.1", 0, 0.05, 0.02)
        async with server:
            port = server.sockets[0].getsockname()[1]
            target = Target("", "chat", False, "127.0.0.1", "127.0.0.1", port, "/v1/chat/completions", MODEL)
            client = HttpClient(target)
            got: asyncio.Future[Record] = asyncio.get_running_loop().create_future()
            body = {"messages": [{"role": "user", "content": "a b c"}], "max_tokens": 9, "stream": True,
                    "stream_options": {"include_usage": True}}  # fmt: skip
            client.send(client.encode(body), Record(0, 0, 0, 0.0, 3, 9), got.set_result)
            record = await asyncio.wait_for(got, 60)
            await client.close()
            assert (record.outcome, record.prompt_tokens, record.output_tokens) == ("completed", 3, 9)
            return [at - record.sent_s for at in record.chunk_times]

    times = asyncio.run(test())
    assert len(times) == 9
    assert all(at >= 0.05 + 0.02 * i - 0.002 for i, at in enumerate(times))


def test_the_loop_of_a_sender_wakes_no_sooner_than_asked() -> None:
    async def test() -> float:
        begun = time.monotonic()
        for _ in range(20):
            await asyncio.sleep(0.0004)
        return time.monotonic() - begun

    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(PreciseSelector())) as runner:
        assert runner.run(test()) >= 20 * 0.0004 * 0.9
