"""One router's line to one worker: requests and aborts out, one long-lived stream of outputs in.

Demultiplexes each step's outputs to the sequences that live here, keeps the worker's last report and what was
sent since, and says when the worker is gone. Which worker a request goes to, and what becomes of those of a
lost worker, is the dispatcher's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from ellm.router.failover import Hearing, SilenceWatch, stands_still
from ellm.router.policies import Replica
from ellm.router.sequence import Sequence as LiveSequence
from ellm.router.sequence import Verdict
from ellm.worker.api import wire
from ellm.worker.api.channel import ChannelClosed, WorkerChannel
from ellm.worker.api.report import WorkerReport

log = logging.getLogger(__name__)

STALL_S = 30.0  # work without a finished step for so long: the worker is not ready


class LinkOwner(Protocol):
    """The dispatcher, as a link sees it."""

    def sequence_moved(self, link: WorkerLink, sequence: LiveSequence, verdict: Verdict) -> None:
        """The sequence has ended here, was given back, or has a gap."""
        ...

    def token_interval(self, interval_s: float) -> None:
        """Time between two outputs of one sequence."""
        ...

    def link_report(self, link: WorkerLink) -> None:
        """A report has come."""
        ...

    def link_lost(self, link: WorkerLink) -> None:
        """The stream has ended; nothing comes from here any more."""
        ...


class WorkerLink:
    """Owns two tasks: one reads, one writes. `close` ends both."""

    def __init__(
        self,
        channel: WorkerChannel,
        router_id: str,
        owner: LinkOwner,
        watch: SilenceWatch,
        heartbeat_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.channel = channel
        self.info = channel.info
        self.watch = watch
        self.live: dict[str, LiveSequence] = {}
        self.report: WorkerReport | None = None
        self.reported_at = 0.0
        self.lost = False
        self._router_id = router_id
        self._owner = owner
        self._heartbeat_s = heartbeat_s
        self._clock = clock
        self._seq = 0
        self.replica = Replica(self.info.epoch, self.info.block_size)  # what policies see
        self._submits: list[tuple[LiveSequence, int, int]] = []  # with its prompt's rows and tokens
        self._aborts: list[tuple[str, int]] = []
        self._wake = asyncio.Event()
        self._tasks = [
            asyncio.create_task(self._read(), name=f"read {self.info.worker_id}"),
            asyncio.create_task(self._write(), name=f"write {self.info.worker_id}"),
        ]

    @property
    def ready(self) -> bool:
        """The worker takes requests, as far as its last report says."""
        report = self.report
        return (
            not self.lost
            and report is not None
            and report.state == "ready"
            and report.since_last_step_s < STALL_S
            and self.watch.hearing is not Hearing.SILENT
        )

    @property
    def suspect(self) -> bool:
        """It is silent, or its steps stand still: chosen only where nothing else is."""
        if self.watch.hearing is not Hearing.HEARD:
            return True
        return self.report is not None and stands_still(self.report)

    @property
    def draining(self) -> bool:
        return self.report is not None and self.report.state == "draining"

    def submit(self, sequences: Sequence[LiveSequence], cached_tokens: int = 0) -> None:
        """Send sequences as they stand now; they live here until they end or are taken away. `cached_tokens`
        of their prompt the worker is thought to have."""
        for sequence in sequences:
            self.live[sequence.request_id] = sequence
            sequence.note("sent", self._clock(), self.info.worker_id)
            tokens = len(sequence.prompt_ids) + len(sequence.output_ids)
            rows = max(1, tokens - cached_tokens)
            self._submits.append((sequence, rows, tokens))
            self.replica.place(1, rows, tokens)
        self._wake.set()

    def abort(self, sequence: LiveSequence) -> None:
        """Forget a sequence here and tell the worker."""
        if self.live.pop(sequence.request_id, None) is not None:
            self._aborts.append((sequence.request_id, sequence.attempt))
            self._wake.set()

    def take_all(self) -> list[LiveSequence]:
        """Take every sequence away, after the link was lost."""
        sequences = list(self.live.values())
        self.live.clear()
        return sequences

    async def close(self) -> None:
        """End both tasks. Not to be called from one of them."""
        self.lost = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def send_aborts(self, ids: Sequence[tuple[str, int]]) -> None:
        """Tell a worker that was given up. Raises what the channel raises."""
        await self.channel.abort(wire.abort(self._router_id, self._seq, list(ids)))

    async def _read(self) -> None:
        try:
            async for message in self.channel.outputs(self._router_id):
                self._step(message)
            log.info("worker %s has ended the stream", self.info.worker_id)
        except ChannelClosed as error:
            log.info("worker %s: %s", self.info.worker_id, error)
        except wire.WireError as error:
            log.error("worker %s: %s", self.info.worker_id, error)
        except Exception:  # whatever the channel's transport raises
            log.exception("the stream of worker %s broke", self.info.worker_id)
        self._lose()

    def _step(self, message: wire.Message) -> None:
        _, _, outputs, report = wire.check(message, "step")[:4]
        now = self._clock()
        self.watch.heard()
        live, owner = self.live, self._owner
        for output in outputs:
            sequence = live.get(output[0])
            if sequence is None:
                continue
            before = sequence.token_at
            verdict = self._accept(sequence, output, now)
            if verdict is Verdict.STALE:
                continue
            if before and sequence.token_at != before:
                owner.token_interval(now - before)
            if verdict is not Verdict.TAKEN:
                self._ended(sequence, verdict)
        if report is not None:
            self._reported(wire.unpack_report(report), now)

    def _accept(self, sequence: LiveSequence, output: wire.Message, now: float) -> Verdict:
        try:
            return sequence.accept(output, now)
        except Exception:  # one request's fault must not end the stream of all
            log.exception("an output of %s could not be taken", sequence.request_id)
            sequence.error = ("internal_error", "")
            sequence.finished = None  # it may have come that far; its sink must still be told
            self.abort(sequence)
            return Verdict.REFUSED

    def _ended(self, sequence: LiveSequence, verdict: Verdict) -> None:
        if verdict in (Verdict.STOPPED, Verdict.GAP):
            self.abort(sequence)
        else:
            self.live.pop(sequence.request_id, None)
        self._owner.sequence_moved(self, sequence, verdict)

    def _reported(self, report: WorkerReport, now: float) -> None:
        self.report = report
        self.reported_at = now
        self.replica.heard(report, self._router_id, now)
        self._owner.link_report(self)

    async def _write(self) -> None:
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), self._heartbeat_s)
                self._wake.clear()
                await self._send()
        except ChannelClosed as error:
            log.info("worker %s: %s", self.info.worker_id, error)
        except Exception:  # whatever the channel's transport raises
            log.exception("sending to worker %s failed", self.info.worker_id)
        self._lose()

    async def _send(self) -> None:
        """All that is due in one message of each kind; an abort without ids when there is nothing, so that
        the worker knows we live."""
        now = self._clock()
        submits, rows, tokens = [], 0, 0
        for sequence, its_rows, its_tokens in self._submits:
            if self.live.get(sequence.request_id) is sequence:
                submits.append(sequence)
                rows += its_rows
                tokens += its_tokens
            else:
                self.replica.withdraw(1, its_rows, its_tokens)
        aborts = self._aborts
        self._submits, self._aborts = [], []
        if submits:
            self._seq += 1
            self.replica.sent(self._seq, len(submits), rows, tokens, now)
            requests = [sequence.engine_request(now) for sequence in submits]
            await self.channel.submit(wire.submit(self._router_id, self._seq, requests))
        if aborts or not submits:
            await self.channel.abort(wire.abort(self._router_id, self._seq, aborts))

    def _lose(self) -> None:
        if not self.lost:
            self.lost = True
            self._owner.link_lost(self)
