"""Messages that nobody means: each ends with a status of ours, and afterwards all is as before."""

from __future__ import annotations

import logging
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from support import rpc_fuzz
from support.router_server import EchoWorker, RouterServer, router_config
from support.rpc import Client, assert_nothing_left, assert_served, rpc_client

from ellm.router.config import LimitsConfig

OURS = frozenset(
    {
        grpc.StatusCode.OK,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
)


def answer_of(rpc: Client, call: rpc_fuzz.Call) -> grpc.StatusCode:
    """How it ended, by the server's word."""
    make = rpc.channel.unary_stream if call.method == rpc_fuzz.GENERATE else rpc.channel.unary_unary
    try:
        answer = make(call.method)(call.data, metadata=call.metadata, timeout=call.timeout_s)
        if call.method == rpc_fuzz.GENERATE:
            list(answer)
    except grpc.RpcError as error:
        found: grpc.StatusCode = error.code()
        return found
    return grpc.StatusCode.OK


@pytest.mark.parametrize(
    "count", [300, pytest.param(5000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
def test_what_nobody_means(count: int, caplog: pytest.LogCaptureFixture) -> None:
    config = router_config(limits=LimitsConfig(max_body_bytes=100_000))
    with (
        RouterServer([EchoWorker(0, max_model_len=256)], config, grpc=True) as server,
        rpc_client(server) as rpc,
        ThreadPoolExecutor(4) as threads,
        caplog.at_level(logging.ERROR),
    ):
        sent = list(rpc_fuzz.calls(count, count))
        codes = list(threads.map(lambda call: answer_of(rpc, call), sent))
        wrong = [
            (call.method, call.data[:60], code)
            for call, code in zip(sent, codes, strict=True)
            if code not in OURS and not (call.timeout_s < 1 and code is grpc.StatusCode.DEADLINE_EXCEEDED)
        ]
        assert wrong == []
        reached = Counter(code for call, code in zip(sent, codes, strict=True) if call.good)
        assert set(reached) == {grpc.StatusCode.OK}
        assert reached.total() > 0.3 * count
        assert_nothing_left(server)
        server.on_loop(server.workers[0].core.check)
        assert_served(rpc)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("ellm")] == []
