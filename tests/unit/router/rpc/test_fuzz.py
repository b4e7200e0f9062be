"""Messages that nobody means: each ends with a status of ours, and afterwards all is as before.
`python -m ellm.loadtest.rpc_fuzz` does it at length on a whole cluster."""

from __future__ import annotations

import logging

import pytest
from support.router_server import EchoWorker, RouterServer, router_config
from support.rpc import assert_nothing_left, assert_served, rpc_client

from ellm.loadtest.rpc_fuzz import send
from ellm.loadtest.rpc_messages import calls
from ellm.router.config import LimitsConfig


@pytest.mark.parametrize(
    "count", [300, pytest.param(5000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
def test_what_nobody_means(count: int, caplog: pytest.LogCaptureFixture) -> None:
    config = router_config(limits=LimitsConfig(max_body_bytes=100_000))
    with (
        RouterServer([EchoWorker(0, max_model_len=256)], config, grpc=True) as server,
        rpc_client(server) as rpc,
        caplog.at_level(logging.ERROR),
    ):
        verdict = send(rpc.channel, list(calls(count, count)), threads=4)
        assert verdict.faults == []
        assert verdict.statuses.total() == count
        assert verdict.reached > 0.3 * count
        assert_nothing_left(server)
        server.on_loop(server.workers[0].core.check)
        assert_served(rpc)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("ellm")] == []
