"""What all routers of the cluster have counted, from whichever of them is asked.

Each router tells the controller once a second what has changed, and before it answers a scrape; a scrape
shows what the controller's book then holds (cluster/counting.py). So two scrapes that reach different routers
agree, and a router or worker that dies leaves its counts behind. A router without an answer says so by
`ellm_metrics_complete` and leaves its counters out: another may have shown more, and who scrapes would take
that for a restart and count twice. With no controller at all, or no other router, it shows its own.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ellm.cluster.api import counters
from ellm.cluster.api import metrics as cluster_metrics
from ellm.cluster.api.counters import Counted, CounterBook, Push, router_source
from ellm.router import metrics_declared as declared
from ellm.router import metrics_page
from ellm.router.guidance import GuidanceBook
from ellm.router.metrics_derived import Reports, derived
from ellm.worker.api import metrics as worker_metrics
from ellm.worker.api import wire
from ellm.worker.api.metric_export import MetricExport
from ellm.worker.api.metrics import Key
from ellm.worker.api.wire import Message

if TYPE_CHECKING:
    from ellm.router.exchange import Service

log = logging.getLogger(__name__)

DECLARED = (*worker_metrics.DECLARED, *cluster_metrics.DECLARED, *declared.DECLARED)
PUSH_S = 1.0
ANSWER_S = 2.0
WAIT_S = 4.0  # a scrape waits so long for a controller that has just started
AGAIN_S = 0.25
FIND_S = 3.0  # a request is looked for so long: routers speak once a second


class CountersLine(Protocol):
    """A router's way to the controller's book."""

    async def counters(self, message: Message) -> Message:
        """Raises whatever its transport raises."""
        ...


class Source(Protocol):
    """A part of a router that counts."""

    def series(self) -> Iterable[tuple[Key, float]]: ...

    def gauges(self, router: str) -> Iterable[tuple[Key, float]]: ...


@dataclass(frozen=True, slots=True)
class Outlet:
    """Where a router's metrics go beside its page. Without a `line` it knows of no others."""

    line: CountersLine | None = None
    export: MetricExport | None = None


@dataclass(frozen=True, slots=True)
class ClusterView:
    """The whole cluster at one moment."""

    series: Mapping[Key, float]
    reports: Reports
    complete: bool
    counts: bool  # its counters are never less than what another router has shown


