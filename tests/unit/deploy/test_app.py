"""The builder that a Serve config names."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray import serve

from ellm.deploy import app
from ellm.deploy.app import build, build_application
from ellm.deploy.config import from_mapping
from ellm.deploy.resolve import resolve
from ellm.router.rpc.server import Listen
from ellm.worker.api.errors import ConfigError


def test_a_serve_config_s_arguments_become_an_application() -> None:
    assert isinstance(build({"workers": 1, "device": "cpu"}), serve.Application)


def test_a_mistake_in_the_arguments_is_named() -> None:
    with pytest.raises(ConfigError, match=r"unknown key worker\.cach"):
        build({"worker": {"cach": {}}})
    with pytest.raises(ConfigError, match=r"cluster\.num_workers: expected an integer"):
        build({"workers": "two"})


def test_the_deployments_have_what_the_config_says(tmp_path: Path) -> None:
    config = resolve(from_mapping({"workers": 3, "routers": 2, "device": "cpu", "address": "auto"}))
    application = build_application(config)
    router = application._bound_deployment
    assert router.num_replicas == 2
    (workers,) = router.init_args
    deployment = getattr(workers, "_bound_deployment", workers)
    assert deployment.num_replicas == 3


def test_routers_listen_for_grpc_where_the_config_says(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[object] = []
    real = app.router_application
    monkeypatch.setattr(app, "router_application", lambda *args: given.append(args[-1]) or real(*args))
    for data in ({}, {"grpc_port": 8001, "host": "::1"}):
        build_application(resolve(from_mapping({"device": "cpu", "address": "auto", **data})))
    assert given == [None, Listen("::1", 8001)]
    assert str(given[1]) == "[::1]:8001"
