"""Several models behind one router: each request goes to its own, and one that fails takes none along."""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx
import pytest
from support.router_server import EchoWorker, RouterServer, router_config, wait_until


@pytest.fixture(scope="module")
def two() -> Iterator[RouterServer]:
    """Models a and b, one worker each, and a third that cannot be served."""
    workers = [EchoWorker(0, model="a", max_model_len=512), EchoWorker(1, model="b")]
    with RouterServer(workers, router_config(), broken={"c": "no tokenizer"}) as server:
        wait_until(lambda: all(s.dispatcher.ready_links for s in server.models.services.values()))
        yield server


@pytest.fixture
def client(two: RouterServer) -> Iterator[httpx.Client]:
    with two.client() as client:
        yield client


def steps(server: RouterServer) -> list[int]:
    return [worker.front.report().prompt_tokens for worker in server.workers]


def test_models_are_listed_with_their_own_limits(client: httpx.Client) -> None:
    found = client.get("/v1/models").json()["data"]
    assert [(card["id"], card["max_model_len"]) for card in found] == [("a", 512), ("b", 2048)]
    assert client.get("/v1/models/b").json()["id"] == "b"
    assert client.get("/v1/models/x").status_code == 404


@pytest.mark.parametrize(("model", "index"), [("a", 0), ("b", 1)])
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_goes_to_the_model_it_names(
    two: RouterServer, client: httpx.Client, model: str, index: int, stream: bool
) -> None:
    before = steps(two)
    body = {"model": model, "prompt": "hello there", "max_tokens": 4, "stream": stream}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200
    assert f'"model":"{model}"' in response.text
    wait_until(lambda: steps(two)[index] > before[index])
    assert steps(two)[1 - index] == before[1 - index]


@pytest.mark.parametrize(
    ("model", "status", "code"),
    [
        ("x", 404, "model_not_found"),
        (None, 400, "invalid_value"),
        (7, 400, "invalid_value"),
        ("c", 503, "unavailable"),
    ],
)
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("/tokenize", {"prompt": "x"}),
        ("/detokenize", {"tokens": [5]}),
    ],
)
def test_a_model_that_is_not_there(
    client: httpx.Client, path: str, body: dict[str, object], model: object, status: int, code: str
) -> None:
    response = client.post(path, json=body if model is None else {**body, "model": model})
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert (error["code"], error["param"]) == (code, "model")
    assert "no tokenizer" not in response.text


def test_readiness_names_the_model_that_fails_and_stays_for_the_others(
    two: RouterServer, client: httpx.Client
) -> None:
    response = client.get("/health/ready")
    assert response.status_code == 200
    assert response.json() == {
        "status": "ready",
        "reason": "c: no tokenizer",
        "models": {"a": "ready", "b": "ready", "c": "failed"},
    }
    assert client.get("/health").status_code == 200
    assert {row["model"] for row in client.get("/admin/workers").json()["workers"]} == {"a", "b"}


def test_metrics_have_one_family_for_all_models(client: httpx.Client) -> None:
    client.post("/v1/completions", json={"model": "b", "prompt": "x", "max_tokens": 1})
    text = client.get("/metrics").text
    assert text.count("# TYPE ellm_request_success_total") == 1
    assert 'ellm_request_success_total{finished_reason="length",model_name="b"}' in text
    assert 'ellm_num_requests_running{model_name="a",worker="w0"}' in text
    assert re.search(r'ellm_controller_seen\{router="\w+"\} 0\.0', text)


def test_a_model_whose_workers_are_gone_is_named_and_the_other_serves_on() -> None:
    workers = [EchoWorker(0, model="a"), EchoWorker(1, model="b")]
    with RouterServer(workers, router_config(queue_timeout_s=0.2)) as server, server.client() as client:
        wait_until(lambda: all(s.dispatcher.ready_links for s in server.models.services.values()))
        server.on_loop(lambda: (server.directories["b"].channels.clear(), workers[1].channel.sever()))
        wait_until(lambda: client.get("/health/ready").json()["models"]["b"] != "ready", 10)
        response = client.get("/health/ready")
        assert response.status_code == 200
        assert "b: workers: none" in response.json()["reason"]
        body = {"prompt": "x", "max_tokens": 1}
        assert client.post("/v1/completions", json={**body, "model": "a"}).status_code == 200
        assert client.post("/v1/completions", json={**body, "model": "b"}).status_code == 503
