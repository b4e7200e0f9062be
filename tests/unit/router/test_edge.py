"""Keys, cross-origin rules, health, and the small endpoints."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from support.router_server import MODEL, RouterServer, router_config, wait_until

from ellm.deploy.cli import main
from ellm.router.access import Access
from ellm.router.audit import AuditLog
from ellm.router.config import LimitsConfig
from ellm.router.edge import Edge, route
from ellm.router.key_ring import KeyRing
from ellm.router.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def locked() -> Any:
    config = router_config(api_keys=("first", "second"), admin_key="chief")
    with RouterServer(config=config) as server, server.client() as client:
        yield client


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize("path", ["/v1/models", "/version", "/docs", "/nothing", "/v1/models/x"])
def test_everything_but_health_needs_a_key(locked: httpx.Client, path: str) -> None:
    for headers in (
        {},
        bearer("third"),
        {"Authorization": "Bearer"},
        {"Authorization": "first"},
        bearer("chief"),
    ):
        response = locked.get(path, headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.json()["error"]["type"] == "authentication_error"
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.headers["x-request-id"]
    assert locked.get(path, headers=bearer("first")).status_code != 401
    assert locked.get(path, headers={"authorization": "bearer second"}).status_code != 401


def test_health_needs_none(locked: httpx.Client) -> None:
    assert locked.get("/health").status_code == 200
    assert locked.get("/health/ready").status_code == 200


@pytest.mark.parametrize("path", ["/admin/workers", "/metrics"])
def test_what_shows_all_tenants_needs_the_admin_key(locked: httpx.Client, path: str) -> None:
    for headers in ({}, bearer("first"), bearer("x")):
        assert locked.get(path, headers=headers).status_code == 401
    assert locked.get(path, headers=bearer("chief")).status_code == 200


@pytest.mark.parametrize("path", ["/admin/workers", "/metrics"])
def test_with_api_keys_and_no_admin_key_it_is_closed(path: str) -> None:
    with RouterServer(config=router_config(api_keys=("first",))) as server, server.client() as client:
        refused = client.get(path, headers=bearer("first"))
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden")
        assert "router.admin_key" in refused.json()["error"]["message"]
        assert client.get("/v1/models", headers=bearer("first")).status_code == 200


def test_top_and_status_work_with_the_admin_key(
    locked: httpx.Client, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--url", str(locked.base_url), "--api-key"]
    assert main(["top", "--once", *where, "chief"]) == 0
    assert "1/1 workers ready" in capsys.readouterr().out
    assert main(["status", *where, "chief"]) == 0
    assert main(["top", "--once", *where, "first"]) == 1


@pytest.mark.parametrize(
    ("path", "prefix", "routed"),
    [
        ("/admin/workers", "", "/admin/workers"),
        ("/x/admin/workers", "/x", "/admin/workers"),
        ("/x/health", "/x/", "/x/health"),
        ("/x//admin/workers", "/x/", "/admin/workers"),
        ("//admin/workers", "/", "/admin/workers"),
        ("/xy/health", "/x", "/xy/health"),
        ("/x", "/x", ""),
    ],
)
def test_who_may_see_a_path_does_not_depend_on_its_prefix(path: str, prefix: str, routed: str) -> None:
    assert route({"path": path, "root_path": prefix}) == routed


def test_under_a_prefix_the_admins_paths_stay_the_admins() -> None:
    """As Serve's route_prefix does it."""
    keys = KeyRing(("first",))
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    edge = Edge(app, Access(keys, "chief"), LimitsConfig(), AuditLog(None))
    transport = httpx.ASGITransport(app=edge, root_path="/x")  # type: ignore[arg-type]

    async def statuses() -> list[int]:
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return [
                (await client.get(f"/x{path}", headers=bearer(key))).status_code
                for path, key in (("/admin/workers", "first"), ("/admin/workers", "chief"), ("/health", ""))
            ]

    assert asyncio.run(statuses()) == [401, 200, 200]
    assert seen == ["/x/admin/workers", "/x/health"]


