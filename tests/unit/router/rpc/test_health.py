"""Health says what is so, and reflection what there is."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from support.router_server import EchoWorker, RouterServer, router_config, wait_until
from support.rpc import Client, refused, rpc_client

from ellm.router.rpc import health_service
from ellm.router.rpc.server import SERVICES

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


def stub(rpc: Client) -> Any:
    return health_pb2_grpc.HealthStub(rpc.channel)


def ask(service: str = "") -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest(service=service)


def test_each_service_serves_while_a_worker_does(rpc: Client) -> None:
    for service in ("", "ellm.v1.Inference", "inference.GRPCInferenceService"):
        assert stub(rpc).Check(ask(service), timeout=60).status == SERVING
    refused(lambda: stub(rpc).Check(ask("other"), timeout=60), grpc.StatusCode.NOT_FOUND, "service")
    found = stub(rpc).List(health_pb2.HealthListRequest(), timeout=60).statuses
    assert {name: one.status for name, one in found.items()} == dict.fromkeys(
        ("", "ellm.v1.Inference", "inference.GRPCInferenceService"), SERVING
    )


def test_it_does_not_serve_without_a_worker_and_who_watches_is_told() -> None:
    with RouterServer([], router_config(), grpc=True) as server, rpc_client(server) as rpc:
        assert stub(rpc).Check(ask(), timeout=60).status == NOT_SERVING
        seen: queue.Queue[int] = queue.Queue()
        watch = stub(rpc).Watch(ask("ellm.v1.Inference"))
        unknown = stub(rpc).Watch(ask("other"))
        assert next(unknown).status == UNKNOWN
        unknown.cancel()
        reader = threading.Thread(target=lambda: drain(watch, seen), daemon=True)
        reader.start()
        assert seen.get(timeout=60) == NOT_SERVING
        worker = EchoWorker(0)
        server.add(worker)
        assert seen.get(timeout=60) == SERVING
        assert stub(rpc).Check(ask(), timeout=60).status == SERVING
        worker.channel.sever()
        server.on_loop(server.directory.channels.clear)
        assert seen.get(timeout=60) == NOT_SERVING
        watch.cancel()
        reader.join(30)
        wait_until(lambda: server.on_loop(lambda: server.rpc._health._num_watchers) == 0, 30)


def drain(watch: Any, seen: queue.Queue[int]) -> None:
    try:
        for one in watch:
            seen.put(one.status)
    except grpc.RpcError:
        return


def test_who_watches_is_told_of_the_end() -> None:
    with RouterServer(grpc=True) as server, rpc_client(server) as rpc:
        watch = stub(rpc).Watch(ask())
        assert next(watch).status == SERVING
        server._server.should_exit = True
        assert [one.status for one in watch] == [NOT_SERVING]


def test_not_all_may_watch(monkeypatch: pytest.MonkeyPatch, rpc: Client) -> None:
    monkeypatch.setattr(health_service, "MAX_WATCHERS", 0)
    refused(lambda: list(stub(rpc).Watch(ask(), timeout=60)), grpc.StatusCode.RESOURCE_EXHAUSTED)


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection(rpc: Client, version: str) -> None:
    reflect: Callable[..., Any] = rpc.channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        *(reflection_pb2.ServerReflectionRequest(file_containing_symbol=name) for name in SERVICES),
    ]
    listed, *files = reflect(iter(asked), timeout=60)
    names = {service.name for service in listed.list_services_response.service}
    assert names >= set(SERVICES)
    assert all(one.file_descriptor_response.file_descriptor_proto for one in files)


def test_reflection_of_what_cannot_be_read(rpc: Client) -> None:
    reflect = rpc.channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
    found = refused(lambda: list(reflect(iter([b"\xff\xff"]), timeout=60)), grpc.StatusCode.INVALID_ARGUMENT)
    assert found.details() == "the message is not of this method's type"
