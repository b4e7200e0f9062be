"""A server that grows, as those see it who are no part of it: the clients, its pages, its processes."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from ellm.loadtest.chaos_client import Answer, Template, ask
from ellm.loadtest.processes import tree_use
from ellm.loadtest.served import Started

SUPERVISOR = "ray::ServeReplica:ellm:Worker"
POLL_S = 0.05
WAIT_S = 300.0  # for anything


class Load:
    """Streams, one after the other in each of several places; the last place goes on until `over`."""

    def __init__(self, host: str, port: int, templates: list[Template], num_streams: int) -> None:
        self.answers: dict[str, Answer] = {}  # by request id
        self.busy, self.over = threading.Event(), threading.Event()
        self._host, self._port, self._templates, self._num_streams = host, port, templates, num_streams
        self._thread = threading.Thread(target=lambda: asyncio.run(self._all()))

    def __enter__(self) -> Load:
        self.busy.set()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.busy.clear()
        self.over.set()
        self._thread.join()

    async def _all(self) -> None:
        await asyncio.gather(*(self._client(place) for place in range(self._num_streams)))

    async def _client(self, place: int) -> None:
        count = 0
        while self.busy.is_set() or (place == 0 and not self.over.is_set()):
            number = (place + count * self._num_streams) % len(self._templates)
            request_id = f"scale-{id(self):x}-{place}-{count}"
            count += 1
            self.answers[request_id] = await ask(
                self._host, self._port, number, self._templates[number], request_id
            )

    def lost(self) -> list[str]:
        """What was not answered in full, and as an undisturbed server does."""
        return [
            answer.error or "another text"
            for answer in self.answers.values()
            if not (answer.whole and self._templates[answer.template].fits(answer))
        ]


class Outside:
    """What can be seen of a server without being part of it."""

    def __init__(self, server: Started) -> None:
        self._server = server

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"{self._server.url}{path}", timeout=30) as answer:
            return bytes(answer.read())

    def workers(self) -> list[dict[str, Any]]:
        """Those that serve."""
        table: list[dict[str, Any]] = json.loads(self.get("/admin/workers"))["workers"]
        return [row for row in table if row["state"] in ("ready", "suspect")]

    def wanted(self) -> int:
        found = re.search(
            r"^ellm_workers_wanted\{[^}]*\} (\S+)$", self.get("/metrics").decode(), re.MULTILINE
        )
        return 0 if found is None else int(float(found[1]))

    def num_supervisors(self) -> int:
        uses = tree_use(self._server.pid).values()
        return sum(use.command.startswith(SUPERVISOR) for use in uses)

    def worker_of(self, request_id: str) -> str | None:
        """The worker that gave all of an answer; None where it moved, or nobody knows."""
        try:
            (choice, *_) = json.loads(self.get(f"/admin/requests/{request_id}"))["choices"]
        except urllib.error.HTTPError:
            return None
        return None if choice["num_moves"] else choice["worker"]


def when(what: str, condition: Callable[[], object]) -> float:
    """The time at which it is first seen. Raises TimeoutError."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited in vain for {what}")
        time.sleep(POLL_S)
    return time.monotonic()


def first_token_of(worker: str, outside: Outside, load: Load, since: float) -> float:
    """When the first answer of this worker alone began, of those that began after `since`; 0: there is none
    yet."""
    begun = sorted((a.first_at, i) for i, a in list(load.answers.items()) if a.whole and a.first_at >= since)
    return next((at for at, request_id in begun if outside.worker_of(request_id) == worker), 0.0)
