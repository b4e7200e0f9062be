"""Brings sequences to workers and keeps them on one: choice, submission, failover, abort.

Holds one link per worker that the directory names. A sequence that is given here ends exactly once: its sink
gets a finish reason or an error, whatever becomes of workers in between. Knows tokens, not text or HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Collection, Coroutine, Sequence
from dataclasses import replace
from typing import Any, Protocol

from ellm.router.admission import Admission, WorkerGate
from ellm.router.config import RouterConfig
from ellm.router.failover import Hearing, PoisonList, SilenceWatch
from ellm.router.link import WorkerLink
from ellm.router.policies import Choice, RoutedRequest, RoutingPolicy, make_policy
from ellm.router.policies.base import OUTPUT_TOKENS
from ellm.router.rescue import Rescue
from ellm.router.sequence import Sequence as LiveSequence
from ellm.router.sequence import Verdict
from ellm.router.subset import subset
from ellm.worker.api.channel import WorkerChannel, WorkerDirectory
from ellm.worker.api.errors import EllmError
from ellm.worker.api.output import FinishReason
from ellm.worker.api.report import WorkerInfo, WorkerReport

log = logging.getLogger(__name__)

WATCH_PERIOD_S = 0.1
LENGTH_SMOOTHING = 0.02  # of one sequence in the mean length
LAG_MEMORY_S = 10.0  # a stream lost so soon after our loop stood still was not lost by the worker


class DispatchObserver(Protocol):
    """What is counted."""

    def token_interval(self, interval_s: float) -> None: ...
    def sequence_ended(self, sequence: LiveSequence, reason: FinishReason) -> None: ...
    def failover(self, reason: str) -> None: ...
    def decision(self, reason: str) -> None: ...
    def worker_report(self, info: WorkerInfo, report: WorkerReport) -> None: ...
    def worker_gone(self, info: WorkerInfo, reason: str = "") -> None: ...


class Dispatcher:
    """One per router. All methods belong to the event loop on which `start` ran."""

    def __init__(
        self,
        directory: WorkerDirectory,
        config: RouterConfig,
        observer: DispatchObserver,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.router_id = uuid.uuid4().hex[:12]
        self.links: dict[str, WorkerLink] = {}
        self.num_lost = 0  # workers lost so far
        self.admission = Admission(config.limits.max_inflight, self._ready_reports)
        self.gate = WorkerGate(config.queue_timeout_s)
        self._directory = directory
        self._config = config
        self._observer = observer
        self.clock = clock
        self._policy: RoutingPolicy = make_policy(config.policy)
        self._output_tokens: float = OUTPUT_TOKENS  # of a sequence, moving average
        self._rescue = Rescue(self, config.failover, self._place_one)
        self._home: dict[str, WorkerLink] = {}  # request id -> where it lives
        self._tasks: set[asyncio.Task[None]] = set()
        self._watched_at = clock()
        self._lagged_at = -LAG_MEMORY_S  # when this router's own loop last stood still

    async def start(self) -> None:
        """Look for workers once, then go on looking, and watch those that are there."""
        with contextlib.suppress(Exception):
            await self._refresh()
        self._watched_at = self.clock()
        self.spawn(self._forever(self._refresh, self._config.refresh_s))
        self.spawn(self._forever(self._watch, WATCH_PERIOD_S))

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for link in list(self.links.values()):
            await link.close()

    @property
    def poison(self) -> PoisonList:
        return self._rescue.poison

    @property
    def ready_links(self) -> list[WorkerLink]:
        return [link for link in self.links.values() if link.ready]

    def _ready_reports(self) -> list[WorkerReport]:
        return [link.report for link in self.ready_links if link.report is not None]

    def info(self) -> WorkerInfo | None:
        """What the workers serve; they all serve the same model."""
        links = self.ready_links or list(self.links.values())
        return links[0].info if links else None

    async def wait_for_worker(self, since: float | None = None) -> WorkerInfo:
        """Raises Unavailable when none is up within the queue's time."""
        since = self.clock() if since is None else since
        while not (ready := self.ready_links):
            await self.gate.wait(self.clock() - since)
        return ready[0].info

    async def submit(self, sequences: Sequence[LiveSequence], request: RoutedRequest) -> None:
        """Send sequences that share a prompt to one worker, waiting for one to be up. Raises Unavailable,
        WorkerFailed (a prompt that is held back)."""
        self._rescue.poison.check(request.prompt_ids, self.clock())
        await self._place(sequences, request)

    def cancel(self, sequence: LiveSequence) -> None:
        """End a sequence that no one waits for; its blocks are freed at once."""
        if sequence.finished is None:
            sequence.finished = "abort"
            self._tell_ended(sequence, "abort")
        link = self._home.pop(sequence.request_id, None)
        if link is not None:
            link.abort(sequence)
        self._rescue.forget(sequence)

    # LinkOwner

    def sequence_moved(self, link: WorkerLink, sequence: LiveSequence, verdict: Verdict) -> None:
        self._home.pop(sequence.request_id, None)
        if verdict is Verdict.GAP:
            self._rescue.move([sequence], "gap", death=False)
        elif verdict is Verdict.REFUSED:
            self._rescue.refused(sequence, link.info.epoch)
        else:
            assert sequence.finished is not None
            self._note_length(sequence)
            self._tell_ended(sequence, sequence.finished)

    def token_interval(self, interval_s: float) -> None:
        self._observer.token_interval(interval_s)

    def link_report(self, link: WorkerLink) -> None:
        assert link.report is not None
        self._observer.worker_report(link.info, link.report)
        if link.ready:
            self.gate.open()

    def link_lost(self, link: WorkerLink) -> None:
        """Drop the link; if the directory still names the worker, the next refresh opens a new one."""
        if self.links.get(link.info.epoch) is link:
            del self.links[link.info.epoch]
        self.num_lost += link.report is not None
        reason = self._loss_reason(link)
        self._observer.worker_gone(link.info, reason)
        sequences = link.take_all()
        for sequence in sequences:
            self._home.pop(sequence.request_id, None)
        self.spawn(self._bury(link, [(s.request_id, s.attempt) for s in sequences]))
        self._rescue.move(sequences, reason, death=reason == "death")

    def _loss_reason(self, link: WorkerLink) -> str:
        """A worker ends our stream too when it drains, and when it did not hear from us for a lease."""
        if link.draining:
            return "drain"
        now = self.clock()
        self._note_lag(now)
        return "lag" if now - self._lagged_at < LAG_MEMORY_S else "death"

    def _note_lag(self, now: float) -> None:
        """Remember that our own loop has stood still for about as long as a worker waits for us."""
        if now - self._watched_at > self._config.failover.fail_s:
            self._lagged_at = now

    # Rescuer

    def count_move(self, reason: str) -> None:
        self._observer.failover(reason)

    def has_room_elsewhere(self, avoid: set[str]) -> bool:
        return any(link.info.epoch not in avoid for link in self.ready_links)

    def end(self, sequence: LiveSequence, error: EllmError) -> None:
        if sequence.finished is None:
            sequence.finished = "error"
            sequence.error = error
            self._tell_ended(sequence, "error")
            sequence.sink.fail(sequence, error)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # Choice

    async def _place_one(self, sequence: LiveSequence) -> None:
        """One that a worker had taken, or had no room for."""
        request = RoutedRequest(sequence.prompt_ids, session_id=sequence.session_id, salt=sequence.salt)
        hold_s = self._config.failover.hold_s if sequence.kept else None
        await self._place([sequence], request, hold_s, sequence.avoid)

    async def _place(
        self,
        sequences: Sequence[LiveSequence],
        request: RoutedRequest,
        hold_s: float | None = None,
        avoid: Collection[str] = (),
    ) -> None:
        since = self.clock()
        if sequences:
            most = sequences[0].sampling.max_tokens
            request = replace(request, output_tokens=min(self._output_tokens, most))
        while (choice := self._choose(request, avoid)) is None:
            await self.gate.wait(self.clock() - since, hold_s)
        link = self.links[choice.replica_id]
        sequences = [s for s in sequences if s.finished is None]  # some may have ended at the gate
        for sequence in sequences:
            self._home[sequence.request_id] = link
        link.submit(sequences, choice.cached_tokens)

    def _choose(self, request: RoutedRequest, avoid: Collection[str]) -> Choice | None:
        ready = self.ready_links
        if avoid:
            ready = [link for link in ready if link.info.epoch not in avoid] or ready
        well = [link for link in ready if not link.suspect]
        now = self.clock()
        choice = self._policy.choose(request, [link.replica for link in well or ready], now)
        if choice is not None:
            self._observer.decision(choice.reason)
        return choice

    def _tell_ended(self, sequence: LiveSequence, reason: FinishReason) -> None:
        sequence.note("done", self.clock(), reason)
        self._observer.sequence_ended(sequence, reason)

    def _note_length(self, sequence: LiveSequence) -> None:
        """What a policy expects of the next request."""
        self._output_tokens += LENGTH_SMOOTHING * (len(sequence.output_ids) - self._output_tokens)

    # Workers

    async def _refresh(self) -> None:
        channels = await self._directory.refresh()
        chosen = subset(channels, self.router_id)
        for epoch in chosen - self.links.keys():
            self.links[epoch] = self._link(channels[epoch])
        for epoch in (self.links.keys() & channels.keys()) - chosen:
            if not self.links[epoch].live:  # once what runs there has ended
                self._release(self.links.pop(epoch))

    def _link(self, channel: WorkerChannel) -> WorkerLink:
        watch = SilenceWatch(self._config.failover, WATCH_PERIOD_S, self.clock())
        return WorkerLink(channel, self.router_id, self, watch, self._config.heartbeat_s, self.clock)

    def _release(self, link: WorkerLink) -> None:
        """Leave a worker that is well and that this router needs no more."""
        self._observer.worker_gone(link.info)
        self.spawn(link.close())

    async def _watch(self) -> None:
        now = self.clock()
        self._note_lag(now)
        self._watched_at = now
        for link in list(self.links.values()):
            if link.watch.tick(now) is Hearing.SILENT:
                log.warning("worker %s is silent and given up", link.info.worker_id)
                link.lost = True
                self.link_lost(link)

    async def _bury(self, link: WorkerLink, ids: Sequence[tuple[str, int]]) -> None:
        """End the link, and what the worker may still compute for us, should it live."""
        await link.close()
        with contextlib.suppress(Exception):
            await asyncio.wait_for(link.send_aborts(ids), self._config.failover.fail_s)

    async def _forever(self, work: Callable[[], Coroutine[Any, Any, None]], period_s: float) -> None:
        while True:
            await asyncio.sleep(period_s)
            try:
                await work()
            except Exception:  # the router outlives whatever the directory's transport raises
                log.exception("%s failed", work.__name__)
