"""The commands that set our server beside its peers, in a short form against our own router and engine."""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Iterator

import pytest
from support.model_server import ModelWorker, model_server
from support.router_server import FOLDER

from ellm.loadtest import side_by_side, starved_peers, starved_roomy
from ellm.loadtest.peer_servers import ELLM
from ellm.loadtest.served import Started
from ellm.loadtest.starved_peer_rows import ADAPTIVE, COUNTERS, with_ratios
from ellm.loadtest.starved_roomy import Unstarved
from ellm.loadtest.starved_workload import Spec, make_workload

NUM_BLOCKS = 24  # 384 tokens: few of the requests at once
SPEC = Spec(requests=8, prompt=12, output=24, cap=120, trace=None, seed=1)


@pytest.fixture(scope="module")
def server() -> Iterator[Started]:
    worker = ModelWorker(FOLDER, num_blocks=NUM_BLOCKS)
    with model_server(FOLDER, worker) as router:
        yield Started(os.getpid(), router.url, 0.0)


def test_a_round_of_the_side_by_side_comparison(server: Started) -> None:
    arguments = side_by_side.parse(["--rounds", "1", "--input", "16", "--output", "8"])
    rounds = side_by_side.measure({ELLM: server}, 3, arguments)
    (row,) = side_by_side.rows_of(rounds, "float32", 3)
    assert row["tok/s"] > 0.0
    assert row["TTFT, ms"] > 0.0
    assert row["TPOT, ms"] > 0.0


def test_a_starved_server_says_the_same_whenever_requests_come(server: Started) -> None:
    work = make_workload(SPEC)
    at_once = Unstarved()
    starved_roomy.at_once(server, work, at_once)
    assert at_once.tok_s > 0.0
    starved_roomy.as_if_full(server, work, 100, at_once)
    assert at_once.full_step_s > 0.0
    slos = {"loose": 1.0, "none meets it": 1e-9}
    starved = starved_peers.Starved(starved_peers.parse([]), work, 100.0, 2**20, slos, {ADAPTIVE: at_once})
    outcome, answers = starved.offer(server, ADAPTIVE, False, (2**20, 0))
    assert outcome.same == 1.0
    strictly = starved.judged(outcome, answers, "none meets it")
    assert (outcome.metrics.slo_attainment, strictly.metrics.slo_attainment) == (1.0, 0.0)
    (row,) = with_ratios([outcome])
    assert (row["side"], row["same"]) == (ADAPTIVE, 1.0)
    assert row["tok/s"] > 0.0


def test_our_server_has_the_counters_that_are_read(server: Started) -> None:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=60) as answer:
        page = answer.read().decode()
    for name in COUNTERS:
        assert f"\nellm_{name}" in page
