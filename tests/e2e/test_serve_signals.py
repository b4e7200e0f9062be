"""However `ellm serve` ends, nothing of it is left; and two of them do not meet."""

from __future__ import annotations

import json
import signal
import time
import urllib.request
from typing import Any

import pytest
from support.served import served, wait_for

from ellm.deploy.ports import free_ports

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

# No weights and no torch: what is tested is the start and the end.
SIMULATED = ["simulated:overhead_s=0.01", "--workers", "1"]


def test_a_signal_during_the_start_ends_it() -> None:
    (port,) = free_ports(1)
    with served(*SIMULATED, "--port", str(port)) as server:
        server.wait_for_line(r"\] Ray: ")
        server.signal(signal.SIGTERM)
        assert server.wait() == 130, server.output
        assert server.processes() == []
        assert "Ready" not in server.output
        assert "Traceback" not in server.output


@pytest.mark.slow
def test_two_servers_on_one_machine() -> None:
    first_port, second_port = free_ports(2)
    with (
        served(*SIMULATED, "--port", str(first_port), "--served-model-name", "first") as first,
        served(*SIMULATED, "--port", str(second_port), "--served-model-name", "second") as second,
    ):
        first_url, second_url = first.wait_until_ready(), second.wait_until_ready()
        for _ in range(10):
            assert models(first_url) == ["first"]
            assert models(second_url) == ["second"]
        first.signal(signal.SIGINT)
        assert first.wait() == 0
        assert first.processes() == []
        assert models(second_url) == ["second"]
        with stream(second_url, "second", num_tokens=3000) as response:  # 30 s of it
            assert response.readline().startswith(b"data:")
            second.signal(signal.SIGINT)
            second.wait_for_line("Stopping")
            time.sleep(2.0)
            assert second.process.poll() is None  # it drains
            second.signal(signal.SIGINT)
            assert second.wait(10) == 130
            assert second.processes() == []


@pytest.mark.slow
def test_nothing_outlives_a_killed_server() -> None:
    (port,) = free_ports(1)
    with served(*SIMULATED, "--port", str(port)) as server:
        server.wait_until_ready()
        server.process.kill()
        server.process.wait()
        wait_for(lambda: server.processes() == [], 30)


def stream(url: str, model: str, num_tokens: int) -> Any:
    body = {"model": model, "prompt": "x", "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    return urllib.request.urlopen(request, timeout=60)


def models(url: str) -> list[str]:
    with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as response:
        found: Any = json.load(response)
    return [item["id"] for item in found["data"]]
