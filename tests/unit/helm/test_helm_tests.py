"""What `helm test` runs in its pods, run against a router: it passes where all is well, and only there."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from support.chart import render
from support.router_server import EchoWorker, RouterServer, router_config

KEYS = {"auth": {"apiKeys": {"secretName": "keys"}, "adminKey": {"secretName": "admin"}}}
GUARDED = router_config(api_keys=("sk-user",), admin_key="sk-admin")


def run(pod: str, values: dict[str, Any], server: RouterServer) -> None:
    """The script of a pod, as it stands but for the address."""
    spec = render(values).one("Pod", f"llm-ellm-test-{pod}")["spec"]
    (container,) = spec["containers"]
    assert container["command"] == ["python", "-c"]
    (script,) = container["args"]
    places = {"http": ("http://llm-ellm-serve-svc:8000", server.url)}
    if pod == "grpc":
        places = {"grpc": ("llm-ellm-grpc:9000", f"127.0.0.1:{server.rpc.port}")}
    before, after = places[pod]
    assert before in script
    exec(script.replace(before, after), {})


def test_http_passes_where_all_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    with RouterServer([EchoWorker(0)], router_config()) as server:
        run("http", {}, server)
        assert "all is well" in capsys.readouterr().out


def test_http_finds_a_server_without_workers() -> None:
    with RouterServer([], router_config()) as server, pytest.raises(AssertionError, match="unavailable"):
        run("http", {}, server)


def test_http_finds_a_model_that_is_not_served() -> None:
    values = {"models": [{"path": "/models/other"}]}
    with (
        RouterServer([EchoWorker(0)], router_config()) as server,
        pytest.raises(AssertionError, match="other is not among"),
    ):
        run("http", values, server)


def test_http_finds_doors_that_should_be_closed() -> None:
    with RouterServer([EchoWorker(0)], GUARDED) as server:
        run("http", KEYS, server)
    with (
        RouterServer([EchoWorker(0)], router_config()) as server,
        pytest.raises(AssertionError, match="is open"),
    ):
        run("http", KEYS, server)


def test_grpc_passes_where_a_worker_serves_and_only_there() -> None:
    with RouterServer([EchoWorker(0)], router_config(), grpc=True) as server:
        run("grpc", {}, server)
    with (
        RouterServer([], router_config(), grpc=True) as server,
        pytest.raises((AssertionError, grpc.RpcError)),
    ):
        run("grpc", {}, server)
