"""How many sequences one router holds, and the queue of those that wait for a worker to be up."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable

from ellm.worker.api.errors import QueueFull, Unavailable
from ellm.worker.api.report import WorkerReport

MIN_RETRY_S = 1.0
MAX_RETRY_S = 60.0


class Admission:
    """Counts sequences in the router. Everything that waits is counted too, so every queue is bounded."""

    def __init__(self, max_inflight: int, reports: Callable[[], Iterable[WorkerReport]] = tuple) -> None:
        """`reports` of the workers that take requests tell how long a refused client should stay away."""
        self._max_inflight = max_inflight
        self._reports = reports
        self.num_inflight = 0

    def enter(self, count: int) -> None:
        """Raises QueueFull; then nothing was counted."""
        if self.num_inflight + count > self._max_inflight:
            retry_after_s = min(MAX_RETRY_S, max(MIN_RETRY_S, backlog_s(self._reports())))
            raise QueueFull(
                "the server has as many requests as it takes; try again", retry_after_s=retry_after_s
            )
        self.num_inflight += count

    def leave(self, count: int) -> None:
        self.num_inflight -= count
        assert self.num_inflight >= 0


def backlog_s(reports: Iterable[WorkerReport]) -> float:
    """How long the shortest of the workers' queues takes: prompts at its prefill rate, and KV that must be
    brought back. 0 where no worker says."""
    return min((_one_backlog_s(report) for report in reports), default=0.0)


def _one_backlog_s(report: WorkerReport) -> float:
    tokens = report.waiting_tokens + report.prefill_tokens
    rate = report.prefill_rate_tok_s
    return report.recompute_debt_s + (tokens / rate if rate > 0.0 else 0.0)


class WorkerGate:
    """Requests wait here, first come first served, while no worker is up."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._waiters: deque[asyncio.Future[None]] = deque()

    @property
    def num_waiting(self) -> int:
        return len(self._waiters)

    def open(self) -> None:
        """A worker is up: let all try again, in their order."""
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)

    async def wait(self, waited_s: float = 0.0, timeout_s: float | None = None) -> None:
        """Until `open`; raises Unavailable when that takes too long, longer than `timeout_s` where given.
        `waited_s` was spent here before."""
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await asyncio.wait_for(waiter, max(0.0, timeout_s - waited_s))
        except TimeoutError:
            raise Unavailable("no worker is ready to serve this model", retry_after_s=5.0) from None
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
