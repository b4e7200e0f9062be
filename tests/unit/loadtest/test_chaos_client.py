"""The judge of a chaos run must see what it is there to see: a lost stream, a wrong byte, a repeated one."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Sequence
from typing import Any

import pytest

from ellm.loadtest.chaos import parse
from ellm.loadtest.chaos_client import Answer, OpenLoop, Template, ask, make_templates, with_stops
from ellm.loadtest.chaos_faults import Fault
from ellm.loadtest.chaos_verdict import PAUSE_S, ROUTER_SLACK, against_plan, by_kind, judge, notes_of, passed
from ellm.router.config import RouterConfig

BODY = {"n": 1, "stream": True}
FAILED = b'data: {"error": {"code": "worker_failed"}}\n\n'


def event(text: str, index: int = 0, reason: str | None = None) -> bytes:
    data = {"choices": [{"index": index, "text": text, "finish_reason": reason}]}
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"


def asked(pieces: Sequence[bytes], status: str = "200 OK", *, whole: bool = True, n: int = 1) -> Answer:
    """What the client makes of a server that sends these pieces, cut anywhere, and ends the connection."""

    served = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 {status}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        for piece in pieces:
            writer.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        if whole:
            writer.write(b"0\r\n\r\n")
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        served.set()

    async def test() -> Answer:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            answer = await ask("127.0.0.1", port, 0, Template({**BODY, "n": n}))
            await served.wait()
            return answer

    return asyncio.run(asyncio.wait_for(test(), 60))


def test_a_stream_in_pieces_is_read_whole() -> None:
    data = (
        event("日") + event("本", 1) + event("語", 0, "length") + event("!", 1, "stop") + b"data: [DONE]\n\n"
    )
    answer = asked([data[i : i + 7] for i in range(0, len(data), 7)], n=2)
    assert answer.whole
    assert (answer.texts, answer.reasons) == (["日語", "本!"], ["length", "stop"])


@pytest.mark.parametrize(
    ("pieces", "status", "error"),
    [
        ([event("a")], "200 OK", "connection"),
        ([event("a", 0, "length")], "200 OK", "connection"),  # no [DONE]
        ([event("a"), b"data: [DONE]\n\n"], "200 OK", "connection"),  # no finish reason
        ([event("a"), FAILED, b"data: [DONE]\n\n"], "200 OK", "stream"),
        ([b'{"error": {"code": "unavailable"}}'], "503 Service Unavailable", "503: unavailable"),
    ],
)  # fmt: skip
def test_what_does_not_come_whole_is_an_error(pieces: list[bytes], status: str, error: str) -> None:
    answer = asked(pieces, status)
    assert answer.error.startswith(error)
    assert not answer.whole


def test_a_broken_connection_is_an_error() -> None:
    assert asked([event("a")], whole=False).error.startswith("connection")


def answer(text: str, error: str = "", ended_at: float = 0.0) -> Answer:
    return Answer(0, 0.0, ended_at, 200, [text], ["length"], not error, error)


def verdict(*answers: Answer, faults: Sequence[Fault] = ()) -> dict[str, Any]:
    loop = OpenLoop("", 0, [Template(BODY, ["one two"])], 1.0, 0)
    loop.answers = list(answers)
    rest = {
        "leaked blocks": 0,
        "live sequences": 0,
        "leaked ranks": 0,
        "leaked processes": [],
        "recovered": True,
        "not applied": {},
        "pauses too long": {},
        "workers at the start": 4,
        "workers at the end": 4,
    }
    return judge(loop, loop.templates, list(faults)) | rest


def test_lost_and_corrupted_streams_are_counted() -> None:
    assert passed(verdict(answer("one two")))
    for text in ("one tw", "one two!", "one  two", "one one two"):
        found = verdict(answer("one two"), answer(text))
        assert (found["corrupted"], passed(found)) == (1, False)
    broken = verdict(answer("one", "stream: worker_failed"), answer("onx", "connection: reset"))
    assert (broken["lost"], broken["corrupted"]) == (2, 1)
    assert not passed(verdict(answer("one two")) | {"leaked blocks": 1})
    assert not passed(verdict(answer("one two")) | {"leaked processes": [[1, "x"]]})
    assert not passed(verdict(answer("one two")) | {"workers at the end": 3})


def test_only_broken_connections_near_its_death_are_put_down_to_a_router() -> None:
    killed = [Fault("kill_router", at=100.0), Fault("kill_rank", at=200.0)]
    cut = "connection: reset"
    assert verdict(answer("one", cut, 100.2), faults=killed)["lost with their router"] == 1
    said_by_ingress = answer("", "500: Internal Server Error", 100.2)
    assert verdict(said_by_ingress, faults=killed)["lost with their router"] == 1
    for lost in (
        answer("", "500: internal_error", 100.2),
        answer("one", cut, 99.0),
        answer("one", cut, 200.2),
        answer("one", "stream: worker_failed", 100.2),
    ):
        assert verdict(lost, faults=killed)["lost"] == 1


def test_no_more_are_put_down_to_a_router_than_it_had_streams() -> None:
    killed = [Fault("kill_router", at=100.0, streams=3)]
    cut = [answer("one", "connection: reset", 100.2) for _ in range(3 + ROUTER_SLACK + 2)]
    found = verdict(*cut, faults=killed)
    assert (found["lost with their router"], found["lost"]) == (3 + ROUTER_SLACK, 2)


def test_a_run_must_do_what_was_asked_and_no_pause_may_be_long() -> None:
    loop = OpenLoop("", 0, [Template(BODY, ["one two"])], 1.0, 0)
    loop.answers = [answer("one two")]
    faults = [Fault(kind, at=at, recovered_s=5.0) for kind, at in (("drain", 100.0), ("stop_rank", 200.0))]
    asked = {"drain": 1, "stop_rank": 1}
    for pause_s, at, too_long in (
        (PAUSE_S - 0.1, 101.0, {}),
        (PAUSE_S + 0.1, 101.0, {"drain": PAUSE_S + 0.1}),
        (PAUSE_S + 0.1, 201.0, {}),
    ):
        loop.answers[0].longest_pause_s, loop.answers[0].pause_at = pause_s, at
        plan = against_plan(by_kind(loop, faults), faults, asked)
        assert plan == {"not applied": {}, "pauses too long": too_long}
        assert passed(verdict(answer("one two")) | plan) == (not too_long)
    plan = against_plan(by_kind(loop, faults), faults, {"drain": 2, "stop_rank": 1, "kill_rank": 1})
    assert plan["not applied"] == {"drain": 1, "kill_rank": 1}
    assert not passed(verdict(answer("one two")) | plan)


def test_the_notes_say_what_was_lost_and_what_was_not_done() -> None:
    plan = {"not applied": {"drain": 2}, "pauses too long": {"stop_rank": 13.0}, "leaked processes": []}
    notes = notes_of(verdict(answer("one two")) | plan | {"load average": [3.0, 12.4]}, 128)
    assert "1 requests of at least 128 output tokens, client retries 0: lost 0, corrupted 0" in notes[0]
    assert "Load average before and after: 3, 12." in notes
    assert notes[-2:] == [
        "stop_rank: a pause of 13.0 s, longer than a fault of this kind is to cost.",
        "drain was applied 2 times too few.",
    ]


def test_it_is_the_product_that_is_disturbed() -> None:
    assert parse([]).policy == RouterConfig().policy


def test_templates_are_of_every_kind() -> None:
    templates = make_templates(32, 100, 0, "m")
    assert sum(t.body["temperature"] == 0.0 for t in templates) == 16
    assert sum(t.body.get("n") == 2 for t in templates) == 4
    assert any(ord(c) > 0x7FF for t in templates for c in t.body["prompt"])
    assert all(t.body["max_tokens"] >= 100 for t in templates)
    for template in templates:
        template.texts = ["".join(chr(97 + i * i % 25) + str(i) for i in range(40))]
    for more in with_stops(templates):
        (stop,) = more.body["stop"]
        assert stop not in more.texts[0]
        assert len(more.texts[0]) > 20
