"""A router over one echoing worker that speaks gRPC too, shared by the tests that only send it requests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.router_server import RouterServer
from support.rpc import Client, rpc_client


@pytest.fixture(scope="session")
def rpc_server() -> Iterator[RouterServer]:
    with RouterServer(grpc=True) as running:
        yield running


@pytest.fixture(scope="session")
def rpc(rpc_server: RouterServer) -> Iterator[Client]:
    with rpc_client(rpc_server) as client:
        yield client
