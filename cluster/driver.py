"""The controller's body: reads workers' reports, asks the brain each tick, and keeps its word for routers.

It connects to each worker's data port like a router that submits nothing: an open stream brings a report with
every heartbeat, and an abort without ids keeps the lease. Knows no Ray: the directory of workers and the
count of terms are given to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ellm.cluster.api import wire
from ellm.cluster.api.actions import Action, Advise, Distrust, Resign, Scale
from ellm.cluster.api.config import ControllerConfig, ModelScale
from ellm.cluster.api.guidance import TenantBudget
from ellm.cluster.api.view import RouterView, View, WorkerView
from ellm.cluster.controller import MAX_HELD_BACK, Controller
from ellm.cluster.counting import CounterDesk, Heard, own_gauges
from ellm.worker.api import wire as worker_wire
from ellm.worker.api.channel import ChannelClosed, WorkerChannel, WorkerDirectory
from ellm.worker.api.report import WorkerReport

log = logging.getLogger(__name__)

REFRESH_S = 1.0
HEARTBEAT_S = 0.5  # to workers: less than half the shortest lease that makes sense
AGAIN_S = 0.5  # after a broken line
TERM_TIMEOUT_S = 1.0


class Listener:
    """One open stream. `close` ends it."""

    def __init__(
        self, channel: WorkerChannel, name: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.channel = channel
        self._clock = clock
        self.num_heard = 0
        self.heard_at = 0.0
        self._packed: worker_wire.Message | None = None
        self._report: WorkerReport | None = None
        self._name = name
        self._task = asyncio.create_task(self._listen_forever())

    def view(self) -> WorkerView:
        """Reports are unpacked here, not as they come: most are never looked at."""
        if self._packed is not None:
            try:
                self._report = worker_wire.unpack_report(self._packed)
            except (TypeError, ValueError, IndexError):  # of a version that is too far away
                log.exception("a report of %s cannot be read", self.channel.info.worker_id)
            self._packed = None
        return WorkerView(self.channel.info, self._report, self.num_heard)

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _listen_forever(self) -> None:
        while True:
            beat = asyncio.create_task(self._beat())
            try:
                async for message in self.channel.outputs(self._name):
                    self._hear(message)
            except (ChannelClosed, worker_wire.WireError) as error:
                log.info("worker %s: %s", self.channel.info.worker_id, error)
            except Exception:  # whatever the channel's transport raises
                log.exception("the stream of worker %s broke", self.channel.info.worker_id)
            finally:
                beat.cancel()
                await asyncio.gather(beat, return_exceptions=True)
            await asyncio.sleep(AGAIN_S)

    def _hear(self, message: worker_wire.Message) -> None:
        report = worker_wire.check(message, "step")[3]
        self.num_heard += 1
        self.heard_at = self._clock()
        if report is not None:
            self._packed = report

    async def _beat(self) -> None:
        while True:  # until `_listen_forever` cancels it: a line that is made anew needs its beats, too
            with contextlib.suppress(ChannelClosed):
                await self.channel.abort(worker_wire.abort(self._name, 0, []))
            await asyncio.sleep(HEARTBEAT_S)


class Driver:
    """One per controller. All methods belong to the event loop on which `start` ran."""

    def __init__(
        self,
        directory: WorkerDirectory,
        config: ControllerConfig,
        models: Sequence[ModelScale],
        term: int,
        newest_term: Callable[[], Awaitable[int]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.resigned = asyncio.Event()
        self.term = term
        self._directory = directory
        self._config = config
        self._newest_term = newest_term
        self._clock = clock
        self._brain = Controller(config, term, models)
        known = {model: scaler.target for model, scaler in self._brain.scalers.items()}
        self.targets = {model: n for model, n in known.items() if n is not None}  # workers each should have
        self._listeners: dict[str, Listener] = {}
        self._routers: dict[str, RouterView] = {}  # heard since the last tick
        self._num_notes = 0
        self._uncounted = False  # nobody says which term is the newest
        self._guidance: worker_wire.Message | None = None
        self._budgets: Mapping[str, Sequence[TenantBudget]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._desk = CounterDesk(term, config.router_gone_s, clock())

    async def start(self) -> None:
        self._tasks = [
            asyncio.create_task(self._forever(self._refresh, REFRESH_S)),
            asyncio.create_task(self._forever(self._tick, self._config.tick_s)),
        ]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(listener.close() for listener in self._listeners.values()))
        self._listeners.clear()

    def exchange(self, message: worker_wire.Message) -> worker_wire.Message | None:
        """Take a router's note; returns the newest guidance, None before the first. Raises WireError."""
        note = wire.unpack_note(message)
        self._num_notes += 1
        if (before := self._routers.get(note.router_id)) is not None:  # no tick has come between
            both = dict.fromkeys((*before.note.held_back, *note.held_back))
            note = replace(note, held_back=tuple(both)[-MAX_HELD_BACK:])
        self._routers[note.router_id] = RouterView(note, self._num_notes)
        if self._guidance is None:
            return None
        return wire.with_budgets(self._guidance, self._budgets.get(note.router_id, ()))

    def counters(self, message: worker_wire.Message) -> worker_wire.Message:
        """Take what a router has counted; see cluster/counting.py. Raises WireError."""
        return self._desk.exchange(message, self._heard(), self.targets, self._clock())

    def gauges(self) -> worker_wire.Message:
        """Of the controller itself, as (key, value) pairs."""
        return own_gauges(self.term, self.targets)

    def _heard(self) -> Iterator[Heard]:
        for listener in self._listeners.values():
            if (report := listener.view().report) is not None:
                yield listener.channel.info, report, max(0.0, self._clock() - listener.heard_at)

    def adopt(self, current: Mapping[str, int]) -> None:
        """Model -> workers that were asked for so far. Counts where no target is known yet."""
        for model, count in current.items():
            if (scaler := self._brain.scalers.get(model)) is not None:
                self.targets[model] = scaler.adopt(count)

    def epochs(self) -> list[str]:
        """Of the workers whose reports are read."""
        return sorted(epoch for epoch, listener in self._listeners.items() if listener.num_heard)

    async def _refresh(self) -> None:
        channels = await self._directory.refresh()
        for epoch in channels.keys() - self._listeners.keys():
            self._listeners[epoch] = Listener(channels[epoch], f"controller-{self.term}", self._clock)
        for epoch in self._listeners.keys() - channels.keys():
            await self._listeners.pop(epoch).close()

    async def _tick(self) -> None:
        newest = await self._ask_newest_term()
        workers = tuple(listener.view() for listener in self._listeners.values())
        view = View(workers, tuple(self._routers.values()), newest)
        self._routers.clear()
        for action in self._brain.tick(view, self._clock()):
            self._carry_out(action)

    async def _ask_newest_term(self) -> int:
        """Whoever counts terms may be away: advice goes on without."""
        try:
            newest = await asyncio.wait_for(self._newest_term(), TERM_TIMEOUT_S)
        except Exception:
            if not self._uncounted:  # once per outage
                log.exception("nobody says whether there is a newer controller")
            self._uncounted = True
            return self.term
        if self._uncounted:
            log.info("it is known again whether there is a newer controller")
        self._uncounted = False
        return newest

    def _carry_out(self, action: Action) -> None:
        match action:
            case Advise(guidance, budgets):
                self._guidance, self._budgets = wire.pack_guidance(guidance), budgets
            case Scale(model, num_workers, reason):
                log.info("%s: %d workers wanted (%s)", model, num_workers, reason)
                self.targets[model] = num_workers
            case Distrust(worker_id, epoch, reason):
                log.warning("worker %s (%s) gets nothing new: %s", worker_id, epoch, reason)
            case Resign(newest_term):
                log.warning("controller %d ends: there is controller %d", self.term, newest_term)
                self._guidance = None
                self.resigned.set()

    async def _forever(self, work: Callable[[], Coroutine[Any, Any, None]], period_s: float) -> None:
        while not self.resigned.is_set():
            try:
                await work()
            except Exception:  # the controller outlives whatever the directory's transport raises
                log.exception("%s failed", work.__name__)
            await asyncio.sleep(period_s)
