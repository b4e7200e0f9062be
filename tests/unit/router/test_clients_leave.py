"""Clients that leave, and clients that do not read: nothing of theirs stays behind."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from support.router_server import EchoWorker, RouterServer, router_config, wait_until

from ellm.router.config import LimitsConfig

NUM_CLIENTS = 16  # as many as are admitted at once, each with an output that may be long
BODY: dict[str, Any] = {"prompt": [10 + i for i in range(64)], "max_tokens": 1500, "ignore_eos": True}


@pytest.fixture
def server() -> Iterator[RouterServer]:
    with RouterServer([EchoWorker(0, step_s=0.003)], router_config(heartbeat_s=0.1)) as running:
        yield running


def open_request(server: RouterServer, body: dict[str, Any]) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    sock = socket.create_connection((host, int(port)), timeout=20)
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    sock.sendall(head.encode() + data)
    return sock


def assert_nothing_left(server: RouterServer) -> None:
    """Neither in the router, nor in the front, nor in the engine: every block is free or merely cached."""
    dispatcher, worker = server.service.dispatcher, server.workers[0]

    def left() -> list[int]:
        return [
            dispatcher.admission.num_inflight,
            len(dispatcher._home),
            sum(len(link.live) for link in dispatcher.links.values()),
            worker.front.num_live,
            worker.limits.num_blocks - worker.free_blocks(),
        ]

    wait_until(lambda: server.on_loop(left) == [0] * 5, 10)
    assert server.service.metrics.failovers.total() == 0


def test_clients_killed_after_their_first_token(server: RouterServer) -> None:
    clients = [open_request(server, {**BODY, "stream": True}) for _ in range(NUM_CLIENTS)]
    for sock in clients:
        received = b""
        while b"data: " not in received:
            received += sock.recv(4096)
        assert received.startswith(b"HTTP/1.1 200")
    for sock in clients:
        sock.close()
    assert_nothing_left(server)
    assert dict(server.service.metrics.finished) == {"abort": NUM_CLIENTS}


@pytest.mark.parametrize("streamed", [False, True])
def test_clients_killed_before_their_first_token(server: RouterServer, streamed: bool) -> None:
    worker = server.workers[0]
    worker.executor.gate.clear()
    prompt = list(range(100, 1100))
    clients = [open_request(server, {"prompt": [i, *prompt], "stream": streamed}) for i in range(100, 130)]
    wait_until(lambda: server.on_loop(lambda: worker.front.num_live) == len(clients))
    for sock in clients:
        sock.close()
    wait_until(lambda: server.on_loop(lambda: worker.front.num_live) == 0)
    worker.executor.gate.set()
    assert_nothing_left(server)


def test_a_client_that_waits_for_a_worker_may_leave() -> None:
    with RouterServer([EchoWorker(0)], router_config(queue_timeout_s=20.0)) as server:
        worker = server.workers[0]
        worker.channel.sever()
        server.on_loop(server.directory.channels.clear)
        wait_until(lambda: server.on_loop(lambda: not server.service.dispatcher.links))
        clients = [open_request(server, BODY) for _ in range(5)]
        wait_until(lambda: server.service.dispatcher.gate.num_waiting == 5)
        for sock in clients:
            sock.close()
        wait_until(lambda: server.service.dispatcher.gate.num_waiting == 0)


def test_a_client_that_does_not_read_is_cut_off_and_disturbs_nobody() -> None:
    limits = LimitsConfig(max_client_buffer_bytes=20_000)
    with RouterServer([EchoWorker(0)], router_config(limits=limits)) as server:
        host, port = server.url.removeprefix("http://").split(":")
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect((host, int(port)))
        # Many choices with much to say of each token: megabytes, more than sockets hold.
        body = {**BODY, "stream": True, "n": 16, "logprobs": 20}
        data = json.dumps(body).encode()
        slow.sendall(
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data
        )
        wait_until(lambda: server.service.dispatcher.admission.num_inflight == 16)
        with server.client() as client:
            answer = client.post("/v1/completions", json={**BODY, "max_tokens": 30}).json()
            assert answer["usage"]["completion_tokens"] == 30
        wait_until(lambda: server.service.metrics.finished["abort"] == 16, 20)
        assert_nothing_left(server)
        slow.close()
