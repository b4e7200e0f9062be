"""A server for as long as a measurement takes, and whether requests have left anything behind in it."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

QUIET_S = 60.0  # for what is still running when the last answer has come


SERVE = "ellm.deploy.cli"


@dataclass(frozen=True, slots=True)
class Started:
    """A server that is ready."""

    pid: int
    url: str
    ready_s: float  # since it was started


@contextmanager
def started(module: str, words: Iterable[str], env: Mapping[str, str] | None = None) -> Iterator[Started]:
    """`python -m MODULE WORDS`, once it has printed `Ready: URL`; stopped as by Ctrl-C. `env` takes the place
    of our own environment."""
    begun = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", module, *words], stdout=subprocess.PIPE, text=True, env=env
    )
    try:
        url = _ready(process)
        yield Started(process.pid, url, time.monotonic() - begun)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=90)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def served(*words: str) -> Iterator[str]:
    """`ellm serve` with these words; yields its URL when it is ready, and stops it."""
    with started(SERVE, ("serve", *words)) as server:
        yield server.url


def _ready(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        print(f"  {line}", end="", flush=True)
        found = re.match(r"Ready: (http\S+)", line)
        if found:
            threading.Thread(target=process.stdout.read, daemon=True).start()  # so that it never blocks
            return found[1]
    raise RuntimeError("the server ended before it was ready")


def left_over(url: str) -> dict[str, Any]:
    """Once all is quiet, or after QUIET_S: requests that workers still hold, and blocks that are neither free
    nor merely cached, which are those that something references. Nothing: all zero."""
    deadline = time.monotonic() + QUIET_S
    while True:
        found = left_on(workers_of(url))
        if not any(found.values()) or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def left_on(workers: list[dict[str, Any]]) -> dict[str, Any]:
    """The same of what was said of each worker: one's gain never hides another's loss."""
    return {
        "requests": sum(w["num_running"] + w["num_waiting"] + w["num_here"] for w in workers),
        "referenced blocks": sum(
            abs(w["num_blocks"] - w["free_blocks"] - w["cached_blocks"]) for w in workers
        ),
        "workers away": sum(w["state"] != "ready" for w in workers) if workers else 1,
    }


def workers_of(url: str) -> list[dict[str, Any]]:
    """What the router knows of each worker, from its last report."""
    found: list[dict[str, Any]] = httpx.get(f"{url}/admin/workers", timeout=30).json()["workers"]
    return found


def blocks_of(url: str) -> list[str]:
    """A line for each worker: where its blocks are."""
    return [
        f"worker {w['id']}: {w['num_blocks']} blocks = {w['free_blocks']} free + "
        f"{w['cached_blocks']} cached + "
        f"{w['num_blocks'] - w['free_blocks'] - w['cached_blocks']} referenced"
        for w in workers_of(url)
    ]


def answers(url: str) -> bool:
    """A normal request succeeds."""
    body = {"prompt": "The list method append", "max_tokens": 8, "ignore_eos": True}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    return answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 8
