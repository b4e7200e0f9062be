"""What a key may use: its models and no other, its own cached prompts or those of its salt."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from support.router_server import EchoWorker, RouterServer, router_config, wait_until
from support.rpc import refused, request, rpc_client

from ellm.router.keys import ApiKey, new_key, write_keys
from ellm.router.rpc import ellm_inference_pb2 as pb
from ellm.router.rpc import open_inference_pb2 as oip

NOT_FOUND = grpc.StatusCode.NOT_FOUND
Served = tuple[RouterServer, dict[str, str], Path]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    made = {
        "small": new_key(ApiKey("", models=("small",))),
        "none": new_key(ApiKey("", models=("elsewhere",))),
        "all": new_key(ApiKey("")),
        "other": new_key(ApiKey("")),
        "team-1": new_key(ApiKey("", cache_salt="team")),
        "team-2": new_key(ApiKey("", cache_salt="team")),
    }
    write_keys(path, [stored for stored, _ in made.values()])
    config = router_config(api_key_file=str(path))
    workers = [EchoWorker(0, model="small"), EchoWorker(1, model="large")]
    with RouterServer(workers, config, broken={"lost": "no such folder"}, grpc=True) as server:
        dispatchers = [service.dispatcher for service in server.models.services.values()]
        wait_until(lambda: all(dispatcher.ready_links for dispatcher in dispatchers), 10)
        yield server, {name: plain for name, (_, plain) in made.items()}, path


def client(served: Served, name: str) -> httpx.Client:
    return served[0].client(headers={"authorization": f"Bearer {served[1][name]}"})


def test_a_key_uses_its_models_and_does_not_learn_of_others(served: Served) -> None:
    with client(served, "small") as small, client(served, "all") as everything:
        assert [card["id"] for card in small.get("/v1/models").json()["data"]] == ["small"]
        assert {card["id"] for card in everything.get("/v1/models").json()["data"]} == {"small", "large"}
        for path, body in (
            ("/v1/completions", {"prompt": "hi", "max_tokens": 1}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}),
            ("/tokenize", {"prompt": "hi"}),
            ("/detokenize", {"tokens": [5]}),
        ):
            assert small.post(path, json={"model": "small", **body}).status_code == 200
            assert everything.post(path, json={"model": "large", **body}).status_code == 200
            assert small.post(path, json=body).status_code == 200  # there is but one for it
            assert everything.post(path, json=body).status_code == 400
            for name in ("large", "lost", "never"):
                answer = small.post(path, json={"model": name, **body})
                assert answer.status_code == 404
                assert answer.json()["error"]["message"] == f"the model {name!r} does not exist here"
        assert small.get("/v1/models/small").status_code == 200
        assert small.get("/v1/models/large").status_code == 404


def test_a_key_of_no_model_that_is_here(served: Served) -> None:
    with client(served, "none") as nothing:
        assert nothing.get("/v1/models").json()["data"] == []
        for body in ({}, {"model": 5}, {"model": "small"}):
            answer = nothing.post("/v1/completions", json={"prompt": "hi", **body})
            assert answer.status_code in (400, 404), answer.text
            assert "small" not in answer.json()["error"]["message"] or "model" in body


def test_grpc_keeps_to_the_same(served: Served) -> None:
    own = (("x-api-key", served[1]["small"]),)
    with rpc_client(served[0]) as rpc:
        calls: dict[str, Any] = {
            "generate": lambda model: rpc.generate(
                pb.GenerateRequest(text="x", model=model, sampling_params=request().sampling_params), own
            ),
            "info": lambda model: rpc.inference.GetModelInfo(
                pb.GetModelInfoRequest(model=model), metadata=own, timeout=60
            ),
            "ready": lambda model: rpc.open.ModelReady(
                oip.ModelReadyRequest(name=model), metadata=own, timeout=60
            ),
            "metadata": lambda model: rpc.open.ModelMetadata(
                oip.ModelMetadataRequest(name=model), metadata=own, timeout=60
            ),
        }
        for call in calls.values():
            assert call("small") is not None
            for name in ("large", "lost"):
                refused(lambda call=call, name=name: call(name), NOT_FOUND, error="model_not_found")
        infer = oip.ModelInferRequest(model_name="large")
        refused(lambda: rpc.open.ModelInfer(infer, metadata=own, timeout=60), NOT_FOUND)
        info = rpc.inference.GetServerInfo(pb.GetServerInfoRequest(), metadata=own, timeout=60)
        assert list(info.models) == ["small"]


def test_rights_change_while_it_runs(served: Served, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    stored, plain = new_key(ApiKey("", models=("small",)))
    write_keys(path, [stored])
    with RouterServer([EchoWorker(0, model="small")], router_config(api_key_file=str(path))) as server:
        headers = {"authorization": f"Bearer {plain}"}
        with server.client(headers=headers) as open_client:
            assert open_client.get("/v1/models/small").status_code == 200
            path.write_text("{")
            ring = server.access._keys
            wait_until(lambda: bool(ring.broken), 10)  # nobody has asked
            assert open_client.get("/v1/models/small").status_code == 200
            write_keys(path, [])
            wait_until(lambda: not ring.broken, 10)
            assert open_client.get("/v1/models/small").status_code == 401


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [
        ("all", "all", True),
        ("all", "other", False),
        ("team-1", "team-2", True),
        ("team-1", "all", False),
        ("all", "team-1", False),
    ],
)
def test_blocks_are_found_by_keys_of_one_salt_alone(
    served: Served, first: str, second: str, shared: bool
) -> None:
    """As the workers count them, and as the client is told."""
    server = served[0]
    prompt = [200 + 50 * len(first) + len(second), *range(100, 195)]
    body = {"model": "small", "prompt": prompt, "max_tokens": 1}
    hits, told = [], []
    for name in (first, second):
        before = server.workers[0].core.report(0.0).prefix_hits
        with client(served, name) as open_client:
            answer = open_client.post("/v1/completions", json=body).json()
        told.append(answer["usage"].get("prompt_tokens_details", {}).get("cached_tokens", 0))
        hits.append(server.workers[0].core.report(0.0).prefix_hits - before)
    assert hits == told == ([0, 80] if shared else [0, 0])


def test_a_request_cannot_choose_anothers_salt(served: Served) -> None:
    ident = served[1]["other"].split("-")[1]
    body = {"model": "small", "prompt": list(range(300, 396)), "max_tokens": 1}
    with client(served, "other") as victim:
        victim.post("/v1/completions", json=body)
        assert victim.post("/v1/completions", json=body).json()["usage"]["prompt_tokens_details"][
            "cached_tokens"
        ]
    with client(served, "all") as curious:
        for salt in (ident, f"{ident}/", f"/{ident}/", f"../{ident}/", "+team/", ""):
            answer = curious.post("/v1/completions", json={**body, "cache_salt": salt})
            usage = answer.json()["usage"]
            assert usage.get("prompt_tokens_details", {}).get("cached_tokens", 0) == 0, salt
