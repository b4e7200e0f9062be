"""A request's timeline: while it runs, when it has ended, and after it has moved."""

from __future__ import annotations

import threading
from typing import Any

import httpx
from support.router_server import MODEL, EchoWorker, RouterServer, router_config, wait_until

from ellm.router.detokenize import Detokenizer
from ellm.router.sequence import Sequence, Verdict
from ellm.router.timeline import SIZE, Timelines, choice
from ellm.worker.api import wire
from ellm.worker.api.json_log import REQUEST_ID
from ellm.worker.api.output import SequenceOutput
from ellm.worker.api.request import SamplingParams

BODY = {"model": MODEL, "prompt": [7, 8, 9], "max_tokens": 5, "ignore_eos": True}


def names(one: dict[str, Any]) -> list[str]:
    return [event["event"] for event in one["events"]]


def ask(server: RouterServer, ident: str, **more: Any) -> None:
    with server.client(headers={"x-request-id": ident}) as mine:
        mine.post("/v1/completions", json={**BODY, **more})


def test_each_choice_has_its_own(server: RouterServer, client: httpx.Client) -> None:
    ask(server, "mine-1", n=2)
    found = client.get("/admin/requests/mine-1").json()
    assert (found["request_id"], found["model"], found["state"]) == ("mine-1", MODEL, "done")
    assert [one["index"] for one in found["choices"]] == [0, 1]
    for one in found["choices"]:
        assert names(one) == ["queued", "sent", "prefill", "first_token", "done"]
        assert (one["worker"], one["finish_reason"], one["num_output_tokens"]) == ("w0", "length", 5)
        times = [event["at_s"] for event in one["events"]]
        assert times == sorted(times)
        assert times[-1] <= found["duration_s"] + 0.001
    latest = client.get("/admin/requests").json()["requests"]
    assert latest[0]["request_id"] == "mine-1"
    missing = client.get("/admin/requests/nobody")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "request_not_found")


def test_one_that_runs_and_then_moves() -> None:
    workers = [EchoWorker(0), EchoWorker(1)]
    for worker in workers:
        worker.executor.gate.clear()
    with RouterServer(workers, router_config()) as server, server.client() as client:
        thread = threading.Thread(target=ask, args=(server, "mine-2"))
        thread.start()

        def shown() -> dict[str, Any]:
            found: dict[str, Any] = client.get("/admin/requests/mine-2").json()
            return found

        wait_until(lambda: "error" not in shown() and "sent" in names(shown()["choices"][0]))
        assert shown()["state"] == "running"
        first = shown()["choices"][0]["worker"]
        (former,) = (worker for worker in workers if worker.channel.info.worker_id == first)
        server.on_loop(former.front.end_streams)
        wait_until(lambda: "moved" in names(shown()["choices"][0]))
        for worker in workers:
            worker.executor.gate.set()
        thread.join(20)
        (one,) = shown()["choices"]
        assert names(one) == ["queued", "sent", "moved", "sent", "prefill", "first_token", "done"]
        assert one["num_moves"] == 1
        assert next(e["detail"] for e in one["events"] if e["event"] == "sent") == first


class Nobody:
    def emit(self, *_: object) -> None: ...

    def fail(self, *_: object) -> None: ...


def test_what_a_worker_tells_counts_from_when_it_came_there(server: RouterServer) -> None:
    detokenizer: Detokenizer = server.service.tokenizer.detokenizer(skip_special_tokens=True, after=(7,))
    sequence = Sequence("r-0", 0, (7, 8), SamplingParams(), Nobody(), detokenizer)  # type: ignore[arg-type]
    sequence.arrived_at = 100.0
    sequence.note("sent", 101.0, "w3")
    told = (("parked", 0.5, 0), ("restored", 2.0, 48))
    for index, events in enumerate(((), told)):
        output = SequenceOutput("r-0", 0, index, (9,), events=events)
        assert sequence.accept(wire.pack_output(output), 104.0) is Verdict.TAKEN
    found = choice(sequence)
    assert [(event["event"], event["at_s"], event["detail"]) for event in found["events"]] == [
        ("queued", 0.0, ""),
        ("sent", 1.0, "w3"),
        ("prefill", 1.0, ""),
        ("parked", 1.5, ""),
        ("restored", 3.0, "48 tokens"),
        ("first_token", 4.0, ""),
    ]


class Ended:
    arrived_at, tenant, sequences = 0.0, "", ()


def test_the_oldest_are_forgotten() -> None:
    timelines = Timelines(lambda: 1.0)
    for number in range(SIZE + 3):
        REQUEST_ID.set(f"r{number}")
        timelines.end(timelines.begin("m", Ended()))  # type: ignore[arg-type]
    assert timelines.find("r2") is None
    assert timelines.find("r3") is not None
    assert len(timelines.latest(10)) == 10
