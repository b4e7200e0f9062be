"""The generator's own HTTP: responses cut anywhere, kept connections that die, clients that leave."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Sequence

import pytest

from ellm.loadtest.generator.http_client import HttpClient
from ellm.loadtest.generator.null_server import serve
from ellm.loadtest.generator.record import Record
from ellm.loadtest.generator.target import Target

STREAM = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
Reply = Callable[[asyncio.StreamWriter], Awaitable[None]]


def event(**data: object) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def text(said: str, reason: str | None = None) -> bytes:
    return event(choices=[{"index": 0, "text": said, "finish_reason": reason}])


def delta(reason: str | None = None, **fields: object) -> bytes:
    return event(choices=[{"index": 0, "delta": fields, "finish_reason": reason}])


USAGE = event(
    choices=[],
    usage={"prompt_tokens": 9, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 4}},
)
DONE = b"data: [DONE]\n\n"


def chunked(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def a_record() -> Record:
    return Record(0, 0, 0, 0.0, 3, 5)


def target(port: int) -> Target:
    return Target("http://x", "completions", False, "127.0.0.1", "127.0.0.1", port, "/v1/completions", "m")


async def one(client: HttpClient, keep_text: bool = False) -> Record:
    ended: asyncio.Future[Record] = asyncio.get_running_loop().create_future()
    client.send(client.encode({"prompt": "é"}), a_record(), ended.set_result, keep_text)
    return await asyncio.wait_for(ended, 20)


def answered(replies: Sequence[Reply], count: int | None = None) -> list[Record]:
    """What the client records when request i gets reply i; connections are kept as long as they live."""
    seen = list(replies)
    handlers: set[asyncio.Task[None] | None] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handlers.add(asyncio.current_task())
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, IndexError):
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0]))
                await seen.pop(0)(writer)
                await writer.drain()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    async def test() -> list[Record]:
        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        async with server:
            client = HttpClient(target(server.sockets[0].getsockname()[1]))
            records = [
                await one(client, keep_text=True) for _ in range(len(replies) if count is None else count)
            ]
            await client.close()
            await asyncio.wait([task for task in handlers if task is not None], timeout=20)
        return records

    return asyncio.run(test())


def sends(*pieces: bytes, close: bool = False) -> Reply:
    async def reply(writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(0)
        if close:
            writer.close()

    return reply


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 10_000])
def test_a_stream_cut_anywhere_is_the_same_stream(size: int) -> None:
    events = [b": ping\n\n", text("日"), text(""), text("本", "length"), USAGE, DONE.replace(b"\n", b"\r\n")]
    whole = STREAM.encode() + b"".join(map(chunked, events)) + b"0\r\n\r\n"
    pieces = [whole[i : i + size] for i in range(0, len(whole), size)]
    (record,) = answered([sends(*pieces)])
    assert (record.outcome, record.error, record.text) == ("completed", "", "日本")
    assert (record.output_tokens, record.prompt_tokens, record.cached_tokens) == (5, 9, 4)
    assert len(record.chunk_times) == 3
    assert record.finish_reason == "length"
    assert sorted(record.chunk_times) == list(record.chunk_times)
    assert record.sent_s <= record.first_s <= record.end_s


def test_chunks_of_the_wire_need_not_be_events() -> None:
    data = text("a") + text("b", "stop") + USAGE + DONE
    parts = [data[i : i + 11] for i in range(0, len(data), 11)]
    (record,) = answered([sends(STREAM.encode(), *map(chunked, parts), b"0\r\n\r\n")])
    assert (record.text, len(record.chunk_times), record.error) == ("ab", 2, "")


def test_a_role_is_no_token_and_a_thought_is() -> None:
    data = (
        delta(role="assistant", content="")
        + delta(reasoning_content="hm")
        + delta(content="a")
        + delta("stop")
    )
    (record,) = answered([sends(STREAM.encode(), chunked(data + DONE), b"0\r\n\r\n")])
    assert len(record.chunk_times) == 2
    assert record.output_tokens == 2  # nobody has said how many
    assert record.text == "a"


def test_an_answer_that_is_not_streamed_is_read_too() -> None:
    body = json.dumps(
        {"choices": [{"text": "hi", "finish_reason": "stop"}], "usage": {"completion_tokens": 3}}
    )
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    (record,) = answered([sends((head + body).encode())])
    assert (record.outcome, record.output_tokens, len(record.chunk_times)) == ("completed", 3, 1)


def test_a_stream_to_the_end_of_the_connection() -> None:
    head = b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
    (record,) = answered([sends(head, text("a", "stop") + DONE, close=True)])
    assert (record.outcome, record.text) == ("completed", "a")


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (sends(STREAM.encode(), chunked(text("a")), b"0\r\n\r\n"), "ended without finish_reason"),
        (sends(STREAM.encode(), chunked(DONE), b"0\r\n\r\n"), "without output"),
        (sends(STREAM.encode(), chunked(text("a")), close=True), "connection lost"),
        (sends(STREAM.encode(), chunked(text("a") + event(error={"code": "worker_failed"})), b"0\r\n\r\n"),
         "in the stream: worker_failed"),
        (sends(STREAM.encode(), chunked(b"data: {oops\n\n"), b"0\r\n\r\n"), "no JSON"),
        (sends(b'HTTP/1.1 429 X\r\nContent-Length: 27\r\n\r\n{"error": {"code": "full"}}'), "HTTP 429: full"),
        (sends(b"HTTP/1.1 502 X\r\nContent-Length: 9\r\n\r\n<html>no\n"), "HTTP 502: <html>no"),
        (sends(b"SSH-2.0-OpenSSH\r\n\r\n"), "not HTTP"),
    ],
)  # fmt: skip
def test_what_is_no_whole_answer_is_a_failure_with_its_reason(reply: Reply, error: str) -> None:
    (record,) = answered([reply])
    assert record.outcome == "failed"
    assert error in record.error


def test_connections_are_kept_and_one_that_has_died_is_replaced() -> None:
    good = sends(STREAM.encode(), chunked(text("a", "stop") + DONE), b"0\r\n\r\n")
    gone = sends(close=True)  # just as the second request goes out
    records = answered([good, gone, good, good], count=3)
    assert [record.outcome for record in records] == ["completed"] * 3


def test_nobody_there_is_a_failure_not_a_crash() -> None:
    async def test() -> Record:
        return await one(HttpClient(target(1)))

    record = asyncio.run(test())
    assert record.outcome == "failed"
    assert record.error.startswith("cannot connect")
    assert record.sent_s == 0.0


def test_a_client_that_leaves_closes_its_connection_and_is_no_failure() -> None:
    async def test() -> tuple[Record, Record, Record]:
        server = await serve("127.0.0.1", 0, 0.001, 0.001)
        async with server:
            client = HttpClient(target(server.sockets[0].getsockname()[1]))
            ended: list[Record] = []
            call = client.send(
                client.encode({"max_tokens": 10_000, "stream": True}), a_record(), ended.append
            )
            late = client.send(
                client.encode({"max_tokens": 10_000, "stream": True}), a_record(), ended.append
            )
            while not call._record.chunk_times:
                await asyncio.sleep(0.001)
            call.cancel()
            call.cancel()
            late.cancel("timeout")
            assert len(ended) == 2
            after = await one(client)
            await client.close()
            return ended[0], ended[1], after

    cancelled, timed_out, after = asyncio.run(test())
    assert cancelled.outcome == "cancelled"
    assert len(cancelled.chunk_times) >= 1
    assert (timed_out.outcome, timed_out.error) == ("failed", "timeout")
    assert (after.outcome, after.output_tokens) == ("completed", 16)