def test_a_wrong_key_is_told_before_the_body_is_read(locked: httpx.Client) -> None:
    response = locked.post("/v1/completions", content=b"{" * 1000, headers=bearer("x"))
    assert response.status_code == 401


def test_tenants_do_not_share_prefixes(locked: httpx.Client) -> None:
    body = {"prompt": [5 + i for i in range(64)], "max_tokens": 1}

    def cached(key: str) -> int:
        answer = locked.post("/v1/completions", json=body, headers=bearer(key)).json()
        count: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        return count

    assert cached("first") == 0
    assert cached("first") > 0
    assert cached("second") == 0


def test_cross_origin_requests_are_off(client: httpx.Client) -> None:
    response = client.get("/v1/models", headers={"Origin": "https://example.org"})
    assert "access-control-allow-origin" not in response.headers


def test_cross_origin_requests_of_named_origins() -> None:
    config = router_config(cors_origins=("https://example.org",), api_keys=("k",))
    with RouterServer(config=config) as server, server.client() as client:
        ask = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
        preflight = client.options("/v1/completions", headers=ask)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://example.org"
        assert "access-control-allow-credentials" not in preflight.headers
        other = client.get("/health", headers={"Origin": "https://example.com"})
        assert "access-control-allow-origin" not in other.headers


def test_models(client: httpx.Client) -> None:
    (card,) = client.get("/v1/models").json()["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == (MODEL, "model", 2048)
    assert client.get(f"/v1/models/{MODEL}").json() == card


def test_version(client: httpx.Client) -> None:
    assert client.get("/version").json()["version"]


def test_workers(client: httpx.Client, server: RouterServer) -> None:
    (worker,) = client.get("/admin/workers").json()["workers"]
    assert worker["id"] == "w0"
    assert worker["state"] == "ready"
    assert worker["num_blocks"] == server.workers[0].limits.num_blocks
    for name in ("node", "rank_pids", "num_running", "num_waiting", "free_blocks", "epoch", "device"):
        assert name in worker


def test_tokens_there_and_back(client: httpx.Client, tokenizer: Tokenizer) -> None:
    answer = client.post("/tokenize", json={"prompt": "Hello 你好", "return_token_strs": True}).json()
    assert answer["tokens"] == tokenizer.encode("Hello 你好")
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 2048
    back = client.post("/detokenize", json={"tokens": answer["tokens"]}).json()
    assert back == {"prompt": "<|bos|>Hello 你好"}
    plain = client.post("/tokenize", json={"prompt": "Hello 你好", "add_special_tokens": False}).json()
    assert plain["tokens"] == answer["tokens"][1:]
    chat = client.post("/tokenize", json={"messages": [{"role": "user", "content": "Hi"}]}).json()
    assert tokenizer.decode(chat["tokens"], False) == "<|bos|><|user|>Hi<|eot|><|assistant|>"


def test_ready_means_progress() -> None:
    """Work without a finished step is not ready, whatever the process says."""
    with RouterServer(config=router_config()) as server, server.client() as client:
        worker = server.workers[0]
        server.on_loop(lambda: setattr(worker.front._engine, "since_progress_s", lambda: 60.0))
        wait_until(lambda: client.get("/health/ready").status_code == 503)
        assert client.get("/admin/workers").json()["workers"][0]["state"] == "stalled"
        assert client.get("/health").status_code == 503
        server.on_loop(lambda: setattr(worker.front._engine, "since_progress_s", lambda: 0.0))
        wait_until(lambda: client.get("/health/ready").status_code == 200)
        server.on_loop(worker.front.begin_drain)
        wait_until(lambda: client.get("/health/ready").status_code == 503)
        assert client.get("/admin/workers").json()["workers"][0]["state"] == "draining"
