"""A port that is taken is known before anything starts."""

from __future__ import annotations

import socket

import pytest

from ellm.deploy import ports
from ellm.worker.api.errors import ConfigError


@pytest.mark.parametrize("reuse", [False, True])
def test_a_port_in_use_is_refused(reuse: bool) -> None:
    with socket.socket() as taken:
        if reuse:  # as HAProxy and Serve's proxy listen
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} is in use") as caught:
            ports.check_free("127.0.0.1", port, "grpc_port")
        assert "--grpc-port" in caught.value.message
        assert caught.value.param == "cluster.grpc_port"


def test_a_free_port_passes_and_stays_free() -> None:
    (port,) = ports.free_ports(1)
    ports.check_free("127.0.0.1", port, "port")
    ports.check_free("0.0.0.0", port, "port")


@pytest.mark.parametrize("host", ["203.0.113.7", "no.such.host.invalid"])
def test_a_foreign_address_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match=host):
        ports.check_free(host, 0, "port")


def test_free_ports_differ() -> None:
    found = ports.free_ports(20)
    assert len(set(found)) == 20
