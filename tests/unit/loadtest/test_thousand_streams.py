"""The client and the figures of `thousand_streams`, on a router in this process; what the baseline says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator

import pytest
from support.router_server import EchoWorker, RouterServer, router_config

from ellm.loadtest.sse_client import StreamResult
from ellm.loadtest.thousand_streams import (
    Round,
    all_at_once,
    compare,
    in_turn,
    on_path,
    open_together,
    row_of,
)


@pytest.fixture(scope="module")
def server() -> Iterator[RouterServer]:
    with RouterServer([EchoWorker(0)], router_config()) as running:
        yield running


def test_streams_and_requests_end_well(server: RouterServer) -> None:
    port = int(server.url.rpartition(":")[2])
    results = all_at_once(port, 20, 5)
    assert all(result.status == 200 and result.done for result in results)
    assert all(1 <= len(result.arrivals) <= 6 for result in results)  # the last says how it ended
    assert in_turn(port, 30, 4, 3)[0] == 30
    assert [result.done for result in all_at_once(1, 2, 1)] == [False, False]  # nobody is there


def test_how_many_were_open_together() -> None:
    times = [[0.0, 3.0], [1.0, 2.0], [1.5, 5.0], [4.0, 6.0], []]
    assert open_together([StreamResult(0.0, arrivals=arrivals) for arrivals in times]) == 3


def a_round(us: float, requests_per_s: float) -> Round:
    cpu_s = {"haproxy": us * 2e-4, "ServeReplica:x:Router": us * 3e-4, "gcs_server": us * 5e-4}
    peak = {"ServeReplica:x:Router": 2**27, "gcs_server": 2**20}
    return Round(0, 10, 1000, 990, 2.0, cpu_s, 0.1, 0.2, peak, {}, requests_per_s, 0.004)


def test_serves_cost_over_ours() -> None:
    rows = [row_of("ellm", [a_round(100, 300)] * 2), row_of("serve 2", [a_round(400, 100)])]
    compare(rows)
    assert rows[0]["us per token"] == pytest.approx(100)
    assert rows[0]["on the path"] == pytest.approx(50)
    assert (rows[0]["tokens/s"], rows[0]["router or ingress, MiB"]) == (500, 128)
    assert (rows[1]["ratio"], rows[1]["ratio requests/s"]) == (pytest.approx(4), pytest.approx(3))
    assert "ratio" not in rows[0]
    assert on_path({"ProxyActor": 1.0, "ServeReplica:plain:Engine.generate": 2.0, "raylet": 4.0}) == 3.0


def test_the_plain_ingress_says_what_ours_says(server: RouterServer) -> None:
    from ellm.loadtest.plain_ingress import Completions

    completions = Completions()
    ids = completions._tokenizer.encode("Lists have a method")
    asked = completions.request({"prompt": ids, "max_tokens": len(ids)})

    async def tokens() -> AsyncIterator[tuple[int, ...]]:
        for one in ids:
            yield (one,)

    async def read() -> list[bytes]:
        return [event async for event in completions.events(asked, tokens(), usage=False)]

    events = b"".join(asyncio.run(read())).decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    texts = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events[:-2]]
    assert "".join(choice["text"] for choice in texts).strip() == "Lists have a method"
    assert [choice["finish_reason"] for choice in texts][-2:] == [None, "length"]
