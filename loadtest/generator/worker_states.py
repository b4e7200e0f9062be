"""What a server of ours says of its workers' memory while a run goes on, from its `/admin/workers`."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any

from ellm.loadtest.generator.target import Target

PERIOD_S = 0.5
KEPT = ("num_running", "num_waiting", "num_parked", "uncached_token_ratio", "headroom_tokens", "free_blocks")


class WorkerStates:
    """Asks in a thread of its own, so that a slow answer delays nobody. A call gives what is new."""

    def __init__(self, target: Target) -> None:
        self._url = f"{target.url}/admin/workers"
        self._headers = target.headers
        self._rows: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._start_s: float | None = None
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __call__(self, start_s: float) -> list[dict[str, Any]]:
        """Rows with `time_s` since `start_s` (monotonic). The first call starts the watching."""
        if self._start_s is None:
            self._start_s = start_s
            self._thread.start()
        with self._lock:
            rows, self._rows = self._rows, []
        return rows

    def close(self) -> None:
        self._stop.set()
        if self._start_s is not None:
            self._thread.join(5.0)

    def _watch(self) -> None:
        assert self._start_s is not None
        while not self._stop.wait(PERIOD_S):
            request = urllib.request.Request(self._url, headers=self._headers)
            try:
                with urllib.request.urlopen(request, timeout=5.0) as response:
                    workers = json.loads(response.read())["workers"]
            except (OSError, HTTPException, ValueError, KeyError):
                continue  # a gap in the plot; the requests say what is wrong
            now = time.monotonic() - self._start_s
            rows = [worker_row(worker, now) for worker in workers if "num_blocks" in worker]
            with self._lock:
                self._rows += rows


def worker_row(worker: Mapping[str, Any], time_s: float) -> dict[str, Any]:
    """One worker at one moment: tokens of its pool by state, as `ellm top` draws them."""
    parked = worker.get("parked_tokens", 0)
    recomputed, streamed = worker.get("recomputing_tokens", 0), worker.get("streaming_tokens", 0)
    cached = max(0, worker.get("running_tokens", 0) - recomputed - streamed)
    pool = worker["num_blocks"] * worker.get("block_size", 1)
    return {
        "time_s": round(time_s, 3),
        "worker": str(worker.get("id")),
        "cached_tokens": cached,
        "recomputing_tokens": recomputed,
        "streaming_tokens": streamed,
        "parked_tokens": parked,
        "free_tokens": max(0, pool - cached - parked),
        **{name: worker[name] for name in KEPT if name in worker},
    }
