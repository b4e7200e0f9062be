"""SLOs from a client's header to the engine's scheduler, and paced streams while requests are parked.

One worker whose KV pool holds a few of the requests, with a host tier behind it.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from collections.abc import Iterator
from itertools import pairwise
from statistics import median
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.served import ELLM, Served, served, wait_for

from ellm.deploy.ports import free_ports

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

SLO_MS = 60
NUM_CLIENTS, NUM_TOKENS = 32, 240
NUM_FITTING = 5  # clients whose KV the pool holds to their ends: 264 tokens each, of 1,536
SLO_STEPS = 6.0  # of those, for a token of everybody: a little less than 32 / 5
ONE: dict[str, Any] = {"prompt": "The list method append", "max_tokens": 8, "ignore_eos": True}


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    (port,) = free_ports(1)
    flags = ["--port", str(port), "--workers", "1", "--device", "cpu", "--kv-blocks", "96"]
    flags += ["--tpot-slo-ms", str(SLO_MS), "--set", f"worker.cache.host_bytes={64 << 20}"]
    flags += ["--set", "worker.cache.host_tier=copied"]
    with served(*flags) as made:
        made.wait_until_ready()
        yield made


@pytest.fixture(scope="module")
def url(server: Served) -> str:
    return server.wait_until_ready()


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as made:
        yield made


def metric(client: httpx.Client, name: str, **labels: str) -> float:
    samples = (
        sample
        for family in text_string_to_metric_families(client.get("/metrics").text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )
    return sum(sample.value for sample in samples)


def test_headers_come_through_the_ingress(client: httpx.Client) -> None:
    before = metric(client, "ellm_slo_attained_total", slo="ttft")
    assert before == 0
    assert client.post("/v1/completions", json=ONE).status_code == 200
    kept = ("ellm_slo_attained_total", "ellm_slo_missed_total")
    wait_for(lambda: sum(metric(client, name, slo="tpot") for name in kept) == 1, 10)  # the server's promise
    attained = metric(client, "ellm_slo_attained_total", slo="tpot")
    fine = {"x-ellm-ttft-slo-ms": "60000", "X-Ellm-Tpot-Slo-Ms": "5000", "X-Ellm-Priority": "3"}
    assert client.post("/v1/completions", json=ONE, headers=fine).status_code == 200
    assert metric(client, "ellm_slo_attained_total", slo="ttft") == 1
    assert metric(client, "ellm_slo_attained_total", slo="tpot") == attained + 1


@pytest.mark.parametrize(
    ("fields", "headers", "param"),
    [
        ({"tpot_slo_ms": 0}, {}, "tpot_slo_ms"),
        ({"ttft_slo_ms": -5}, {}, "ttft_slo_ms"),
        ({"tpot_slo_ms": 1e12}, {}, "tpot_slo_ms"),
        ({"priority": "high"}, {}, "priority"),
        ({}, {"x-ellm-tpot-slo-ms": "nan"}, "x-ellm-tpot-slo-ms"),
        ({"stream_pace": True}, {}, "stream_pace"),
    ],
)
def test_a_bad_promise_is_refused(
    client: httpx.Client, fields: dict[str, Any], headers: dict[str, str], param: str
) -> None:
    response = client.post("/v1/completions", json={**ONE, **fields}, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert client.post("/v1/completions", json=ONE).status_code == 200


def test_status_says_what_is_parked(url: str) -> None:
    done = subprocess.run([ELLM, "status", "--url", url], capture_output=True, text=True, check=True)
    header, row = (line.split() for line in done.stdout.splitlines())
    assert dict(zip(header, row, strict=True))["num_parked"] == "0"
    assert dict(zip(header, row, strict=True))["uncached_token_ratio"] == "0"
    done = subprocess.run([ELLM, "status", "--url", url, "--json"], capture_output=True, text=True)
    (worker,) = json.loads(done.stdout)["workers"]
    assert (worker["tpot_slo_s"], worker["ttft_slo_s"]) == (SLO_MS / 1000, None)


Stream = tuple[list[float], str, str | None]


async def read(client: httpx.AsyncClient, number: int, slo_ms: float, paced: bool) -> Stream:
    """Times of a stream's events, its text, and how it ended."""
    body = {
        "prompt": [3 + number] * 24,
        "max_tokens": NUM_TOKENS,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_pace": paced,
        "tpot_slo_ms": slo_ms,
    }
    times, texts, finish = [], [], None
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                times.append(time.monotonic())
                (choice,) = json.loads(line[6:])["choices"]
                texts.append(choice["text"])
                finish = choice["finish_reason"] or finish
    return times, "".join(texts), finish


def run(url: str, slo_ms: float, paced: bool = False, count: int = NUM_CLIENTS) -> list[Stream]:
    async def whole() -> list[Stream]:
        limits = httpx.Limits(max_connections=count)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
            return await asyncio.gather(*(read(client, number, slo_ms, paced) for number in range(count)))

    return asyncio.run(whole())


def test_parked_requests_read_as_steady_streams(client: httpx.Client, url: str) -> None:
    # What this machine can promise now: a step of as many as fit.
    fitting = [times for times, _, _ in run(url, 5000.0, count=NUM_FITTING)]
    slo_s = SLO_STEPS * median((times[-1] - times[0]) / (NUM_TOKENS - 1) for times in fitting)
    before = metric(client, "ellm_num_parks_total")
    attained = metric(client, "ellm_slo_attained_total", slo="tpot")
    plain = run(url, 1000.0 * slo_s)
    wait_for(lambda: metric(client, "ellm_num_parks_total") > before, 10)
    paced = run(url, 1000.0 * slo_s, paced=True)
    assert [text for _, text, _ in paced] == [text for _, text, _ in plain]
    assert {finish for _, _, finish in [*plain, *paced]} == {"length"}

    def gaps(streams: list[Stream]) -> list[float]:
        """The largest of each stream."""
        return [max(b - a for a, b in pairwise(times)) for times, _, _ in streams]

    assert max(gaps(plain)) > 16 * slo_s  # somebody was set aside
    # One that fell behind its schedule may still wait; on a slow machine it does.
    assert max(gaps(paced)) < max(gaps(plain)), (slo_s, gaps(paced), gaps(plain))
    assert sum(gaps(paced)) < sum(gaps(plain)) / 4, (slo_s, gaps(paced), gaps(plain))
    wait_for(lambda: metric(client, "ellm_parked_requests") == 0, 10)
    assert metric(client, "ellm_slo_attained_total", slo="tpot") > attained
