"""Workers die, fall silent, drain and come back; every request ends once, with the text it should have."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from support.events import deltas, read_events, stream
from support.router_server import EchoWorker, RouterServer, router_config, wait_until

from ellm.router.config import FailoverConfig, LimitsConfig
from ellm.router.failover import Hearing, PoisonList, SilenceWatch
from ellm.router.policies import Choice, Replica, RoutedRequest
from ellm.worker.api.errors import WorkerFailed

PROMPT = [10 + i for i in range(40)]
LONG: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 400, "ignore_eos": True, "return_token_ids": True}
EXPECTED = [PROMPT[i % 40] for i in range(400)]
FAST = FailoverConfig(suspect_s=0.3, fail_s=1.0)


@pytest.fixture
def pair() -> Iterator[RouterServer]:
    """Two workers, slow enough to be met in the middle of a request."""
    workers = [EchoWorker(i, step_s=0.002) for i in range(2)]
    with RouterServer(workers, router_config(heartbeat_s=0.1)) as running:
        yield running


@pytest.fixture
def quick_pair() -> Iterator[RouterServer]:
    """The same, with a router that gives up a silent worker after a second."""
    workers = [EchoWorker(i, step_s=0.002) for i in range(2)]
    with RouterServer(workers, router_config(failover=FAST)) as running:
        yield running


def in_background(server: RouterServer, count: int, body: dict[str, Any]) -> list[Any]:
    """Futures of `count` streams."""
    pool = ThreadPoolExecutor(count)

    def one() -> list[dict[str, Any]]:
        with server.client() as client:
            return stream(client, "/v1/completions", body)

    futures = [pool.submit(one) for _ in range(count)]
    pool.shutdown(wait=False)
    return futures


def ids_of(events: list[dict[str, Any]]) -> list[int]:
    return [i for event in events for c in event["choices"] for i in c.get("token_ids", [])]


def half_way(server: RouterServer) -> Callable[[], bool]:
    """Whether both workers have work that has begun."""
    return lambda: all(worker.front.report().generation_tokens > 50 for worker in server.workers)


def failovers(server: RouterServer, reason: str) -> int:
    return server.service.metrics.failovers[reason]


def test_a_dead_workers_requests_go_on_elsewhere(pair: RouterServer) -> None:
    futures = in_background(pair, 6, LONG)
    wait_until(half_way(pair))
    pair.workers[0].channel.sever()
    pair.on_loop(lambda: pair.directory.channels.pop("epoch0"))
    for future in futures:
        events = future.result(20)
        assert ids_of(events) == EXPECTED
        assert [e["choices"][0]["finish_reason"] for e in events][-1] == "length"
    assert failovers(pair, "death") == 3


def test_a_silent_workers_requests_go_on_elsewhere(quick_pair: RouterServer) -> None:
    """The stream stays open and nothing comes: a frozen process, or a lost network."""
    futures = in_background(quick_pair, 4, LONG)
    wait_until(half_way(quick_pair))
    silenced = quick_pair.workers[0]
    quick_pair.on_loop(lambda: silence(silenced))
    for future in futures:
        assert ids_of(future.result(20)) == EXPECTED
    assert sum(quick_pair.service.metrics.failovers.values()) >= 2


def silence(worker: EchoWorker) -> None:
    worker.front.publish = lambda outputs: None  # type: ignore[method-assign]
    worker.front._deliver = lambda outputs: None  # type: ignore[method-assign]
    worker.front._tick = lambda period: None  # type: ignore[method-assign]


def test_a_drained_worker_gives_its_requests_back_for_nothing(pair: RouterServer) -> None:
    futures = in_background(pair, 4, LONG)
    wait_until(half_way(pair))
    drained = pair.wait_for(pair.workers[0].front.drain(0.05))
    assert not drained
    for future in futures:
        assert ids_of(future.result(20)) == EXPECTED
    assert failovers(pair, "death") == 0
    assert failovers(pair, "drain") >= 1


def test_stop_strings_are_remembered_over_a_failover(pair: RouterServer) -> None:
    """The stop string's first half comes from one worker, the second from the other."""
    tokenizer = pair.service.tokenizer
    prompt = tokenizer.encode("abcdefghij " * 20 + "first half, second half", add_special_tokens=False)
    body = {"prompt": prompt, "max_tokens": 400, "stop": "half, second"}
    other = pair.workers[1]
    other.executor.gate.clear()
    with pair.client() as client:
        expected = tokenizer.decode(prompt).split("half, second")[0]
        future = ThreadPoolExecutor(1).submit(stream, client, "/v1/completions", body)
        wait_until(lambda: any(link.live for link in pair.service.dispatcher.links.values()))
        time.sleep(0.1)
        other.executor.gate.set()
        live = next(w for w in pair.workers if w.front.num_live)
        wait_until(lambda: live.front.report().generation_tokens > len(prompt) // 2)
        live.channel.sever()
        pair.on_loop(lambda: pair.directory.channels.pop(live.channel.info.epoch))
        assert deltas(future.result(20)) == expected
    assert failovers(pair, "death") == 1


def test_too_many_deaths_end_the_request_and_hold_its_prompt_back() -> None:
    workers = [EchoWorker(i, step_s=0.002) for i in range(4)]
    with RouterServer(workers, router_config()) as server, server.client() as client:
        (future,) = in_background(server, 1, LONG)
        wait_until(lambda: any(w.front.report().generation_tokens > 20 for w in workers))  # the stream began
        for _ in range(3):
            wait_until(lambda: any(w.front.num_live and not w.channel._severed for w in workers))
            dying = next(w for w in workers if w.front.num_live and not w.channel._severed)
            dying.channel.sever()
            server.on_loop(lambda dying=dying: server.directory.channels.pop(dying.channel.info.epoch))
        events = future.result(20)
        assert events[-1]["error"]["code"] == "worker_failed"
        refused = client.post("/v1/completions", json=LONG)
        assert refused.status_code == 500
        assert refused.json()["error"]["code"] == "worker_failed"
        other = client.post("/v1/completions", json={**LONG, "prompt": PROMPT[1:]})
        assert other.status_code == 200


def test_a_request_waits_for_a_worker_to_come() -> None:
    with RouterServer([], router_config(queue_timeout_s=10.0)) as server:
        wait_until(lambda: answers(server))
        (future,) = in_background(server, 1, {**LONG, "max_tokens": 8})
        wait_until(lambda: server.service.dispatcher.gate.num_waiting == 1)
        server.add(EchoWorker(0))
        assert ids_of(future.result(20)) == EXPECTED[:8]


def test_a_request_does_not_wait_for_ever() -> None:
    with RouterServer([], router_config(queue_timeout_s=0.2)) as server, server.client() as client:
        wait_until(lambda: answers(server))
        for streamed in (False, True):
            response = client.post("/v1/completions", json={**LONG, "stream": streamed})
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "unavailable"
            assert int(response.headers["retry-after"]) >= 1
        assert server.service.dispatcher.admission.num_inflight == 0


def answers(server: RouterServer) -> bool:
    try:
        return httpx.get(f"{server.url}/health").status_code == 200
    except httpx.TransportError:
        return False


def test_orphans_of_the_last_worker_wait_for_the_next(pair: RouterServer) -> None:
    futures = in_background(pair, 2, LONG)
    wait_until(half_way(pair))
    for worker in pair.workers:
        worker.channel.sever()
    pair.on_loop(pair.directory.channels.clear)
    wait_until(lambda: pair.service.dispatcher.gate.num_waiting == 2)
    with pair.client() as client:
        assert client.get("/health").status_code == 503
        assert client.get("/health/ready").status_code == 503
    pair.add(EchoWorker(7))
    for future in futures:
        assert ids_of(future.result(20)) == EXPECTED
    with pair.client() as client:
        assert client.get("/health/ready").status_code == 200


def test_a_failed_engine_is_failed_over(pair: RouterServer) -> None:
    futures = in_background(pair, 4, LONG)
    wait_until(half_way(pair))
    pair.workers[1].executor.error = RuntimeError("device lost")
    for future in futures:
        assert ids_of(future.result(20)) == EXPECTED


def test_beyond_the_limit_requests_are_refused_at_once() -> None:
    config = router_config(limits=LimitsConfig(max_inflight=4))
    with RouterServer([EchoWorker(0, step_s=0.005)], config) as server, server.client() as client:
        (future,) = in_background(server, 1, {**LONG, "n": 4, "max_tokens": 100})
        wait_until(lambda: server.service.dispatcher.admission.num_inflight == 4)
        refused = client.post("/v1/completions", json=LONG)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "queue_full"
        assert refused.headers["retry-after"] == "1"
        assert len(ids_of(future.result(20))) == 400
        assert client.post("/v1/completions", json={**LONG, "max_tokens": 2}).status_code == 200


@pytest.mark.parametrize("streamed", [False, True])
def test_a_deadline_ends_a_request(streamed: bool) -> None:
    config = router_config(limits=LimitsConfig(request_deadline_s=0.3))
    with RouterServer([EchoWorker(0, step_s=0.01)], config) as server, server.client() as client:
        response = client.post("/v1/completions", json={**LONG, "stream": streamed})
        if streamed:
            assert read_events(response)[-1]["error"]["code"] == "deadline_exceeded"
        else:
            assert response.status_code == 408
            assert response.json()["error"]["code"] == "deadline_exceeded"
        wait_until(lambda: server.on_loop(lambda: server.workers[0].front.num_live) == 0)
        server.workers[0].executor.gate.clear()
        held = client.post("/v1/completions", json={**LONG, "stream": streamed})
        server.workers[0].executor.gate.set()
        assert held.status_code == 408


def test_silence_counts_only_while_this_router_listens() -> None:
    watch = SilenceWatch(FailoverConfig(suspect_s=1.0, fail_s=3.0), 0.1, 0.0)
    assert watch.tick(10.0) is Hearing.HEARD  # our loop stood still for ten seconds
    assert watch.silence_s == pytest.approx(0.2)
    now, states = 10.0, []
    for _ in range(40):
        now += 0.1
        states.append(watch.tick(now))
    assert states.index(Hearing.SUSPECT) == pytest.approx(8, abs=1)
    assert states.index(Hearing.SILENT) == pytest.approx(28, abs=1)
    watch.heard()
    assert watch.hearing is Hearing.HEARD


def test_a_poisonous_prompt_is_held_back_for_ten_minutes() -> None:
    poison = PoisonList()
    poison.add([1, 2, 3], 0.0)
    with pytest.raises(WorkerFailed):
        poison.check([1, 2, 3], 599.0)
    poison.check([1, 23], 1.0)
    poison.check([1, 2, 3], 600.0)
    for i in range(2000):
        poison.add([i], 700.0)
    poison.check([0], 701.0)
    with pytest.raises(WorkerFailed):
        poison.check([1999], 701.0)


def test_a_routers_own_standstill_is_no_workers_death(quick_pair: RouterServer) -> None:
    """The router's loop stands still until its leases have run out: its streams are cut, its requests move
    for free."""
    futures = in_background(quick_pair, 2, LONG)
    wait_until(half_way(quick_pair))
    blocked = threading.Event()

    def block() -> None:
        time.sleep(1.5)
        for worker in quick_pair.workers:  # what the workers would do: they have not heard from us
            for box in list(worker.front._boxes.values()):
                worker.front._drop(box)
        blocked.set()

    quick_pair.on_loop(block)
    assert blocked.is_set()
    for future in futures:
        assert ids_of(future.result(20)) == EXPECTED
    assert failovers(quick_pair, "death") == 0
    assert failovers(quick_pair, "lag") == 2
    # It comes back as a new arrival: both workers serve it again.
    wait_until(lambda: len(quick_pair.service.dispatcher.ready_links) == 2)
    futures = in_background(quick_pair, 4, {**LONG, "max_tokens": 40})
    assert [ids_of(future.result(20)) for future in futures] == [EXPECTED[:40]] * 4
    assert all(len(w.front._boxes) == 1 and not w.front.num_live for w in quick_pair.workers)


def test_a_request_that_was_taken_waits_longer_than_a_new_one() -> None:
    config = router_config(queue_timeout_s=0.3, failover=FailoverConfig(hold_s=20.0))
    with RouterServer([EchoWorker(0, step_s=0.002)], config) as server, server.client() as client:
        (taken,) = in_background(server, 1, LONG)
        wait_until(half_way(server))
        server.workers[0].channel.sever()
        server.on_loop(server.directory.channels.clear)
        wait_until(lambda: server.service.dispatcher.gate.num_waiting == 1)
        assert client.post("/v1/completions", json=LONG).status_code == 503
        time.sleep(0.5)
        server.add(EchoWorker(1))
        assert ids_of(taken.result(20)) == EXPECTED


def test_a_moved_request_whose_client_leaves_waits_no_longer() -> None:
    config = router_config(failover=FailoverConfig(hold_s=60.0))
    with RouterServer([EchoWorker(0, step_s=0.002)], config) as server:
        dispatcher, body = server.service.dispatcher, {**LONG, "max_tokens": 2000, "stream": True}
        with server.client() as client, client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()  # whose end would be the response's
            next(lines)
            server.workers[0].channel.sever()
            server.on_loop(server.directory.channels.clear)
            wait_until(lambda: dispatcher.gate.num_waiting == 1)
        wait_until(lambda: dispatcher.gate.num_waiting == 0)
        wait_until(lambda: dispatcher.admission.num_inflight == 0)
        assert not dispatcher._rescue._placing


def test_a_moved_request_keeps_its_session(pair: RouterServer) -> None:
    asked: list[str | None] = []
    policy = pair.service.dispatcher._policy
    choose = policy.choose

    def noted(request: RoutedRequest, replicas: Sequence[Replica], now: float) -> Choice | None:
        asked.append(request.session_id)
        return choose(request, replicas, now)

    policy.choose = noted  # type: ignore[method-assign]
    with pair.client(headers={"x-session-id": "mine"}) as client, ThreadPoolExecutor(1) as pool:
        future = pool.submit(client.post, "/v1/completions", json=LONG)
        wait_until(lambda: any(w.front.report().generation_tokens > 50 for w in pair.workers))
        next(w for w in pair.workers if w.front.num_live).channel.sever()
        assert future.result(20).status_code == 200
    assert asked == ["mine", "mine"]
