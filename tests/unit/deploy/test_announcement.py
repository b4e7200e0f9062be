"""What `ellm serve` says before and when it serves: a setting of gRPC that cannot work, and where it is."""

from __future__ import annotations

import socket

import pytest

from ellm.deploy import server
from ellm.deploy.announcement import announce
from ellm.deploy.config import from_mapping
from ellm.deploy.ports import free_ports
from ellm.deploy.resolve import resolve
from ellm.worker.api.errors import ConfigError


def test_grpc_is_named_where_there_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    announce(from_mapping({"host": "0.0.0.0", "grpc_port": 8001}))
    assert "\nReady: http://127.0.0.1:8000\ngRPC: 127.0.0.1:8001\n" in capsys.readouterr().out
    grpc = {"tls_cert": "a.pem", "tls_key": "b.pem"}
    announce(from_mapping({"grpc_port": 8001, "router": {"grpc": grpc}}))
    assert "gRPC: 127.0.0.1:8001 (TLS)\n" in capsys.readouterr().out
    announce(from_mapping({}))
    assert "gRPC" not in capsys.readouterr().out


def test_a_port_of_grpc_in_use_is_refused_before_anything_starts() -> None:
    (port,) = free_ports(1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        data = {"port": port, "grpc_port": taken.getsockname()[1], "device": "cpu"}
        with pytest.raises(
            ConfigError, match="in use by another program; choose one with --grpc-port"
        ) as caught:
            server.check(resolve(from_mapping(data)))
    assert caught.value.param == "cluster.grpc_port"


def test_a_certificate_that_is_not_there_is_refused_before_anything_starts() -> None:
    config = resolve(from_mapping({"router": {"grpc": {"tls_cert": "no.pem", "tls_key": "no.key"}}}))
    assert config.router.grpc.tls_cert is not None
    assert config.router.grpc.tls_cert.startswith("/")
    with pytest.raises(ConfigError, match=r"router\.grpc\.tls_cert: cannot read .*no\.pem"):
        server.check(config)
