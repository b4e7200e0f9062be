"""A call that ends before its time, for whatever reason, frees what it held at the worker."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from support.router_server import EchoWorker, RouterServer, router_config, wait_until
from support.rpc import Client, assert_nothing_left, assert_served, refused, request, rpc_client

from ellm.router.config import LimitsConfig
from ellm.router.rpc import ellm_inference_pb2 as pb
from ellm.router.rpc import open_inference_pb2 as oip

LONG: dict[str, Any] = {"max_tokens": 1500, "ignore_eos": True}
CANCELLED = grpc.StatusCode.CANCELLED


@pytest.fixture
def server() -> Iterator[RouterServer]:
    with RouterServer([EchoWorker(0, step_s=0.003)], router_config(heartbeat_s=0.1), grpc=True) as running:
        yield running


@pytest.fixture
def rpc(server: RouterServer) -> Iterator[Client]:
    with rpc_client(server) as client:
        yield client


def begin(rpc: Client, count: int = 8, **more: Any) -> list[Any]:
    """Streams that have had their first message."""
    params = LONG | more
    calls = [rpc.inference.Generate(request(f"number {i} of some", **params)) for i in range(count)]
    for call in calls:
        assert next(call).token_ids
    return calls


def test_calls_that_are_cancelled(server: RouterServer, rpc: Client) -> None:
    for call in begin(rpc, n=2):
        call.cancel()
    assert_nothing_left(server)
    assert server.service.metrics.finished["abort"] == 16
    assert_served(rpc)


def test_a_connection_that_is_closed(server: RouterServer) -> None:
    with rpc_client(server) as rpc:
        begin(rpc)
    assert_nothing_left(server)


def test_a_clients_deadline(server: RouterServer, rpc: Client) -> None:
    server.workers[0].executor.gate.clear()
    call = rpc.inference.Generate(request(**LONG), timeout=0.5)
    try:
        refused(lambda: list(call), grpc.StatusCode.DEADLINE_EXCEEDED)
        wait_until(lambda: server.on_loop(lambda: server.workers[0].front.num_live) == 0, 30)
    finally:
        server.workers[0].executor.gate.set()
    assert_nothing_left(server)


def test_a_unary_call_that_is_cancelled(server: RouterServer, rpc: Client) -> None:
    message = oip.ModelInferRequest()
    message.inputs.add(name="text_input", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"a b")
    message.parameters["max_tokens"].int64_param = 1500
    message.parameters["ignore_eos"].bool_param = True
    call = rpc.open.ModelInfer.future(message)
    wait_until(lambda: server.on_loop(lambda: server.workers[0].front.num_live) == 1, 30)
    call.cancel()
    assert_nothing_left(server)


def test_one_that_waits_for_a_worker() -> None:
    with RouterServer([EchoWorker(0)], router_config(queue_timeout_s=60.0), grpc=True) as server:
        server.workers[0].channel.sever()
        server.on_loop(server.directory.channels.clear)
        wait_until(lambda: server.on_loop(lambda: not server.service.dispatcher.links))
        with rpc_client(server) as rpc:
            calls = [rpc.inference.Generate(request()) for _ in range(4)]
            wait_until(lambda: server.service.dispatcher.gate.num_waiting == 4, 30)
            for call in calls:
                call.cancel()
            wait_until(lambda: server.service.dispatcher.gate.num_waiting == 0, 30)
        wait_until(lambda: server.on_loop(lambda: server.service.dispatcher.admission.num_inflight) == 0)


def test_abort_ends_one_by_its_name(server: RouterServer, rpc: Client) -> None:
    message = request(**LONG)
    message.request_id = "long one"
    call, (other,) = rpc.inference.Generate(message), begin(rpc, 1)
    assert next(call).request_id == "long one"
    refused(lambda: rpc.generate(message), grpc.StatusCode.INVALID_ARGUMENT, "request_id")
    assert rpc.inference.Abort(pb.AbortRequest(request_id="long one"), timeout=60).success
    refused(lambda: list(call), CANCELLED, error="aborted")
    assert not rpc.inference.Abort(pb.AbortRequest(request_id="long one"), timeout=60).success
    assert next(other).token_ids  # goes on
    other.cancel()
    assert_nothing_left(server)
    assert rpc.generate(request())  # a name may be used again


def test_abort_of_one_that_waits_for_a_worker() -> None:
    config = router_config(queue_timeout_s=60.0)
    with RouterServer([], config, grpc=True) as server, rpc_client(server) as rpc:
        message = request()
        message.request_id = "waits"
        call = rpc.inference.Generate(message)
        wait_until(lambda: server.service.dispatcher.gate.num_waiting == 1, 30)
        assert rpc.inference.Abort(pb.AbortRequest(request_id="waits"), timeout=60).success
        refused(lambda: list(call), CANCELLED)
        assert server.on_loop(lambda: server.service.dispatcher.admission.num_inflight) == 0


def test_a_client_that_does_not_read_is_cut_off_and_disturbs_nobody() -> None:
    config = router_config(limits=LimitsConfig(max_client_buffer_bytes=20_000))
    with (
        RouterServer([EchoWorker(0)], config, grpc=True) as server,
        rpc_client(server, **{"http2.bdp_probe": 0}) as slow,  # its window does not grow
        rpc_client(server) as rpc,
    ):
        # Megabytes of scores, more than what the connection holds.
        call = slow.inference.Generate(request(n=16, logprobs=20, **LONG), timeout=240)
        finished = server.service.metrics.finished
        # It may be cut off before anybody looks.
        wait_until(
            lambda: finished["abort"] or server.on_loop(lambda: len(server.rpc.inference.calls)) == 1, 30
        )
        assert_served(rpc)
        wait_until(lambda: finished["abort"] == 16, 60)
        # Its blocks are free before it reads on and is told.
        wait_until(lambda: server.on_loop(lambda: server.workers[0].front.num_live) == 0, 60)
        refused(lambda: list(call), grpc.StatusCode.RESOURCE_EXHAUSTED, error="client_too_slow")
        assert_nothing_left(server)
        assert server.service.metrics.errors["client_too_slow"] == 1
        assert_served(slow)


def test_streams_end_before_the_server_does() -> None:
    worker = EchoWorker(0, step_s=0.003)
    with RouterServer([worker], router_config(), grpc=True) as server, rpc_client(server) as rpc:
        (call,) = begin(rpc, 1, max_tokens=200)
        server._server.should_exit = True
        tokens = [i for one in call for i in one.token_ids]
        assert call.code() is grpc.StatusCode.OK
        assert len(tokens) >= 190
