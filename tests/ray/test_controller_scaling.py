"""The whole application on a real cluster: it grows under load and shrinks when idle, and loses no request;
a second model that cannot load stops nobody."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
import ray
from ray import serve
from support.cluster import local_cluster, wait_for

from ellm.cluster.actor import find
from ellm.deploy.app import build_application
from ellm.deploy.config import from_mapping
from ellm.deploy.ports import free_ports
from ellm.deploy.resolve import resolve

pytestmark = pytest.mark.ray

(PORT,) = free_ports(1)
CONFIG = {
    "models": [
        {
            "model": "simulated:overhead_s=0.02", "served_model_name": "fast",
            "workers": 1, "min_workers": 1, "max_workers": 2,
            "worker": {"scheduler": {"max_num_seqs": 8}},
        },
        {"model": "/nowhere/at/all", "served_model_name": "broken", "workers": 1},
    ],
    "worker": {"drain_timeout_s": 20.0},
    "cluster": {"worker_num_cpus": 0.5},
    "controller": {
        "tick_s": 0.2,
        "scaling": {"up_after_s": 1.0, "down_after_s": 3.0, "cool_down_s": 2.0},
    },
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with local_cluster(http_port=PORT):
        application = build_application(resolve(from_mapping({"address": "auto", **CONFIG})))
        target = serve.RunTarget(application, name="ellm", route_prefix="/")
        serve.run_many(
            [target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False
        )
        yield


def ready() -> dict[str, object]:
    try:
        response = httpx.get(f"http://127.0.0.1:{PORT}/health/ready")
    except httpx.TransportError:
        return {}
    return response.json() if response.status_code == 200 else {}


def num_workers() -> int:
    rows = httpx.get(f"http://127.0.0.1:{PORT}/admin/workers").json()["workers"]
    return sum(row["state"] == "ready" for row in rows)


def test_a_model_that_cannot_load_is_named_and_the_other_serves() -> None:
    wait_for(lambda: ready().get("status") == "ready", 60)
    assert ready()["models"] == {"fast": "ready", "broken": "failed"}
    body = {"model": "fast", "prompt": "a b c", "max_tokens": 3}
    assert httpx.post(f"http://127.0.0.1:{PORT}/v1/completions", json=body).status_code == 200
    body["model"] = "broken"
    assert httpx.post(f"http://127.0.0.1:{PORT}/v1/completions", json=body).status_code == 503


def test_it_grows_under_load_and_shrinks_when_idle_and_loses_no_request() -> None:
    wait_for(lambda: ready().get("status") == "ready", 60)
    stop, idle, answers = threading.Event(), threading.Event(), []

    async def client(number: int, stop: threading.Event) -> None:
        body = {"model": "fast", "prompt": f"client {number}", "max_tokens": 60, "ignore_eos": True}
        async with httpx.AsyncClient(timeout=60) as http:
            while not stop.is_set():
                answer = await http.post(f"http://127.0.0.1:{PORT}/v1/completions", json=body)
                answers.append((answer.status_code, answer.json().get("usage", {}).get("completion_tokens")))

    async def load() -> None:
        await asyncio.gather(client(0, idle), *(client(i, stop) for i in range(1, 12)))

    thread = threading.Thread(target=lambda: asyncio.run(load()))
    thread.start()
    try:
        wait_for(lambda: num_workers() == 2, 60)
        assert ray.get(find().targets.remote()) == {"fast": 2, "broken": 1}
        time.sleep(1.0)
        stop.set()  # but for one client, whose requests must outlive the worker that goes
        wait_for(lambda: num_workers() == 1, 60)
    finally:
        stop.set()
        idle.set()
        thread.join(60)
    assert ray.get(find().targets.remote())["fast"] == 1
    assert len(answers) > 20
    assert set(answers) == {(200, 60)}
