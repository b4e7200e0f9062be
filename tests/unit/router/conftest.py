"""A router over one echoing worker, shared by the tests that only send it requests."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from support.router_server import RouterServer

from ellm.router.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def server() -> Iterator[RouterServer]:
    with RouterServer() as running:
        yield running


@pytest.fixture(scope="session")
def client(server: RouterServer) -> Iterator[httpx.Client]:
    with server.client() as open_client:
        yield open_client


@pytest.fixture(scope="session")
def tokenizer(server: RouterServer) -> Tokenizer:
    return server.service.tokenizer
