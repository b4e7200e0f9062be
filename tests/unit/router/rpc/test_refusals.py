"""Every bad message gets its status at once, with the field and without internals; the next one is served."""

from __future__ import annotations

import math
from typing import Any

import grpc
import pytest
from support.router_server import EchoWorker, RouterServer, router_config, wait_until
from support.rpc import Client, assert_served, refused, request, rpc_client, trailing

from ellm.router.config import LimitsConfig
from ellm.router.rpc import ellm_inference_pb2 as pb
from ellm.worker.api.errors import QueueFull, Unavailable, WorkerFailed

INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"n": 2**63}, "n"),
        ({"n": 0}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2**64 - 1}, "max_tokens"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"min_tokens": 17, "max_tokens": 16}, "min_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2.0}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"presence_penalty": 3.0}, "presence_penalty"),
        ({"frequency_penalty": -3.0}, "frequency_penalty"),
        ({"logprobs": 21}, "logprobs"),
        ({"logit_bias": {4096: 1.0}}, "logit_bias"),
        ({"logit_bias": {1: math.nan}}, "logit_bias"),
        ({"logit_bias": {i: 1.0 for i in range(1025)}}, "logit_bias"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x" * 1025]}, "stop"),
        ({"stop_token_ids": [4096]}, "stop_token_ids"),
        ({"stop_token_ids": [1] * 257}, "stop_token_ids"),
    ],
)
def test_a_bad_parameter_is_named(rpc: Client, params: dict[str, Any], param: str) -> None:
    refused(lambda: rpc.generate(request(**params)), INVALID, param)


@pytest.mark.parametrize(
    ("message", "param"),
    [
        (pb.GenerateRequest(), "input"),
        (pb.GenerateRequest(text="word " * 3000), "text"),
        (pb.GenerateRequest(text="x" * 7_000_000), "text"),
        (pb.GenerateRequest(token_ids=pb.TokenIds()), "token_ids"),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[4096])), "token_ids"),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[2**32 - 1])), "token_ids"),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[7] * 5000)), "token_ids"),
        (pb.GenerateRequest(chat=pb.Chat()), "chat.messages"),
        (pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage()] * 4097)), "chat.messages"),
        (pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="User!")])), "chat.messages[0].role"),
        (pb.GenerateRequest(text="x", request_id="r" * 129), "request_id"),
        (pb.GenerateRequest(text="x", cache_salt="s" * 257), "cache_salt"),
        (pb.GenerateRequest(text="x", tpot_slo_ms=math.nan), "tpot_slo_ms"),
        (pb.GenerateRequest(text="x", ttft_slo_ms=0.0), "ttft_slo_ms"),
        (pb.GenerateRequest(text="x", priority=-1000), "priority"),
    ],
)
def test_a_bad_field_is_named(rpc: Client, message: pb.GenerateRequest, param: str) -> None:
    refused(lambda: rpc.generate(message), INVALID, param)
    assert_served(rpc)


def test_an_unknown_model(rpc: Client) -> None:
    missing = grpc.StatusCode.NOT_FOUND
    refused(lambda: rpc.generate(pb.GenerateRequest(model="other", text="x")), missing, "model")
    ask = pb.GetModelInfoRequest(model="\udcff".encode("utf-8", "replace").decode())
    refused(lambda: rpc.inference.GetModelInfo(ask, timeout=60), missing, "model", "model_not_found")


def test_a_bad_header_is_named(rpc: Client) -> None:
    metadata = (("x-ellm-priority", "soon"),)
    refused(lambda: rpc.generate(request(), metadata), INVALID, "x-ellm-priority")


@pytest.mark.parametrize("data", [b"\xff" * 40, b"\x0a\xff", b"\x1a\x02\xff\xfe", b"\x2a" * 500])
def test_bytes_that_are_no_message(rpc: Client, data: bytes) -> None:
    """The third is text that is no UTF-8."""
    call = rpc.channel.unary_stream("/ellm.v1.Inference/Generate", None, None)
    found = refused(lambda: list(call(data, timeout=60)), INVALID)
    assert found.details() == "the message is not of this method's type"
    assert_served(rpc)


def test_a_message_over_the_limit(rpc: Client) -> None:
    message = pb.GenerateRequest(text="x" * (9 * 1024 * 1024))
    refused(lambda: rpc.generate(message), grpc.StatusCode.RESOURCE_EXHAUSTED)
    packed = rpc.inference.Generate(message, compression=grpc.Compression.Gzip, timeout=60)
    refused(lambda: list(packed), grpc.StatusCode.RESOURCE_EXHAUSTED)
    assert_served(rpc)


def test_a_method_that_is_not_there(rpc: Client) -> None:
    for path in ("/ellm.v1.Inference/Nothing", "/no.such.Service/Method"):
        call = rpc.channel.unary_unary(path, None, None)
        with pytest.raises(grpc.RpcError) as caught:
            call(b"", timeout=60)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_full_router_says_when_to_come_again() -> None:
    limits = LimitsConfig(max_inflight=4)
    with RouterServer(config=router_config(limits=limits), grpc=True) as server, rpc_client(server) as rpc:
        found = refused(
            lambda: rpc.generate(request(n=5)), grpc.StatusCode.RESOURCE_EXHAUSTED, error=QueueFull.code
        )
        assert int(trailing(found)["retry-after"]) >= 1
        assert_served(rpc)
        assert server.service.metrics.rejections[QueueFull.code] == 1


def test_without_a_worker_it_is_unavailable() -> None:
    with RouterServer([], router_config(queue_timeout_s=0.1), grpc=True) as server, rpc_client(server) as rpc:
        found = refused(lambda: rpc.generate(request()), grpc.StatusCode.UNAVAILABLE, error=Unavailable.code)
        assert int(trailing(found)["retry-after"]) >= 1
        ask = pb.GetModelInfoRequest()
        refused(lambda: rpc.inference.GetModelInfo(ask, timeout=60), grpc.StatusCode.UNAVAILABLE)
        assert list(rpc.inference.GetLoads(pb.GetLoadsRequest(), timeout=60).loads) == []


def test_the_servers_own_deadline() -> None:
    limits = LimitsConfig(request_deadline_s=0.3)
    with RouterServer(config=router_config(limits=limits), grpc=True) as server, rpc_client(server) as rpc:
        server.workers[0].executor.gate.clear()
        try:
            refused(lambda: rpc.generate(request()), grpc.StatusCode.DEADLINE_EXCEEDED)
        finally:
            server.workers[0].executor.gate.set()
        wait_until(lambda: server.on_loop(lambda: len(server.rpc.inference.calls)) == 0)


def test_a_failure_of_ours_says_nothing_of_its_cause() -> None:
    with RouterServer([EchoWorker(0)], router_config(), grpc=True) as server, rpc_client(server) as rpc:
        models = server.rpc.inference._models

        def broken(name: str | None, key: object) -> None:
            raise RuntimeError("the secret of line 17")

        models.find, found = broken, models.find  # type: ignore[method-assign,assignment]
        error = refused(lambda: rpc.generate(request()), grpc.StatusCode.INTERNAL)
        assert error.details() == "internal error"

        def failed(name: str | None, key: object) -> None:
            raise WorkerFailed("worker w0 on node 7")

        models.find = failed  # type: ignore[method-assign,assignment]
        error = refused(lambda: rpc.generate(request()), grpc.StatusCode.INTERNAL, error="worker_failed")
        assert error.details() == "internal error"
        models.find = found  # type: ignore[method-assign]
        assert_served(rpc)
