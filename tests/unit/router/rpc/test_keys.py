"""Keys by metadata: the same keys, rates and tenants as over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.router_server import EchoWorker, RouterServer, router_config
from support.rpc import Client, assert_nothing_left, assert_served, refused, request, rpc_client, trailing

from ellm.router.keys import ApiKey, new_key, write_keys
from ellm.router.rpc import ellm_inference_pb2 as pb
from ellm.router.rpc import open_inference_pb2 as oip

UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED
OK = (("authorization", "Bearer alpha"),)


@pytest.fixture(scope="module")
def locked() -> Iterator[RouterServer]:
    config = router_config(api_keys=("alpha", "beta"), admin_key="root")
    with RouterServer([EchoWorker(0, step_s=0.002)], config, grpc=True) as server:
        yield server


@pytest.fixture(scope="module")
def rpc(locked: RouterServer) -> Iterator[Client]:
    with rpc_client(locked) as client:
        yield client


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        (("authorization", "Bearer wrong"),),
        (("authorization", "Basic alpha"),),
        (("authorization", "Bearer alpha beta"),),
        (("x-api-key", ""),),
        (("x-api-key-bin", b"alpha\n"),),
    ],
)
def test_without_its_key_nobody_gets_in(rpc: Client, metadata: Any) -> None:
    refused(lambda: rpc.generate(request(), metadata), UNAUTHENTICATED, error="invalid_api_key")
    ask = oip.ModelReadyRequest()
    refused(lambda: rpc.open.ModelReady(ask, metadata=metadata, timeout=60), UNAUTHENTICATED)


def test_a_key_comes_in_either_way(rpc: Client) -> None:
    for metadata in (OK, (("x-api-key", "beta"),), (("authorization", "bearer alpha"),)):
        assert_served(rpc, metadata)


def test_an_unreadable_message_without_a_key_says_nothing_but_that(rpc: Client) -> None:
    call = rpc.channel.unary_stream("/ellm.v1.Inference/Generate", None, None)
    refused(lambda: list(call(b"\xff" * 9, timeout=60)), UNAUTHENTICATED)


def test_health_is_open_and_reflection_is_not(rpc: Client) -> None:
    assert rpc.open.ServerLive(oip.ServerLiveRequest(), timeout=60).live
    assert rpc.open.ServerReady(oip.ServerReadyRequest(), timeout=60).ready
    health = health_pb2_grpc.HealthStub(rpc.channel)
    assert health.Check(health_pb2.HealthCheckRequest(), timeout=60).status == 1
    reflect = rpc.channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
    refused(lambda: list(reflect(iter([b""]), timeout=60)), UNAUTHENTICATED)


def test_loads_are_for_the_admin(rpc: Client) -> None:
    ask = pb.GetLoadsRequest()
    refused(lambda: rpc.inference.GetLoads(ask, metadata=OK, timeout=60), UNAUTHENTICATED)
    admin = (("authorization", "Bearer root"),)
    assert len(rpc.inference.GetLoads(ask, metadata=admin, timeout=60).loads) == 1
    refused(lambda: rpc.generate(request(), admin), UNAUTHENTICATED)


def test_nobody_aborts_anothers(locked: RouterServer, rpc: Client) -> None:
    message = request(max_tokens=1500, ignore_eos=True)
    message.request_id = "same"
    call = rpc.inference.Generate(message, metadata=OK)
    next(call)
    ask, other = pb.AbortRequest(request_id="same"), (("x-api-key", "beta"),)
    assert not rpc.inference.Abort(ask, metadata=other, timeout=60).success
    own = rpc.inference.Generate(message, metadata=other)  # the name is the other's to use
    next(own)
    assert rpc.inference.Abort(ask, metadata=other, timeout=60).success
    refused(lambda: list(own), grpc.StatusCode.CANCELLED)
    next(call)
    call.cancel()
    assert_nothing_left(locked)


def test_a_prompt_cached_for_one_is_not_found_by_another(rpc: Client) -> None:
    message = request("what one has said is nobody else's business, however often it is said " * 3)
    rpc.generate(message, OK)
    assert rpc.generate(message, OK)[-1].usage.cached_tokens >= 16
    assert rpc.generate(message, (("x-api-key", "beta"),))[-1].usage.cached_tokens == 0


def test_a_rate_that_is_used_up(tmp_path: Path) -> None:
    stored, key = new_key(ApiKey("", "slow", requests_per_s=0.001))
    write_keys(tmp_path / "keys.json", [stored])
    config = router_config(api_key_file=str(tmp_path / "keys.json"))
    with RouterServer(config=config, grpc=True) as server, rpc_client(server) as rpc:
        metadata = (("x-api-key", key),)
        assert_served(rpc, metadata)
        found = refused(
            lambda: rpc.generate(request(), metadata),
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            error="rate_limit_exceeded",
        )
        assert int(trailing(found)["retry-after"]) >= 1
        admin = refused(
            lambda: rpc.inference.GetLoads(pb.GetLoadsRequest(), metadata=metadata, timeout=60),
            grpc.StatusCode.PERMISSION_DENIED,
        )
        assert "router.admin_key" in (admin.details() or "")