class SharedMetrics:
    """One per router. `start` and `close` on its event loop."""

    def __init__(
        self,
        services: Iterable[Service],
        book: GuidanceBook,
        outlet: Outlet,
        lookup: Callable[[str], bytes | None],
        clock: Callable[[], float] = time.monotonic,
        others: Sequence[Source] = (),
    ) -> None:
        """`lookup`: a timeline of one of its requests, as JSON. `others`: who counts beside the services."""
        self._others = others
        self.router_id = uuid.uuid4().hex[:12]
        self._services = tuple(services)
        self._zeros = metrics_page.zeros(
            # But for what no router counts by itself.
            (m for m in (*declared.HISTOGRAMS, *declared.COUNTERS) if m is not declared.LOST),
            [service.model for service in self._services],
        )
        self._lookup = lookup
        self._finds: list[tuple[str, bytes]] = []  # of this router's, those that another is asked for
        self._guidance = book
        self._alone = outlet.line is None and book.num_routers <= 1
        self._line = outlet.line
        self._export = outlet.export
        self._clock = clock
        self._book = CounterBook()
        self._term = 0
        self._knew_all = False  # while it was the only one, as it is still
        self._resend = True  # the controller does not know what this book holds
        self._sent: dict[Key, float] = {}  # (source, *key) -> value that it knows
        self._busy = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._looking: asyncio.Task[ClusterView] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._push_forever())

    async def close(self) -> None:
        """What was counted last is told to the controller."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._try_exchange()

    async def text(self) -> bytes:
        """The scrape."""
        view = await self.look()
        models = [service.model for service in self._services]
        families = DECLARED if view.counts else [m for m in DECLARED if m.kind == "gauge"]
        return metrics_page.text(families, models, view.series)

    async def look(self) -> ClusterView:
        """Of all routers and workers, as the controller's book has them now; waits for it for a while."""
        if self._looking is None or self._looking.done():  # whoever comes while somebody looks shares it
            self._looking = asyncio.create_task(self._look_alone())
        return await asyncio.shield(self._looking)

    async def _look_alone(self) -> ClusterView:
        async with self._busy:
            return await self._look()

    async def find(self, request_id: str) -> bytes | None:
        """A request's timeline as JSON, from whichever router knows it."""
        own = self._lookup(request_id)
        deadline = self._clock() + FIND_S
        while own is None and self._line is not None and self._clock() < deadline:
            async with self._busy:
                answer = await self._try_exchange(asks=(request_id,))
            if answer is None or self._guidance.num_routers <= 1:
                break
            own = dict(answer.found).get(request_id)
            await asyncio.sleep(AGAIN_S if own is None else 0.0)
        return own

    async def _look(self) -> ClusterView:
        deadline = self._clock() + WAIT_S
        while self._line is not None:
            answer = await self._try_exchange(wants=True)
            late = self._clock() >= deadline
            if answer is not None and (answer.complete or late):
                return self._made(dict(answer.gauges), _unpacked(answer.reports), answer.complete)
            if late:
                break
            await asyncio.sleep(AGAIN_S)
        self._capture()
        return self._made(dict(self._own_gauges()), {}, self._alone)

    def _made(self, gauges: dict[Key, float], reports: Reports, complete: bool) -> ClusterView:
        """A worker's newest report counts, whoever has it."""
        for service in self._services:
            for info, report, age_s in service.metrics.reports():
                known = reports.get(info.epoch)
                if known is None or known[1].seq <= report.seq:
                    reports[info.epoch] = (info, report, age_s)
        series = self._book.totals()
        models = [service.model for service in self._services]
        series.update(derived(gauges, reports.values(), models))
        series[declared.COMPLETE.name,] = float(complete)
        self._note_others(complete)
        return ClusterView(series, reports, complete, complete or self._line is None or self._knew_all)

    def _note_others(self, complete: bool = False) -> None:
        """Beside another router this one does not hear all that is counted, nor after it until it is told."""
        if self._guidance.told != 1:
            self._knew_all = False
        else:
            self._knew_all |= complete

    async def _push_forever(self) -> None:
        while True:
            await asyncio.sleep(PUSH_S)
            self._note_others()
            async with self._busy:
                await self._try_exchange()
            if self._export is not None:
                try:
                    self._export.update(self._zeros | dict(self._own_series()) | dict(self._own_gauges()))
                except Exception:  # nothing depends on it
                    log.exception("metrics could not be exported")

    async def _try_exchange(self, *, wants: bool = False, asks: tuple[str, ...] = ()) -> Counted | None:
        if self._line is None:
            return None
        try:
            answer = await self._exchange(self._line, wants, asks)
            if answer.term != self._term:  # a new controller, which knows only what it was just told
                self._term, self._resend = answer.term, True
                self._sent.clear()
                answer = await self._exchange(self._line, wants, asks)
            self._finds = [(ident, found) for ident in answer.asked if (found := self._lookup(ident))]
            if self._finds and not asks:  # somebody waits
                await self._exchange(self._line, False, ())
        except Exception as error:  # a router needs no controller, whatever becomes of it
            log.debug("the controller takes no counters: %r", error)
            self._resend = True
            return None
        return answer

    async def _exchange(self, line: CountersLine, wants: bool, asks: tuple[str, ...]) -> Counted:
        changed = self._capture()
        told = {(source, *key): value for source, pairs in changed for key, value in pairs}
        packed = self._book.pack() if self._resend else None
        finds, self._finds = tuple(self._finds), []
        gauges = tuple(self._own_gauges())
        push = counters.pack(Push(self.router_id, wants, packed, changed, gauges, asks, finds))
        answer = counters.unpack_answer(await asyncio.wait_for(line.counters(push), ANSWER_S))
        if answer.term == self._term:
            self._resend = False
            self._sent.update(told)
        if answer.book is not None:
            self._book.absorb(answer.book)
        return answer

    def _capture(self) -> tuple[tuple[str, tuple[tuple[Key, float], ...]], ...]:
        """Enter into the book what was counted here; returns what the controller has not been told."""
        sources = [(router_source(self.router_id), dict(self._own_series()))]
        for service in self._services:
            sources += service.metrics.worker_series()
        changed = []
        for source, series in sources:
            self._book.merge(source, series.items())
            new = tuple(
                (key, value) for key, value in series.items() if self._sent.get((source, *key)) != value
            )
            if new:
                changed.append((source, new))
        return tuple(changed)

    def _own_series(self) -> Iterable[tuple[Key, float]]:
        for service in self._services:
            yield from service.metrics.series()
        for other in self._others:
            yield from other.series()
        for reason, count in self._guidance.fallbacks.items():
            yield (declared.ABSENCES.name, reason), count

    def _own_gauges(self) -> Iterable[tuple[Key, float]]:
        router = self.router_id
        yield (declared.SEEN.name, router), float(self._guidance.heard(self._clock()).seen)
        for other in self._others:
            yield from other.gauges(router)
        for service in self._services:
            inflight = float(service.dispatcher.admission.num_inflight)
            yield (declared.INFLIGHT.name, service.model, router), inflight
            yield from service.metrics.gauges(router)


def _unpacked(reports: Iterable[Sequence[Any]]) -> Reports:
    found: Reports = {}
    for info, report, age_s in reports:
        made = wire.unpack_info(info)
        found[made.epoch] = (made, wire.unpack_report(report), age_s)
    return found
