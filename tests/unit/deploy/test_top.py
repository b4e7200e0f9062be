"""`ellm top`: what it draws, once and live, and that it leaves the terminal as it was."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from fcntl import ioctl
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.router_server import EchoWorker, RouterServer, router_config

from ellm.deploy.cli import main
from ellm.deploy.commands.top import ENTER, LEAVE
from ellm.deploy.top_view import BAR, Metrics, median, parse_metrics, render, shares

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
WORKER: dict[str, Any] = {
    "id": "w0", "model": "m", "state": "ready", "headroom_tokens": 8000, "num_running": 3, "num_waiting": 1,
    "num_parked": 2, "uncached_token_ratio": 0.25, "recompute_debt_s": 0.1, "step_time_s": 0.02,
    "slo_attainment": 0.99, "num_blocks": 1000, "block_size": 16, "running_tokens": 8000,
    "parked_tokens": 2000, "recomputing_tokens": 1000, "streaming_tokens": 1000, "weight": 0.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[RouterServer]:
    with RouterServer([EchoWorker(0), EchoWorker(1)], router_config(admin_key="chief")) as server:
        yield server


def bar(line: str) -> str:
    return ESCAPES.sub("", line).partition("[")[2].partition("]")[0]


def test_the_bar_shows_where_the_tokens_are() -> None:
    assert shares(WORKER) == {"#": 6000, "r": 1000, "s": 1000, "p": 2000, ".": 8000}
    drawn = bar(render([WORKER], Metrics(), Metrics(), 200)[3])
    assert len(drawn) == BAR
    assert {letter: drawn.count(letter) for letter in "#rsp."} == {"#": 8, "r": 1, "s": 2, "p": 2, ".": 11}


counts = st.integers(0, 10**6)


@given(counts, counts, counts, counts, st.integers(10, 250))
def test_no_line_is_wider_than_the_terminal(
    running: int, parked: int, holes: int, more: int, width: int
) -> None:
    worker = WORKER | {"running_tokens": running, "parked_tokens": parked, "num_waiting": more}
    worker |= {"recomputing_tokens": holes, "headroom_tokens": more}
    for line in render([worker, worker | {"model": "other"}], Metrics(), Metrics(), width):
        assert len(ESCAPES.sub("", line)) <= width


def test_a_worker_without_a_report_and_no_worker_at_all() -> None:
    text = "\n".join(render([{"id": "w0", "model": "m", "state": "loading"}], Metrics(), Metrics(), 100))
    assert "loading" in text
    assert "no workers" in render([], Metrics(), Metrics(), 100)[-1]


def test_latencies_are_of_the_time_since_the_last_look() -> None:
    name = "ellm_time_to_first_token_seconds_bucket"
    page = '{0}{{le="0.1",model_name="{3}"}} {1}\n{0}{{le="+Inf",model_name="{3}"}} {2}\n'
    first = parse_metrics(page.format(name, 5, 10, "a"))
    second = parse_metrics(page.format(name, 25, 30, "a") + page.format(name, 1, 1, "b"))
    assert median(first.ttft, ()) == 0.05
    assert median(second.ttft, first.ttft) == 0.05
    assert median(second.ttft, second.ttft) is None


def test_once_prints_the_table(server: RouterServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--once", "--url", server.url, "--api-key", "chief"]) == 0
    out = capsys.readouterr().out
    assert "2/2 workers ready" in out
    assert "controller's advice: none" in out
    assert len([line for line in out.splitlines() if line.startswith("w")]) == 3  # with the head
    assert "\x1b" not in out
    assert main(["top", "--once", "--url", server.url]) == 1  # without the key
    assert main(["top", "--url", "http://127.0.0.1:9"]) == 1
    assert ENTER not in capsys.readouterr().out


def test_live_it_follows_the_terminals_size_and_ends_clean(server: RouterServer) -> None:
    parent, child = pty.openpty()
    ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 20, 120, 0, 0))
    code = "import sys; from ellm.deploy.cli import main; sys.exit(main(sys.argv[1:]))"
    words = ["top", "--url", server.url, "--api-key", "chief", "--interval", "0.1"]
    env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words],
        stdin=child,
        stdout=child,
        env=env,
        # Whoever runs the tests in the background has it ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(child)

    def read_until(*texts: str) -> str:
        seen, deadline = "", time.monotonic() + 20
        while not all(text in seen for text in texts):
            assert time.monotonic() < deadline, seen
            if select.select([parent], [], [], 0.1)[0]:
                seen += os.read(parent, 65536).decode()
        return seen

    try:
        seen = read_until(ENTER, "2/2 workers ready", "w1")
        assert "[" in ESCAPES.sub("", seen)  # the bar
        ioctl(parent, termios.TIOCSWINSZ, struct.pack("HHHH", 20, 40, 0, 0))
        time.sleep(0.5)
        while select.select([parent], [], [], 0.0)[0]:
            os.read(parent, 65536)
        narrow = read_until("workers ready", "worker ", "w1")
        assert max(len(line) for line in ESCAPES.sub("", narrow).replace("\r", "").split("\n")) <= 40
        process.send_signal(signal.SIGINT)
        assert LEAVE in read_until(LEAVE)
        assert process.wait(10) == 130
    finally:
        process.kill()
        process.wait()
        os.close(parent)
