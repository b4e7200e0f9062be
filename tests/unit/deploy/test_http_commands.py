"""`ellm chat` and `ellm status` against an HTTP server that speaks as ours does."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from ellm.deploy import cli
from ellm.deploy.http_client import RequestFailed, Server

WORKER = {
    "id": "w0",
    "node": "n",
    "state": "ready",
    "rank_pids": [7, 8],
    "num_running": 1,
    "num_waiting": 0,
    "num_parked": 3,
    "uncached_token_ratio": 0.12345,
    "free_blocks": 5,
    "num_blocks": 9,
}


class Handler(BaseHTTPRequestHandler):
    """Answers the n-th chat with the number of its messages, in pieces."""

    seen: list[Any] = []  # noqa: RUF012

    def do_GET(self) -> None:
        bodies = {
            "/v1/models": {"data": [{"id": "tiny"}]},
            "/admin/workers": {"workers": [WORKER]},
        }
        if self.path == "/html":
            return self._send(200, b"<html>", "text/html")
        if self.path == "/key":
            body = {"error": {"message": "wrong key", "type": "x", "param": None, "code": "y"}}
            return self._send(401, json.dumps(body).encode())
        return self._send(200, json.dumps(bodies[self.path]).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Handler.seen.append((body, self.headers.get("Authorization")))
        text = body["messages"][-1]["content"]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self._event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for piece in ("You said ", text, "."):
            self._event({"choices": [{"delta": {"content": piece}}]})
        if text == "fail":
            self._event({"error": {"message": "the worker failed"}})
        if text != "cut":
            self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, data: Any) -> None:
        self.wfile.write(b"data: " + json.dumps(data).encode() + b"\n\n")

    def _send(self, code: int, body: bytes, kind: str = "application/json") -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    Handler.seen = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def chat(url: str, text: str, monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    return cli.main(["chat", "--url", url, *flags])


def test_a_piped_conversation_keeps_its_history(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--max-tokens", "9", "--temperature", "0.5", "--api-key", "k", "--system", "be brief"]
    flags += ["--tpot-slo-ms", "80", "--priority", "2", "--stream-pace"]
    assert chat(url, "hello\n\nagain\n/reset\nnew\n/quit\nnever\n", monkeypatch, *flags) == 0
    assert capsys.readouterr().out == "You said hello.\nYou said again.\nYou said new.\n"
    bodies = [body for body, _ in Handler.seen]
    system = {"role": "system", "content": "be brief"}
    assert bodies[1]["messages"] == [
        system,
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "You said hello."},
        {"role": "user", "content": "again"},
    ]
    assert bodies[2]["messages"] == [system, {"role": "user", "content": "new"}]
    assert len(bodies) == 3
    assert (bodies[0]["model"], bodies[0]["stream"], bodies[0]["max_tokens"]) == ("tiny", True, 9)
    assert bodies[0]["temperature"] == 0.5
    assert "seed" not in bodies[0]
    assert (bodies[0]["tpot_slo_ms"], bodies[0]["priority"], bodies[0]["stream_pace"]) == (80, 2, True)
    assert "ttft_slo_ms" not in bodies[0]
    assert Handler.seen[0][1] == "Bearer k"


@pytest.mark.parametrize(
    ("text", "message"), [("fail", "the worker failed"), ("cut", "ended before it was done")]
)
def test_a_broken_answer_is_said_and_fails_a_pipe(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    assert chat(url, f"{text}\nhello\n", monkeypatch) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert "You said hello." in captured.out


def test_a_server_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "--url", "127.0.0.1:9"]) == 1
    assert capsys.readouterr().err.startswith("ellm status: cannot reach http://127.0.0.1:9: ")


def test_status_as_a_table_and_as_json(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "--url", url]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == [*[name for name in WORKER if name != "rank_pids"], "rank_pids"]
    assert row.split() == ["w0", "n", "ready", "1", "0", "3", "0.123", "5", "9", "7,8"]
    assert cli.main(["status", "--url", url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"workers": [WORKER]}


def test_the_server_s_own_words_are_shown(url: str) -> None:
    with pytest.raises(RequestFailed, match="wrong key"):
        Server(url).get("/key")
    with pytest.raises(RequestFailed, match="did not answer with JSON"):
        Server(url).get("/html")


@pytest.mark.parametrize("given", ["{}", "{}/", "{}/v1"])
def test_urls_may_be_written_in_several_ways(url: str, given: str) -> None:
    assert Server(given.format(url)).get("/v1/models") == {"data": [{"id": "tiny"}]}
