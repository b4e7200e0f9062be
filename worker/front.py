"""WorkerFront: routers on one side, the engine loop on the other. Lives on one asyncio loop; knows no Ray.

Each router has one outbox and reads it through one long-lived stream: a message per engine step with the new
tokens of all its requests, a report every heartbeat. The front keeps who asked for what, so that

- a submission is taken once, by (request id, attempt), also after the request has ended;
- a router that leaves, comes again, is silent for a lease, or lags a whole lease behind is dropped: its
  stream ends, its requests are aborted and their blocks are free. What comes over the line of a dropped
  router is not taken: it would be computed for nobody;
- while the worker drains, new requests are refused, those that do not run are handed back, and running ones
  go to their end.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace

from ellm.worker.api import wire
from ellm.worker.api.config import WorkerConfig
from ellm.worker.api.errors import Unavailable
from ellm.worker.api.output import SequenceOutput
from ellm.worker.api.report import WorkerInfo, WorkerReport, WorkerState
from ellm.worker.api.request import EngineRequest
from ellm.worker.engine.tombstones import Tombstones
from ellm.worker.grammar_gate import refusal
from ellm.worker.loop import EngineLoop
from ellm.worker.outbox import Outbox
from ellm.worker.packed_report import PackedReport

log = logging.getLogger(__name__)

LAST_CALL_S = 1.0  # for routers to take what they are owed


@dataclass(frozen=True, slots=True)
class _Owner:
    box: Outbox
    attempt: int


class WorkerFront:
    """All methods but `publish` belong to the event loop on which `start` ran."""

    def __init__(
        self,
        info: WorkerInfo,
        config: WorkerConfig,
        engine: EngineLoop,
        clock: Callable[[], float] = time.monotonic,
        on_failure: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        """`on_failure` is called once, should heartbeats and leases end by an exception."""
        self.info = info
        self.state: WorkerState = "ready"
        self.num_streams = 0
        self.num_dropped = 0  # routers that fell silent or behind, since the start
        self._config = config
        self._engine = engine
        self._clock = clock
        self._on_failure = on_failure
        self._ticked_at = clock()
        self._boxes: dict[str, Outbox] = {}
        self._owners: dict[str, _Owner] = {}
        self._packed_report = PackedReport(config.heartbeat_s / 2)
        self._ended = Tombstones()  # finished and aborted requests: they are not taken again
        self._tenures = itertools.count(1)
        self._ticker: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Start the engine, heartbeats and leases."""
        self._loop = asyncio.get_running_loop()
        self._ticker = self._loop.create_task(self._tick_forever())
        self._engine.start(self.publish, self.hurry)

    async def close(self) -> None:
        """End every stream and stop the engine."""
        if self._ticker is not None:
            self._ticker.cancel()
        self.end_streams()
        await asyncio.to_thread(self._engine.stop)

    def since_tick_s(self) -> float:
        """How long this event loop has stood still; from any thread."""
        return max(0.0, self._clock() - self._ticked_at)

    @property
    def num_live(self) -> int:
        """Requests that are not finished."""
        return len(self._owners)

    @property
    def _failed(self) -> bool:
        return self._engine.state == "failed"

    def describe(self) -> wire.Message:
        return wire.pack_info(self.info)

    def report(self) -> WorkerReport:
        """The engine's newest, with what the front alone knows."""
        state: WorkerState = "failed" if self._failed else self.state
        since = self._engine.since_progress_s()
        return replace(self._engine.report, state=state, since_last_step_s=since)

    def submit(self, message: wire.Message) -> None:
        """Take a SUBMIT message of a router that has arrived. Raises WireError."""
        router_id, seq, packed = wire.check(message, "submit")[:3]
        box = self._heard(router_id)
        taken = [r for r in map(wire.unpack_request, packed) if self._admit(box, r)]
        self._engine.submit(router_id, seq, taken)

    def abort(self, message: wire.Message) -> None:
        """Take an ABORT message of a router that has arrived; one without ids only says that it is there.
        Raises WireError."""
        router_id, _, ids = wire.check(message, "abort")[:3]
        box = self._heard(router_id)
        mine = []
        for request_id, attempt in ids:
            owner = self._owners.get(request_id)
            if owner is None or owner.box is box:
                mine.append((request_id, attempt))
                if owner is not None and owner.attempt <= attempt:
                    self._forget(request_id, owner)
                self._ended.put(request_id, attempt, self._clock())
        if mine:
            self._engine.abort(mine)

    def arrive(self, router_id: str) -> int:
        """A router has come. If it was here before, it starts anew: it has given up what it asked for over
        its former line. Returns what `holds` and `leave` want to know."""
        former = self._boxes.get(router_id)
        if former is not None:
            self._drop(former)
        tenure = next(self._tenures)
        self._boxes[router_id] = Outbox(
            router_id, tenure, self._config.outbox_items, self._config.router_lease_s, self._clock()
        )
        return tenure

    def holds(self, router_id: str, tenure: int) -> bool:
        """This arrival was not dropped, and the router has not come again since."""
        box = self._boxes.get(router_id)
        return box is not None and box.tenure == tenure

    def leave(self, router_id: str, tenure: int) -> None:
        """The line of this arrival is gone. Unless the router has come again since, nobody is left to read:
        it is dropped without waiting for its lease."""
        if self.holds(router_id, tenure):
            self._drop(self._boxes[router_id])

    async def outputs(self, router_id: str, tenure: int) -> AsyncGenerator[wire.Message, None]:
        """The STEP messages for this arrival of the router; ends when another stream is opened, when the
        router is dropped, and when the worker closes."""
        if not self.holds(router_id, tenure):
            return
        box = self._heard(router_id)
        stream = box.open()
        self.num_streams += 1
        try:
            while (outputs := await box.take(stream)) is not None:
                yield self._message(box, outputs)
        finally:
            self.num_streams -= 1

    def publish(self, outputs: list[SequenceOutput]) -> None:
        """Called by the engine's thread."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._deliver, outputs)
        except RuntimeError:  # the loop is closed: no one is left to read
            log.debug("outputs after the end")

    def hurry(self) -> None:
        """Called by the engine's thread when every router should have its newest report at once."""
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._report_to_all)

    def begin_drain(self) -> None:
        """Take no new request from now on, and say so to every router at once."""
        self.state = "draining"
        self._report_to_all()

    def _report_to_all(self) -> None:
        for box in self._boxes.values():
            box.make_report_due()

    async def drain(self, timeout_s: float) -> bool:
        """Hand back at once what waits or is parked, let the rest run for `timeout_s`, then hand that back,
        too. Returns when routers have taken it all; True if nothing had to be cut short. Streams stay open
        and say "draining"."""
        self.begin_drain()
        self._engine.hand_back(everybody=False)
        done = await self._wait(lambda: not self._owners, timeout_s)
        if not done:
            self._engine.hand_back(everybody=True)
            await self._wait(lambda: not self._owners, LAST_CALL_S)
        await self._wait(lambda: not any(b.num_items and b.stream for b in self._boxes.values()), LAST_CALL_S)
        return done

    def end_streams(self) -> None:
        """Routers move what is left, and look for this worker no more once it is gone."""
        for box in list(self._boxes.values()):
            self._drop(box)

    async def _wait(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        deadline = self._clock() + timeout_s
        while not condition() and self._clock() < deadline:
            await asyncio.sleep(0.02)
        return condition()

    def _message(self, box: Outbox, outputs: list[SequenceOutput]) -> wire.Message:
        report, box.last_sent = None, (now := self._clock())
        if box.report_due:
            box.report_due, box.report_seq = False, self._engine.report.seq
            report = self._packed_report.get((box.report_seq, self.state), self.report, now)
        box.seq += 1
        return wire.step(self.info.epoch, box.seq - 1, outputs, report)

    def _heard(self, router_id: str) -> Outbox:
        box = self._boxes.get(router_id)
        if box is None:
            raise wire.WireError(f"router {router_id} has not arrived, or was dropped")
        box.last_heard = self._clock()
        return box

    def _admit(self, box: Outbox, request: EngineRequest) -> bool:
        request_id, attempt = request.request_id, request.attempt
        owner = self._owners.get(request_id)
        known = owner is not None and attempt <= owner.attempt
        if known or self._ended.covers(request_id, attempt, self._clock()):
            return False
        if self.state != "ready" or self._failed:
            box.put([refusal(request, Unavailable("the worker takes no new requests"))], self._clock())
            return False
        if owner is not None:
            self._forget(request_id, owner)
        self._owners[request_id] = _Owner(box, attempt)
        box.live[request_id] = attempt
        return True

    def _forget(self, request_id: str, owner: _Owner) -> None:
        del self._owners[request_id]
        del owner.box.live[request_id]

    def _deliver(self, outputs: list[SequenceOutput]) -> None:
        now = self._clock()
        by_box: dict[str, list[SequenceOutput]] = {}
        for output in outputs:
            owner = self._owners.get(output.request_id)
            if owner is None or owner.attempt != output.attempt:
                continue
            by_box.setdefault(owner.box.router_id, []).append(output)
            if output.finish_reason is not None:
                self._forget(output.request_id, owner)
                self._ended.put(output.request_id, output.attempt, now)
        for router_id, mine in by_box.items():
            self._boxes[router_id].put(mine, now)

    def _drop(self, box: Outbox) -> None:
        """Abort the router's requests and end its stream."""
        now = self._clock()
        box.close()
        del self._boxes[box.router_id]
        self._engine.forget_router(box.router_id)
        if box.live:
            self._engine.abort(list(box.live.items()))
        for request_id, attempt in box.live.items():
            del self._owners[request_id]
            self._ended.put(request_id, attempt, now)

    async def _tick_forever(self) -> None:
        try:
            while True:
                await asyncio.sleep(self._config.heartbeat_s / 3)
                self._tick()
        except Exception as error:  # the edge: a worker without heartbeats and leases must not look well
            log.exception("heartbeats have ended")
            self._on_failure(error)
            raise

    def _tick(self) -> None:
        now = self._ticked_at = self._clock()
        newest = self._engine.report.seq
        for box in list(self._boxes.values()):
            reason = "is left by the failed engine" if self._failed else box.fault(now)
            if reason is not None:
                log.warning("router %s %s; %d requests are aborted", box.router_id, reason, len(box.live))
                self.num_dropped += 1
                self._drop(box)
            elif now - box.last_sent >= 0.6 * self._config.heartbeat_s:  # the next tick is too late
                box.make_report_due()
            elif box.report_seq != newest:
                box.report_due = True  # with the next step
