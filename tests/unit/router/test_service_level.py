"""SLOs, priority and pace per request: to the worker, over failovers, into metrics."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.events import deltas, stream
from support.router_server import EchoWorker, RouterServer, router_config, wait_until

from ellm.router.attainment import verdicts
from ellm.router.config import LimitsConfig
from ellm.router.sequence import Sequence
from ellm.router.service_level import MIN_TTFT_LEFT_S, ServiceLevel, with_headers
from ellm.worker.api.errors import InvalidRequest
from ellm.worker.api.request import EngineRequest, SamplingParams

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT = [10 + i for i in range(20)]
BODY: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 20, "ignore_eos": True}
TURN = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


@pytest.fixture
def served() -> Iterator[RouterServer]:
    with RouterServer([EchoWorker(0)], router_config()) as running:
        yield running


def caught(
    server: RouterServer, path: str, body: dict[str, Any], headers: dict[str, str] | None = None
) -> list[EngineRequest]:
    """What the worker was asked for."""
    worker = server.workers[0]
    worker.executor.gate.clear()
    try:
        with ThreadPoolExecutor(1) as pool, server.client() as client:
            answer: Future[httpx.Response] = pool.submit(client.post, path, json=body, headers=headers)
            wait_until(lambda: bool(worker.core._state.live))
            found = [sequence.request for sequence in list(worker.core._state.live.values())]
            worker.executor.gate.set()
            assert answer.result(20).status_code == 200
    finally:
        worker.executor.gate.set()
    return sorted(found, key=lambda request: request.request_id)


@pytest.mark.parametrize(("path", "body"), [(COMPLETIONS, BODY), (CHAT, TURN)])
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_a_worker_gets_them_with_every_choice(
    served: RouterServer, path: str, body: dict[str, Any], streamed: bool, n: int
) -> None:
    asked = {"tpot_slo_ms": 80, "ttft_slo_ms": 1500.5, "priority": -3}
    found = caught(served, path, {**body, **asked, "stream": streamed, "n": n})
    assert len(found) == n
    for request in found:
        assert (request.tpot_slo_s, request.priority) == (0.08, -3)
        assert request.ttft_slo_s is not None
        assert 0.5 < request.ttft_slo_s <= 1.5005


def test_headers_say_the_same_and_the_body_wins(served: RouterServer) -> None:
    headers = {"X-Ellm-Tpot-Slo-Ms": "80.5", "x-ellm-ttft-slo-ms": "2000", "X-ELLM-PRIORITY": "-7"}
    (request,) = caught(served, COMPLETIONS, BODY, headers)
    assert (request.tpot_slo_s, request.priority) == (0.0805, -7)
    assert request.ttft_slo_s is not None
    assert 1.0 < request.ttft_slo_s <= 2.0
    (request,) = caught(served, COMPLETIONS, {**BODY, "tpot_slo_ms": 30, "priority": 0}, headers)
    assert (request.tpot_slo_s, request.priority) == (0.03, 0)
    (request,) = caught(served, COMPLETIONS, {**BODY, "tpot_slo_ms": None}, headers)
    assert request.tpot_slo_s == 0.0805


def test_without_a_word_there_is_no_promise(served: RouterServer) -> None:
    (request,) = caught(served, COMPLETIONS, BODY)
    assert (request.tpot_slo_s, request.ttft_slo_s, request.priority) == (None, None, 0)


def test_the_workers_own_default_stands_for_those_that_bring_none() -> None:
    worker = EchoWorker(0)
    worker.front.info = replace(worker.front.info, tpot_slo_s=0.07, ttft_slo_s=5.0)
    with RouterServer([worker], router_config()) as server:
        (request,) = caught(server, COMPLETIONS, BODY)
        assert request.tpot_slo_s == 0.07
        assert request.ttft_slo_s is not None
        assert 4.0 < request.ttft_slo_s <= 5.0
        (request,) = caught(server, COMPLETIONS, {**BODY, "tpot_slo_ms": 50})
        assert request.tpot_slo_s == 0.05


SLO_FIELDS = ("tpot_slo_ms", "ttft_slo_ms")
BAD_SLOS = ("0", "-1", "0.5", "1e-9", "3600001", "1e300", '"80"', "true", "[80]", "{}")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((field, value) for field in SLO_FIELDS for value in BAD_SLOS),
        *(("priority", value) for value in ("101", "-101", "1.5", '"1"', "true", "1e3", str(10**30))),
        *(("stream_pace", value) for value in ("1", '"true"', "true")),  # the last: without a stream
    ],
)
@pytest.mark.parametrize(("path", "body"), [(COMPLETIONS, BODY), (CHAT, TURN)])
def test_a_bad_wish_is_named(
    client: httpx.Client, path: str, body: dict[str, Any], field: str, value: str
) -> None:
    text = json.dumps(body)[:-1] + f', "{field}": {value}}}'
    refused(client.post(path, content=text), field)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_what_is_no_number_is_no_json_either(client: httpx.Client, value: str) -> None:
    refused(client.post(COMPLETIONS, content=f'{{"prompt": "x", "tpot_slo_ms": {value}}}'), None)


def refused(response: httpx.Response, param: str | None) -> None:
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (param, "invalid_value")
    assert error["message"]


@pytest.mark.parametrize(
    ("header", "value"),
    [
        *(
            (f"x-ellm-{kind}-slo-ms", value)
            for kind in ("tpot", "ttft")
            for value in ("", "nan", "inf", "-5", "1_000", "5e3", "fast", "9" * 400, "0x10", "5,5")
        ),
        *(("x-ellm-priority", value) for value in ("", "high", "1.5", "9" * 30, "+1")),
        *(("x-ellm-stream-pace", value) for value in ("", "1", "yes")),
    ],
)
def test_a_bad_header_is_named(client: httpx.Client, header: str, value: str) -> None:
    refused(client.post(COMPLETIONS, json=BODY, headers={header: value}), header)


def test_a_header_out_of_bounds_is_refused_like_its_field(client: httpx.Client) -> None:
    refused(client.post(COMPLETIONS, json=BODY, headers={"x-ellm-tpot-slo-ms": "0"}), "tpot_slo_ms")
    refused(client.post(COMPLETIONS, json=BODY, headers={"x-ellm-priority": "-999"}), "priority")


def test_headers_fill_what_a_body_leaves_open() -> None:
    headers = [(b"x-ellm-priority", b"4"), (b"x-ellm-priority", b"5"), (b"x-ellm-other", b"?"), (b"te", b"x")]
    assert with_headers({"n": 1, "priority": None}, headers) == {"n": 1, "priority": 4}
    assert with_headers([], headers) == []
    bad = [(b"x-ellm-tpot-slo-ms", b"no")]
    assert with_headers({"tpot_slo_ms": 50}, bad) == {"tpot_slo_ms": 50}
    with pytest.raises(InvalidRequest):
        with_headers({}, bad)


def test_bounds_are_the_operators() -> None:
    limits = LimitsConfig(min_slo_ms=20.0, max_slo_ms=500.0, min_priority=0, max_priority=5)
    with RouterServer([EchoWorker(0)], router_config(limits=limits)) as server, server.client() as client:
        for fields in ({"tpot_slo_ms": 19.9}, {"ttft_slo_ms": 501}, {"priority": -1}, {"priority": 6}):
            refused(client.post(COMPLETIONS, json={**BODY, **fields}), next(iter(fields)))
        fine = {"tpot_slo_ms": 20, "ttft_slo_ms": 500, "priority": 5}
        assert client.post(COMPLETIONS, json={**BODY, **fine}).status_code == 200


def test_a_moved_request_keeps_its_slo_and_what_is_left_of_its_first_token() -> None:
    workers = [EchoWorker(0), EchoWorker(1)]
    with RouterServer(workers, router_config()) as server:
        for worker in workers:
            worker.executor.gate.clear()
        body = {**BODY, "tpot_slo_ms": 80, "ttft_slo_ms": 60_000, "priority": 2}
        with ThreadPoolExecutor(1) as pool, server.client() as client:
            answer = pool.submit(client.post, COMPLETIONS, json=body)
            wait_until(lambda: any(worker.core._state.live for worker in workers))
            home = next(worker for worker in workers if worker.core._state.live)
            (first,) = [sequence.request for sequence in list(home.core._state.live.values())]
            other = workers[1 - workers.index(home)]
            home.channel.sever()
            server.on_loop(lambda: server.directory.channels.pop(home.channel.info.epoch))
            wait_until(lambda: bool(other.core._state.live))
            (second,) = [sequence.request for sequence in list(other.core._state.live.values())]
            for worker in workers:
                worker.executor.gate.set()
            assert answer.result(20).status_code == 200
        assert (second.attempt, second.tpot_slo_s, second.priority) == (first.attempt + 1, 0.08, 2)
        assert first.ttft_slo_s is not None
        assert second.ttft_slo_s is not None
        assert second.ttft_slo_s < first.ttft_slo_s < 60.0


def test_what_is_left_of_the_time_to_the_first_token() -> None:
    level = ServiceLevel(0.1, 2.0)
    assert level.ttft_left_s(0.5, started=False) == 1.5
    assert level.ttft_left_s(9.0, started=False) == MIN_TTFT_LEFT_S  # late: never zero or negative
    assert level.ttft_left_s(0.5, started=True) is None
    assert level.ttft_left_s(-1.0, started=False) == 2.0
    assert ServiceLevel(0.1).ttft_left_s(0.5, started=False) is None


@pytest.mark.parametrize(("path", "body"), [(COMPLETIONS, BODY), (CHAT, {**TURN, "max_tokens": 20})])
def test_a_paced_stream_says_the_same_in_its_own_time(
    client: httpx.Client, path: str, body: dict[str, Any]
) -> None:
    body = {**body, "temperature": 0, "ignore_eos": True, "stream_options": {"include_usage": True}}
    plain = stream(client, path, body)
    paced = stream(client, path, {**body, "stream_pace": True, "tpot_slo_ms": 15})
    assert deltas(paced) == deltas(plain)
    assert paced[-1]["usage"]["completion_tokens"] == plain[-1]["usage"]["completion_tokens"] == 20


def elapsed_s(client: httpx.Client, **body: Any) -> float:
    headers = body.pop("headers", None)
    with client.stream("POST", COMPLETIONS, json={**BODY, "stream": True, **body}, headers=headers) as got:
        assert got.status_code == 200
        got.read()
    return got.elapsed.total_seconds()


def test_pace_is_asked_for_by_field_header_or_config(client: httpx.Client) -> None:
    least_s = 0.98 * 0.02 * 19 - 0.005 - 0.01  # of twenty tokens, 20 ms each
    assert elapsed_s(client, tpot_slo_ms=20, stream_pace=True) >= least_s
    assert elapsed_s(client, tpot_slo_ms=20, headers={"x-ellm-stream-pace": "true"}) >= least_s
    assert elapsed_s(client, tpot_slo_ms=2000) < 15  # far below what a pace would take
    refused(client.post(COMPLETIONS, json={**BODY, "stream": True, "stream_pace": True}), "stream_pace")
    with RouterServer([EchoWorker(0)], router_config(pace_streams=True)) as server, server.client() as paced:
        assert elapsed_s(paced, tpot_slo_ms=20) >= least_s
        assert elapsed_s(paced) < 15
        assert elapsed_s(paced, tpot_slo_ms=2000, stream_pace=False) < 15
        whole = paced.post(COMPLETIONS, json={**BODY, "tpot_slo_ms": 2000})
        assert whole.status_code == 200  # it is not a stream: nothing to pace
        assert whole.elapsed.total_seconds() < 15


def test_a_client_that_leaves_a_paced_stream_leaves_nothing(served: RouterServer) -> None:
    body = {**BODY, "max_tokens": 1000, "stream": True, "stream_pace": True, "tpot_slo_ms": 500}
    with served.client() as client, client.stream("POST", COMPLETIONS, json=body) as response:
        chunks = response.iter_raw()  # a generator that is dropped closes the response
        next(chunks)
        wait_until(lambda: served.workers[0].front.report().generation_tokens > 100)
    wait_until(lambda: served.service.dispatcher.admission.num_inflight == 0)
    wait_until(lambda: served.on_loop(lambda: served.workers[0].front.num_live) == 0)


def sequence_of(level: ServiceLevel, times: list[float], late: bool = False) -> Sequence:
    """That arrived at 100 and got its tokens at these times."""
    sequence = Sequence("r-0", 0, (1,), SamplingParams(max_tokens=99), None, None)  # type: ignore[arg-type]
    sequence.serve_at(level)
    sequence.arrived_at, sequence.late = 100.0, late
    sequence.output_ids = [7] * len(times)
    if times:
        sequence.first_token_at, sequence.token_at = times[0], times[-1]
    return sequence


ALL = ServiceLevel(0.1, 1.0)


@pytest.mark.parametrize(
    ("level", "times", "late", "failed", "kept", "missed"),
    [
        (ALL, [100.5, 100.6, 100.69], False, False, "tpot tpot_mean ttft request", ""),
        (ALL, [100.5, 100.6, 100.8], False, False, "tpot ttft request", "tpot_mean"),
        (ALL, [100.5, 100.6, 100.69], True, False, "tpot_mean ttft", "tpot request"),
        (ALL, [101.5, 101.6], False, False, "tpot tpot_mean", "ttft request"),
        (ALL, [100.5], False, False, "tpot tpot_mean ttft request", ""),
        (ALL, [100.5, 100.6], False, True, "", "tpot tpot_mean ttft request"),
        (ALL, [], False, True, "", "tpot tpot_mean ttft request"),
        (ServiceLevel(0.1), [109.0, 109.1], False, False, "tpot tpot_mean request", ""),
        (ServiceLevel(None, 1.0), [100.1, 900.0], False, False, "ttft request", ""),
        (ServiceLevel(), [100.1, 900.0], False, False, "", ""),
    ],
)
def test_what_attains_and_what_does_not(
    level: ServiceLevel, times: list[float], late: bool, failed: bool, kept: str, missed: str
) -> None:
    found = verdicts(sequence_of(level, times, late), failed)
    assert {slo for slo, attained in found.items() if attained} == set(kept.split())
    assert {slo for slo, attained in found.items() if not attained} == set(missed.split())


def counters(client: httpx.Client) -> Callable[..., float]:
    found = {
        (sample.name, sample.labels.get("slo")): sample.value
        for family in text_string_to_metric_families(client.get("/metrics").text)
        for sample in family.samples
    }
    return lambda name, slo=None: found.get((name, slo), 0.0)


def test_metrics_count_what_was_kept(served: RouterServer) -> None:
    with served.client() as client:
        assert client.post(COMPLETIONS, json=BODY).status_code == 200  # without a promise: counted nowhere
        promised = {**BODY, "tpot_slo_ms": 60_000, "ttft_slo_ms": 60_000, "n": 2}
        assert client.post(COMPLETIONS, json=promised).status_code == 200
        served.workers[0].executor.gate.clear()
        with ThreadPoolExecutor(1) as pool:
            late = pool.submit(client.post, COMPLETIONS, json={**BODY, "ttft_slo_ms": 1})
            wait_until(lambda: bool(served.workers[0].core._state.live))
            served.workers[0].executor.gate.set()
            assert late.result(20).status_code == 200
        now = counters(client)
    for slo, attained, missed in (("tpot", 2, 0), ("tpot_mean", 2, 0), ("ttft", 2, 1), ("request", 2, 1)):
        assert now("ellm_slo_attained_total", slo) == attained
        assert now("ellm_slo_missed_total", slo) == missed
        assert now("ellm_slo_attainment_ratio", slo) == pytest.approx(attained / (attained + missed))
    assert now("ellm_slo_goodput_tokens_total") == 40
    assert now("ellm_time_per_output_token_slo_ratio_count") == 2


def test_each_token_has_its_deadline() -> None:
    """Token i is due at t_first + SLO * (i + 4)."""

    class Silent:
        def emit(self, *_: object) -> None: ...

    class Text:
        def feed(self, token_ids: object) -> str:
            return ""

    def late(times: list[float]) -> bool:
        sequence = Sequence("r", 0, (1,), SamplingParams(max_tokens=99), Silent(), Text())  # type: ignore[arg-type]
        sequence.serve_at(ServiceLevel(0.1))
        for i, now in enumerate(times):
            rest = (None, None, None, None, 0, None) if i == 0 else ()
            sequence.accept(("r", 0, i, (7,), *rest), now)
        assert len(sequence.output_ids) == len(times)
        return sequence.late

    assert not late([50.0, 50.49, 50.59])
    assert late([50.0, 50.51, 50.52])
    assert not late([50.0, 50.1, 50.2, 50.69])
    assert late([50.0, 50.1, 50.2, 50.71])
