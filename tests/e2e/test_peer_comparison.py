"""The commands that set our server beside its peers, with our server alone: one server does for both."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ellm.deploy.ports import free_ports
from ellm.loadtest import side_by_side, starved_peers, starved_roomy
from ellm.loadtest.peer_servers import ELLM, Setting, ellm_server, kv_token_bytes
from ellm.loadtest.served import Started
from ellm.loadtest.starved_roomy import Unstarved
from ellm.loadtest.starved_rows import ADAPTIVE, with_ratios
from ellm.loadtest.starved_workload import Spec, make_workload

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

BUNDLED = Path(__file__).parents[2] / "deploy" / "bundled" / "pydoc-5m"
POOL_TOKENS = 512
SPEC = Spec(requests=16, prompt=16, output=48, cap=160, trace=None, seed=1)


@pytest.fixture(scope="module")
def server() -> Iterator[Started]:
    """A pool that holds few of the requests at once."""
    kv_bytes = POOL_TOKENS * kv_token_bytes(BUNDLED, "float32")
    setting = Setting(BUNDLED, "float32", 1, kv_bytes, max_model_len=POOL_TOKENS)
    (port,) = free_ports(1)
    with ellm_server(setting, port, "full-chunked") as started:
        yield started


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
    starved = starved_peers.Starved(
        starved_peers.parse([]), work, 50.0, POOL_TOKENS, 1.0, {ADAPTIVE: at_once}
    )
    outcome = starved.offer(server, ADAPTIVE, False, POOL_TOKENS, 0)
    assert outcome.same == 1.0
    assert outcome.counted["preempted"] > 0.0  # as it is starved
    (row,) = with_ratios([outcome])
    assert row["preempted"] == outcome.counted["preempted"]
