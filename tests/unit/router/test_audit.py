"""Audit lines: one per request, who asked for what and how it ended, and neither a prompt nor a key."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from support.router_server import MODEL, EchoWorker, RouterServer, router_config, wait_until
from support.rpc import refused, request, rpc_client

from ellm.router import audit
from ellm.router.audit import AuditLog, audit_path, peer_address
from ellm.router.keys import ApiKey, new_key, write_keys
from ellm.router.rpc import ellm_inference_pb2 as pb

UNAUTHENTICATED, NOT_FOUND = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.NOT_FOUND
SECRET = "sesame-open-the-door"


@dataclass
class Audited:
    server: RouterServer
    path: Path
    key: str
    ident: str

    def lines(self, request_id: str, count: int = 1) -> list[dict[str, Any]]:
        """Of one request, when there are so many."""
        found: list[dict[str, Any]] = []

        def there() -> bool:
            lines = map(json.loads, self.path.read_text().splitlines() if self.path.exists() else [])
            found[:] = [line for line in lines if line["request_id"] == request_id]
            return len(found) >= count

        wait_until(there, 10)
        return found

    def post(
        self, request_id: str, path: str = "/v1/completions", key: str | None = None, **body: Any
    ) -> Any:
        headers = {"authorization": f"Bearer {key or self.key}", "x-request-id": request_id}
        with self.server.client(headers=headers) as client:
            return client.post(path, json=body)


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Audited]:
    folder = tmp_path_factory.mktemp("audit")
    stored, key = new_key(ApiKey("", "Alicé", models=(MODEL,)))
    write_keys(folder / "keys.json", [stored])
    path = folder / "audit.jsonl"
    config = router_config(
        api_key_file=str(folder / "keys.json"), admin_key="chief", audit_log=str(path), heartbeat_s=0.1
    )
    with RouterServer([EchoWorker(0, step_s=0.002)], config, grpc=True) as server:
        yield Audited(server, path, key, stored.key.id)


def test_a_request_has_one_line_with_all_but_its_text(audited: Audited) -> None:
    body = {"prompt": f"{SECRET} and so on", "max_tokens": 5, "ignore_eos": True, "user": SECRET}
    usage = audited.post("one", **body).json()["usage"]
    (line,) = audited.lines("one")
    assert line.pop("duration_s") > 0.0
    assert line.pop("time").startswith("20")
    assert line.pop("client").startswith("127.0.0.1:")
    assert line == {
        "request_id": "one",
        "protocol": "http",
        "endpoint": "/v1/completions",
        "key": audited.ident,
        "tenant": "Alicé",
        "model": MODEL,
        "prompt_tokens": usage["prompt_tokens"],
        "cached_tokens": 0,
        "output_tokens": 5,
        "status": 200,
        "finish_reason": "length",
        "error": None,
    }


def test_streams_chats_and_choices(audited: Audited) -> None:
    audited.post("chat", "/v1/chat/completions", messages=[{"role": "user", "content": SECRET}], max_tokens=3)
    audited.post("streamed", prompt=[9, 8, 7], max_tokens=4, ignore_eos=True, stream=True)
    audited.post("choices", prompt=[9, 8, 7], max_tokens=4, ignore_eos=True, n=3)
    (chat,) = audited.lines("chat")
    assert (chat["endpoint"], chat["finish_reason"]) == ("/v1/chat/completions", "length")
    (streamed,) = audited.lines("streamed")
    assert (streamed["status"], streamed["output_tokens"], streamed["prompt_tokens"]) == (200, 4, 3)
    (choices,) = audited.lines("choices")
    assert (choices["output_tokens"], choices["finish_reason"]) == (12, "length")


def test_what_is_refused_has_a_line_too(audited: Audited) -> None:
    assert audited.post("wrong", key="ellm-guess", prompt=SECRET).status_code == 401
    assert audited.post("bad", prompt=SECRET, n=0).status_code == 400
    assert audited.post("other", prompt=SECRET, model="other").status_code == 404
    assert audited.post("path", path="/nothing").status_code == 404
    found = {name: audited.lines(name)[0] for name in ("wrong", "bad", "other", "path")}
    assert {name: (line["status"], line["error"]) for name, line in found.items()} == {
        "wrong": (401, "invalid_api_key"),
        "bad": (400, "invalid_value"),
        "other": (404, "model_not_found"),
        "path": (404, None),
    }
    assert found["wrong"]["key"] is None
    assert found["bad"]["key"] == audited.ident


def test_who_leaves_is_499(audited: Audited) -> None:
    host, port = audited.server.url.removeprefix("http://").split(":")
    data = json.dumps({"prompt": [5, 6, 7], "max_tokens": 1500, "ignore_eos": True, "stream": True}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Request-Id: gone"
    with socket.create_connection((host, int(port)), timeout=20) as sock:
        sock.sendall(
            f"{head}\r\nAuthorization: Bearer {audited.key}\r\nContent-Length: {len(data)}\r\n\r\n".encode()
            + data
        )
        received = b""
        while b"data: " not in received:
            received += sock.recv(4096)
    (line,) = audited.lines("gone")
    assert (line["status"], line["error"], line["finish_reason"]) == (499, "client_left", "abort")
    assert line["output_tokens"] >= 1


def test_the_admin_has_lines_and_probes_have_none(audited: Audited) -> None:
    with audited.server.client(headers={"authorization": "Bearer chief"}) as client:
        assert client.get("/health/ready", headers={"x-request-id": "probe"}).status_code == 200
        assert client.get("/metrics", headers={"x-request-id": "scrape"}).status_code == 200
        (line,) = audited.lines("scrape")
        assert (line["key"], line["endpoint"], line["status"]) == ("admin", "/metrics", 200)
        text = client.get("/metrics").text
    assert "probe" not in audited.path.read_text()
    assert 'ellm_audit_lines_total{outcome="lost"} 0.0' in text
    assert 'ellm_audit_lines_total{outcome="written"} 0.0' not in text
    assert re.search(r'ellm_api_keys\{router="\w+"\} 1\.0', text)
    assert re.search(r'ellm_api_key_file_broken\{router="\w+"\} 0\.0', text)


def test_grpc_has_the_same_lines(audited: Audited) -> None:
    own = (("authorization", f"Bearer {audited.key}"), ("x-request-id", "rpc"))
    other = (("x-api-key", "guess"), ("x-request-id", "rpc-wrong"))
    bad = (("x-api-key", audited.key), ("x-request-id", "rpc-bad"))
    with rpc_client(audited.server) as rpc:
        rpc.generate(request(f"{SECRET} again", max_tokens=3, ignore_eos=True), own)
        refused(lambda: rpc.generate(request(), other), UNAUTHENTICATED, error="invalid_api_key")
        unknown = pb.GenerateRequest(text="x", model="other")
        refused(lambda: rpc.generate(unknown, bad), NOT_FOUND, error="model_not_found")
    (line,) = audited.lines("rpc")
    assert (line["protocol"], line["endpoint"]) == ("grpc", "/ellm.v1.Inference/Generate")
    assert (line["key"], line["model"], line["output_tokens"]) == (audited.ident, MODEL, 3)
    assert (line["status"], line["finish_reason"], line["error"]) == (200, "length", None)
    assert line["client"].startswith("127.0.0.1:")
    assert [(x["status"], x["error"], x["key"]) for x in audited.lines("rpc-wrong")] == [
        (401, "invalid_api_key", None)
    ]
    assert audited.lines("rpc-bad")[0]["status"] == 404


def test_no_line_holds_a_text_or_a_key(audited: Audited) -> None:
    """After all the requests above."""
    audited.post("last", prompt=SECRET, max_tokens=1)
    audited.lines("last")
    text = audited.path.read_text()
    assert len(text.splitlines()) > 5 or "last" in text
    for secret in (SECRET, audited.key, audited.key.split("-", 2)[2], "chief", "guess"):
        assert secret not in text
    assert audited.path.stat().st_mode & 0o077 == 0


def test_a_file_that_is_moved_away_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    lines = AuditLog(str(path), lambda: 0.0)
    lines.write(lines.record("first", "http", "/", ""))
    wait_until(lambda: lines.num_written == 1)
    path.rename(tmp_path / "old")
    lines.write(lines.record("second", "http", "/" + "x" * 1000, ""))
    wait_until(lambda: lines.num_written == 2)
    assert b"second" in path.read_bytes()
    assert len(path.read_bytes()) < 500
    lines.write(lines.record("third", "http", "/", ""))
    lines.close()
    assert b"third" in path.read_bytes()
    assert json.loads((tmp_path / "old").read_text())["time"] == "1970-01-01T00:00:00.000+00:00"


def test_lines_that_cannot_be_written_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lines = AuditLog(str(tmp_path / "absent" / "audit.jsonl"))
    for _ in range(3):
        lines.write(lines.record("a", "http", "/", ""))
    wait_until(lambda: lines.num_lost == 3)
    lines.write(lines.record("a", "http", "/", ""))
    wait_until(lambda: lines.num_lost == 4)
    assert caplog.text.count("audit lines are lost") == 1
    (tmp_path / "absent").mkdir()
    lines.write(lines.record("b", "http", "/", ""))
    lines.close()
    assert (lines.num_written, lines.num_lost) == (1, 4)
    monkeypatch.setattr(audit, "MAX_WAITING", 2)
    for _ in range(5):  # nobody writes any more
        lines.write(lines.record("c", "http", "/", ""))
    assert lines.num_lost == 7


def test_where_lines_go() -> None:
    assert audit_path("auto", guarded=True) == "-"
    assert audit_path("auto", guarded=False) is None
    assert audit_path("off", guarded=True) is None
    assert audit_path("/x", guarded=False) == "/x"
    assert peer_address("ipv4:127.0.0.1:5000") == "127.0.0.1:5000"
    assert peer_address("ipv6:%5B::1%5D:5000") == "[::1]:5000"
