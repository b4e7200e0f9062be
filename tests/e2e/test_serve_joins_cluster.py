"""`ellm serve --address`: what it began in a cluster that stays is gone when its start does not succeed."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import ray
from ray import serve
from support.cluster import APP, deploy, local_cluster, simulated_config, wait_for
from support.served import Served, served

from ellm.deploy import application, workers

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """Somebody else's application runs there."""
    with local_cluster():
        deploy(simulated_config())
        yield


def joining(*words: str) -> list[str]:
    """Flags of a server whose worker would load for ten minutes."""
    address = ray.get_runtime_context().gcs_address
    return ["simulated:load_s=600", "--workers", "1", "--address", address, *words]


def until_loading(server: Served) -> None:
    server.wait_for_line(r"\] Ray: joined a cluster of 1 node")
    wait_for(lambda: len(workers.ranks()) == 2, 60)


def assert_only_the_other_is_left() -> None:
    assert set(serve.status().applications) == {APP}
    wait_for(lambda: len(workers.ranks()) == 1, 20)


def test_a_signal_during_the_start_takes_the_application_down() -> None:
    with served(*joining()) as server:
        until_loading(server)
        assert application.NAME in serve.status().applications
        server.signal(signal.SIGINT)
        assert server.wait() == 130, server.output
        assert_only_the_other_is_left()
        assert "Traceback" not in server.output


def test_a_start_that_fails_takes_the_application_down() -> None:
    with served(*joining("--set", "cluster.start_timeout_s=20")) as server:
        until_loading(server)
        assert server.wait() == 1, server.output
        assert "did not start in time" in server.output
        assert_only_the_other_is_left()
