"""Rates of API keys: kept over time, over routers, and with the controller away; at the edge as 429."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.router_server import EchoWorker, RouterServer, router_config, wait_until

from ellm.cluster.api.guidance import TenantBudget
from ellm.cluster.api.view import RouterNote
from ellm.cluster.budgets import lend
from ellm.router import metrics_page
from ellm.router.admission import Admission
from ellm.router.errors import RateLimited
from ellm.router.keys import ApiKey, new_key, write_keys
from ellm.router.metrics_declared import COUNTERS
from ellm.router.tenants import TenantLimits
from ellm.worker.api.errors import QueueFull
from ellm.worker.api.report import WorkerReport

KEY = ApiKey("k", requests_per_s=10.0)


def admitted(limits: TenantLimits, key: ApiKey, times: list[float]) -> int:
    count = 0
    waits: list[float] = []
    for now in times:
        try:
            limits.enter(key, now)
            count += 1
        except RateLimited as error:
            waits.append(error.retry_after_s or 0.0)
    assert all(wait_s > 0.0 for wait_s in waits)
    return count


def alone(num_routers: int = 1) -> TenantLimits:
    return TenantLimits(lambda tenant: None, lambda: num_routers)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.0, 0.05), min_size=50, max_size=300), st.integers(1, 4))
def test_a_rate_is_kept_whatever_comes(gaps: list[float], num_routers: int) -> None:
    times = [sum(gaps[: i + 1]) for i in range(len(gaps))]
    rate = 10.0 / num_routers
    assert admitted(alone(num_routers), KEY, times) <= max(1.0, rate) + rate * times[-1] + 1e-6


def test_it_is_used_up_to_the_full() -> None:
    assert 100 <= admitted(alone(), KEY, [i * 0.01 for i in range(1000)]) <= 110


def test_who_has_no_limit_is_never_refused() -> None:
    assert admitted(alone(), ApiKey("free"), [0.0] * 1000) == 1000


def test_tokens_are_owed_and_waited_for() -> None:
    key = ApiKey("k", tokens_per_min=6000.0)  # 100 per second
    limits = alone()
    limits.enter(key, 0.0)
    limits.reserve(key, 1, 1000, 100, 0.0)
    with pytest.raises(RateLimited) as raised:
        limits.enter(key, 1.0)
    assert raised.value.retry_after_s == pytest.approx(9.01)
    limits.enter(key, 10.1)


def test_output_is_reserved_and_what_was_not_used_is_given_back() -> None:
    key = ApiKey("k", tokens_per_min=6000.0)  # 100 per second
    limits = alone()
    for now in (0.0, 1.0):
        limits.enter(key, now)
        limits.reserve(key, 1, 10, 1000, now)
        with pytest.raises(RateLimited):
            limits.enter(key, now)  # however many come at once
        limits.settle(key, 1000, 5, now)
        limits.enter(key, now)
        (use,) = limits.uses(now + 0.9)
        assert use.tokens_per_s < 20  # what was used, not what was reserved
    limits.settle(key, 10_000, 0, 1.0)  # more than a bucket holds
    limits.enter(key, 1.0)
    limits.reserve(key, 1, 0, 150, 1.0)
    with pytest.raises(RateLimited):
        limits.enter(key, 1.0)


def test_each_of_several_answers_is_a_request() -> None:
    limits = alone()
    limits.enter(KEY, 0.0)
    limits.reserve(KEY, 20, 0, 0, 0.0)
    with pytest.raises(RateLimited) as raised:
        limits.enter(KEY, 0.0)
    assert raised.value.retry_after_s == pytest.approx(1.1)
    limits.enter(KEY, 1.2)


def test_what_is_lent_counts_instead_of_an_even_share() -> None:
    lent = {"k": TenantBudget("k", 9.0, -1.0)}
    limits = TenantLimits(lent.get, lambda: 10)
    assert 90 <= admitted(limits, KEY, [i * 0.01 for i in range(1000)]) <= 100
    lent.clear()  # the controller is away: limit / N
    assert 9 <= admitted(limits, KEY, [10 + i * 0.01 for i in range(1000)]) <= 20


def test_several_routers_and_a_controller_keep_one_limit_and_follow_the_clients() -> None:
    """Two routers, 30 requests/s at one of them: it gets nearly all of 10/s; then the clients move."""
    lent: list[dict[str, TenantBudget]] = [{}, {}]
    routers = [TenantLimits(lent[i].get, lambda: 2) for i in (0, 1)]

    def seconds(count: int, busy: int, start: float) -> int:
        total = 0
        for second in range(count):
            times = [start + second + i / 30 for i in range(30)]
            total += admitted(routers[busy], KEY, times)
            end = start + second + 1
            notes = [RouterNote(f"r{i}", 1, router.uses(end)) for i, router in enumerate(routers)]
            for i, budgets in enumerate(lend(notes).values()):
                lent[i].clear()
                lent[i].update({budget.tenant: budget for budget in budgets})
        return total

    seconds(5, 0, 0.0)
    assert 90 <= seconds(10, 0, 5.0) <= 101
    seconds(10, 1, 15.0)
    assert 90 <= seconds(10, 1, 25.0) <= 101


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RouterServer, dict[str, str]]]:
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    made = {
        "slow": new_key(ApiKey("", requests_per_s=0.05)),
        "few": new_key(ApiKey("", tokens_per_min=60.0)),
        "fan": new_key(ApiKey("", requests_per_s=1.0)),
        "long": new_key(ApiKey("", tokens_per_min=6000.0)),
        "late": new_key(ApiKey("", priority=7)),
    }
    write_keys(path, [stored for stored, _ in made.values()])
    config = router_config(api_key_file=str(path), admin_key="chief")
    with RouterServer([EchoWorker(0)], config) as server:
        yield server, {name: plain for name, (_, plain) in made.items()}


def post(server: RouterServer, key: str, **body: object):  # type: ignore[no-untyped-def]
    with server.client(headers={"authorization": f"Bearer {key}"}) as client:
        return client.post("/v1/completions", json={"prompt": "hello", "max_tokens": 3, **body})


def test_a_rate_that_is_used_up_is_429_with_the_time_to_wait(
    limited: tuple[RouterServer, dict[str, str]],
) -> None:
    server, keys = limited
    assert post(server, "nobody").status_code == 401
    assert post(server, keys["slow"]).status_code == 200
    refused = post(server, keys["slow"])
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert 10 <= int(refused.headers["retry-after"]) <= 20
    assert post(server, keys["few"], max_tokens=60, ignore_eos=True).status_code == 200
    assert post(server, keys["few"]).status_code == 429
    assert post(server, keys["late"]).status_code == 200
    assert post(server, keys["fan"], n=8).status_code == 200
    assert post(server, keys["fan"]).status_code == 429
    assert post(server, keys["long"], max_tokens=200, stop=["e", "a", "i", "o", " "]).status_code == 200
    assert post(server, keys["long"], max_tokens=200).status_code == 200  # most was given back


def test_usage_is_counted_by_key_and_end(limited: tuple[RouterServer, dict[str, str]]) -> None:
    server, keys = limited
    ident = keys["late"].split("-")[1]
    ended = f'ellm_tenant_requests_total{{finished_reason="length",model_name="pydoc-5m",tenant="{ident}"}}'

    def value(name: str) -> float:
        with server.client(headers={"authorization": "Bearer chief"}) as client:
            lines = client.get("/metrics").text.splitlines()
        return next((float(line.split()[-1]) for line in lines if line.startswith(name)), 0.0)

    tokens = f'ellm_tenant_generation_tokens_total{{model_name="pydoc-5m",tenant="{ident}"}}'
    before, before_tokens = value(ended), value(tokens)
    assert post(server, keys["late"], n=2, max_tokens=5, ignore_eos=True).status_code == 200
    assert value(ended) == before + 2
    assert value(tokens) == before_tokens + 10


def test_a_keys_class_bounds_what_its_requests_ask_for(
    limited: tuple[RouterServer, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, keys = limited
    seen: list[int] = []
    engine = server.workers[0].front._engine
    submit = engine.submit
    monkeypatch.setattr(
        engine,
        "submit",
        lambda router_id, seq, requests: (
            seen.extend(request.priority for request in requests),
            submit(router_id, seq, requests),
        )[1],
    )
    for asked in (None, -50, 20):
        body = {} if asked is None else {"priority": asked}
        assert post(server, keys["late"], **body).status_code == 200
    wait_until(lambda: len(seen) == 3)
    assert seen == [7, 7, 20]


def test_usage_survives_a_failover_and_is_counted_once(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    stored, plain = new_key(ApiKey("", tokens_per_min=60_000.0))
    write_keys(path, [stored])
    workers = [EchoWorker(0, step_s=0.01), EchoWorker(1, step_s=0.01)]
    with RouterServer(workers, router_config(api_key_file=str(path))) as server:
        dispatcher = server.service.dispatcher
        wait_until(lambda: len(dispatcher.ready_links) == 2)
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(post, server, plain, max_tokens=100, ignore_eos=True)
            wait_until(lambda: any(link.live for link in dispatcher.links.values()), 10)
            time.sleep(0.3)
            hit = next(link for link in dispatcher.links.values() if link.live)
            victim = next(w for w in workers if w.channel.info.epoch == hit.info.epoch)
            server.on_loop(victim.channel.sever)
            assert answer.result(30).status_code == 200
        series = dict(server.service.metrics.series())
        text = metrics_page.text(COUNTERS, [], series).decode()
        assert sum(server.service.metrics.failovers.values()) == 1
        labels = f'model_name="pydoc-5m",tenant="{stored.key.id}"'
        assert f'ellm_tenant_requests_total{{finished_reason="length",{labels}}} 1.0' in text
        assert f"ellm_tenant_generation_tokens_total{{{labels}}} 100.0" in text


def test_a_full_router_names_a_time_from_the_backlog() -> None:
    slow = WorkerReport(seq=1, waiting_tokens=30_000, prefill_rate_tok_s=1000.0)
    fast = WorkerReport(seq=1, waiting_tokens=30_000, prefill_rate_tok_s=10_000.0, recompute_debt_s=0.5)
    for reports, expected in (((slow,), 30.0), ((slow, fast), 3.5), ((), 1.0)):
        admission = Admission(2, lambda reports=reports: reports)  # type: ignore[misc]
        admission.enter(2)
        with pytest.raises(QueueFull) as raised:
            admission.enter(1)
        assert raised.value.retry_after_s == expected
