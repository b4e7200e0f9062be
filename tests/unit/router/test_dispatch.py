"""Who gets a request, what is known of workers, and what becomes of refusals."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.router_server import EchoWorker, RouterServer, router_config, wait_until

from ellm.router import subset as router_subset
from ellm.router.errors import typed_error
from ellm.router.failover import stands_still
from ellm.router.link import WorkerLink
from ellm.router.subset import ALL_UP_TO, CHOSEN, subset
from ellm.worker.api.errors import EllmError, PromptTooLong, QueueFull, WorkerFailed
from ellm.worker.api.output import SequenceOutput
from ellm.worker.api.report import WorkerReport
from ellm.worker.api.request import EngineRequest
from ellm.worker.loop import refusal


@pytest.fixture
def three() -> Iterator[RouterServer]:
    with RouterServer([EchoWorker(i) for i in range(3)], router_config(heartbeat_s=0.1)) as server:
        wait_until(lambda: len(server.service.dispatcher.ready_links) == 3)
        yield server


def loads(server: RouterServer) -> list[int]:
    return [len(link.live) for link in server.service.dispatcher.links.values()]


def test_a_burst_is_spread_evenly(three: RouterServer) -> None:
    """Thirty at once: what was sent and is not reported yet counts."""
    for worker in three.workers:
        worker.executor.gate.clear()

    def ask(number: int) -> int:
        with three.client() as client:
            body = {"prompt": [5 + number, 6, 7], "max_tokens": 3}
            return client.post("/v1/completions", json=body).status_code

    with ThreadPoolExecutor(30) as pool:
        futures = [pool.submit(ask, number) for number in range(30)]
        wait_until(lambda: sum(loads(three)) == 30, 10)
        assert loads(three) == [10, 10, 10]
        for worker in three.workers:
            worker.executor.gate.set()
        assert [future.result() for future in futures] == [200] * 30
    # Once the workers have reported them, nothing is counted twice.
    links = three.service.dispatcher.links.values()
    wait_until(lambda: all(link.replica.num_requests == 0 for link in links))


def test_a_heartbeat_keeps_the_lease_of_an_idle_router(three: RouterServer) -> None:
    front = three.workers[0].front
    heard = [box.last_heard for box in front._boxes.values()]
    wait_until(lambda: [box.last_heard for box in front._boxes.values()] > heard)


def test_a_draining_worker_gets_nothing_new(three: RouterServer) -> None:
    three.on_loop(three.workers[0].front.begin_drain)
    with three.client() as client:
        for number in range(12):  # also the first ones, which it may have to give back
            body = {"prompt": [5 + number, 6], "max_tokens": 2}
            assert client.post("/v1/completions", json=body).status_code == 200
        states = {w["id"]: w["state"] for w in client.get("/admin/workers").json()["workers"]}
    assert states == {"w0": "draining", "w1": "ready", "w2": "ready"}
    assert three.service.metrics.failovers["death"] == 0


def test_a_worker_that_leaves_the_directory_keeps_its_requests(three: RouterServer) -> None:
    with three.client() as client, ThreadPoolExecutor(3) as pool:
        body = {"prompt": [5, 6], "max_tokens": 1000, "ignore_eos": True}
        futures = [pool.submit(client.post, "/v1/completions", json=body) for _ in range(3)]
        wait_until(lambda: loads(three) == [1, 1, 1])
        three.on_loop(lambda: three.directory.channels.pop("epoch0"))
        assert [future.result().status_code for future in futures] == [200] * 3
    assert not three.service.metrics.failovers


def test_a_workers_own_errors_keep_their_type(three: RouterServer) -> None:
    for worker in three.workers:
        front = worker.front
        front._engine.submit = lambda router_id, seq, requests, front=front: front.publish(  # type: ignore
            [
                SequenceOutput(r.request_id, r.attempt, 0, (), "error", error=("queue_full", "full here"))
                for r in requests
            ]
        )
    with three.client() as client:
        for streamed in (False, True):
            response = client.post("/v1/completions", json={"prompt": "x", "stream": streamed})
            assert response.status_code == 429
            assert response.json()["error"]["message"] == "full here"
            assert response.headers["retry-after"] == "1"


def refuse(worker: EchoWorker, retry_after_s: float, times: int) -> list[str]:
    """Let a worker say to its next `times` requests that it is full; returns what it refuses as it does."""
    front, refused = worker.front, list[str]()
    submit = front._engine.submit

    def maybe(router_id: str, seq: int, requests: list[EngineRequest]) -> None:
        full = requests if len(refused) < times else []
        refused.extend(r.request_id for r in full)
        front.publish([refusal(r, QueueFull("full here", retry_after_s=retry_after_s)) for r in full])
        submit(router_id, seq, [r for r in requests if r not in full])

    front._engine.submit = maybe  # type: ignore[method-assign, assignment]
    return refused


def test_a_full_worker_is_no_reason_to_refuse_while_another_has_room(three: RouterServer) -> None:
    refused = [refuse(worker, 7.0, 1000) for worker in three.workers[:2]]
    with three.client() as client:
        for number in range(12):
            body = {"prompt": [5 + number, 6], "max_tokens": 2}
            assert client.post("/v1/completions", json=body).status_code == 200
    assert any(refused)
    assert three.service.metrics.failovers["full"] >= sum(map(len, refused))


def test_when_all_are_full_the_answer_names_the_shortest_time(three: RouterServer) -> None:
    for worker, retry_after_s in zip(three.workers, (40.0, 7.0, 23.0), strict=True):
        refuse(worker, retry_after_s, 1000)
    with three.client() as client:
        response = client.post("/v1/completions", json={"prompt": [5, 6], "max_tokens": 2})
    assert response.status_code == 429
    assert response.headers["retry-after"] == "7"


def test_a_request_that_was_taken_once_waits_for_room(three: RouterServer) -> None:
    """Its worker goes, and the others are full for a while."""
    for worker in three.workers:
        worker.executor.gate.clear()
    with three.client() as client, ThreadPoolExecutor(1) as pool:
        body = {"prompt": [5, 6], "max_tokens": 40, "ignore_eos": True}
        future = pool.submit(client.post, "/v1/completions", json=body)
        wait_until(lambda: sum(w.front.num_live for w in three.workers) == 1)
        home = next(w for w in three.workers if w.front.num_live)
        refused = [refuse(w, 0.05, 2) for w in three.workers if w is not home]
        three.wait_for(home.front.drain(0.0))
        for worker in three.workers:
            worker.executor.gate.set()
        assert future.result().status_code == 200
    assert [len(found) for found in refused] == [2, 2]
    assert three.service.metrics.failovers == {"drain": 1, "full": 4}


def test_errors_by_their_code() -> None:
    assert isinstance(typed_error(("context_length_exceeded", "m")), PromptTooLong)
    assert isinstance(typed_error(("queue_full", "m")), QueueFull)
    assert isinstance(typed_error(("worker_failed", "m")), WorkerFailed)
    for error in (("internal_error", "path/of/file.py"), ("no_such_code", "secret"), None):
        assert type(typed_error(error)) is EllmError
        assert typed_error(error).message == "internal error"


def test_idle_workers_outside_the_subset_are_left(
    three: RouterServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with three.client() as client, ThreadPoolExecutor(3) as pool:
        body = {"prompt": [5, 6], "max_tokens": 1000, "ignore_eos": True}
        futures = [pool.submit(client.post, "/v1/completions", json=body) for _ in range(3)]
        wait_until(lambda: loads(three) == [1, 1, 1])
        for worker in three.workers:
            worker.executor.gate.clear()
        monkeypatch.setattr(router_subset, "ALL_UP_TO", 3)
        monkeypatch.setattr(router_subset, "CHOSEN", 2)
        three.add(EchoWorker(3))
        time.sleep(0.3)
        assert sum(loads(three)) == 3  # those that work stay
        for worker in three.workers:
            worker.executor.gate.set()
        assert [future.result().status_code for future in futures] == [200] * 3
        dispatcher = three.service.dispatcher
        chosen = subset((w.channel.info.epoch for w in three.workers), dispatcher.router_id)
        wait_until(lambda: set(dispatcher.links) == chosen)
        wait_until(lambda: sum(w.front.num_streams for w in three.workers) == 2)
        assert client.post("/v1/completions", json={"prompt": [5], "max_tokens": 2}).status_code == 200
    assert dispatcher.num_lost == 0
    assert not three.service.metrics.failovers


def test_few_workers_are_all_used() -> None:
    epochs = [f"e{i}" for i in range(ALL_UP_TO)]
    assert subset(epochs, "r") == set(epochs)


def test_of_many_each_router_uses_some_and_all_are_used() -> None:
    epochs = [f"e{i}" for i in range(200)]
    chosen = {router: subset(epochs, f"r{router}") for router in range(40)}
    assert {len(found) for found in chosen.values()} == {CHOSEN}
    counts = Counter(epoch for found in chosen.values() for epoch in found)
    assert len(counts) == 200
    # One worker less changes one line at most.
    for router, found in chosen.items():
        assert len(subset(epochs[1:], f"r{router}") - found) <= 1


def test_a_worker_whose_steps_stand_still_gets_new_requests_only_where_nothing_else_is(
    three: RouterServer,
) -> None:
    """It speaks on and holds what it has; nobody knows yet whether it comes round."""
    links = list(three.service.dispatcher.links.values())

    def stand_still(link: WorkerLink, still: bool) -> None:
        front = three.workers[int(link.info.worker_id[1:])].front
        front._engine.since_progress_s = lambda: 2.5 if still else 0.0  # type: ignore[method-assign]

    stand_still(links[0], True)
    wait_until(lambda: links[0].suspect)
    assert links[0].ready
    with three.client() as client:
        for number in range(9):
            body = {"prompt": [5 + number, 6], "max_tokens": 2}
            assert client.post("/v1/completions", json=body).status_code == 200
        assert three.workers[int(links[0].info.worker_id[1:])].core.report(0.0).num_steps == 0
        for link in links[1:]:
            stand_still(link, True)
        wait_until(lambda: all(link.suspect for link in links))
        assert client.post("/v1/completions", json=body).status_code == 200


def test_a_standstill_is_measured_in_the_workers_own_steps() -> None:
    assert not stands_still(WorkerReport(1, since_last_step_s=1.9))
    assert stands_still(WorkerReport(1, since_last_step_s=2.1))
    assert not stands_still(WorkerReport(1, since_last_step_s=4.0, step_time_s=0.5))
    assert stands_still(WorkerReport(1, since_last_step_s=5.1, step_time_s=0.5))
