"""Where routers' counters meet: the controller's book, and what a router gets for a scrape of all.

A router pushes what has changed about once a second, and before it answers a scrape; it answers with this
book. So what one router shows another one shows, or more, whoever has died in between. A controller that has
just started knows nothing: routers send it all they know, and until they have had time to, it says that its
book is not complete. Knows no clock: time is an argument.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from ellm.cluster.api import counters, metrics
from ellm.cluster.api.counters import Counted, CounterBook, Push, router_source, worker_source
from ellm.worker.api import wire
from ellm.worker.api.metrics import Key, counts
from ellm.worker.api.report import WorkerInfo, WorkerReport
from ellm.worker.api.wire import Message

SETTLE_S = 2.5  # routers speak once a second
ASKED_S = 5.0  # a request is looked for so long
MAX_ASKED = 64
FOLD_AFTER_S = 600.0  # a book that is not whole yet must not be folded

Heard = tuple[WorkerInfo, WorkerReport, float]  # with its age in seconds


class CounterDesk:
    """One per controller."""

    def __init__(self, term: int, router_gone_s: float, now: float) -> None:
        self._term = term
        self._gone_s = router_gone_s
        self._since = now
        self._book = CounterBook()
        self._gauges: dict[str, tuple[Message, float]] = {}  # router -> what it said, and when
        self._asked: dict[str, float] = {}  # request id -> when a router asked for it
        self._found: dict[str, bytes] = {}  # of those that are asked for

    def exchange(
        self, message: Message, heard: Iterable[Heard], targets: Mapping[str, int], now: float
    ) -> Message:
        """Take a router's word; the answer to it. Raises WireError."""
        push = counters.unpack_push(message)
        if push.book is not None:
            self._book.absorb(push.book)
        for source, its_counts in push.counts:
            self._book.merge(source, its_counts)
        self._gauges[push.router_id] = (push.gauges, now)
        # The first controller of a cluster has nothing to wait for.
        complete = self._term == 1 or now - self._since >= SETTLE_S
        found = self._look_for(push, now)
        answer = Counted(self._term, complete, asked=tuple(self._asked), found=found)
        if not push.wants:
            return counters.pack(answer)
        reports = tuple(heard)
        for info, report, _ in reports:
            self._book.merge(worker_source(info.epoch), counts(info, report))
        said = self._said(targets, now)
        if now - self._since >= FOLD_AFTER_S:
            self._book.fold(
                {*map(router_source, self._gauges), *(worker_source(info.epoch) for info, _, _ in reports)}
            )
        packed = tuple(
            (wire.pack_info(info), wire.pack_report(replace(report, prefix_digest=b"")), age_s)
            for info, report, age_s in reports
        )
        return counters.pack(replace(answer, book=self._book.pack(), gauges=said, reports=packed))

    def _look_for(self, push: Push, now: float) -> Message:
        """Requests that one router knows and another is asked for: what was found of those."""
        for ident, at in list(self._asked.items()):
            if now - at > ASKED_S:
                del self._asked[ident]
                self._found.pop(ident, None)
        for ident in push.asks:
            if len(self._asked) < MAX_ASKED:
                self._asked[ident] = now
        for ident, timeline in push.finds:
            if ident in self._asked:
                self._found[ident] = timeline
        return tuple((ident, self._found[ident]) for ident in push.asks if ident in self._found)

    def _said(self, targets: Mapping[str, int], now: float) -> Message:
        """Gauges of the routers that speak, and the controller's own."""
        for router_id, (_, at) in list(self._gauges.items()):
            if now - at > self._gone_s:
                del self._gauges[router_id]
        said: list[tuple[Key, float]] = [pair for gauges, _ in self._gauges.values() for pair in gauges]
        return (*said, *own_gauges(self._term, targets))


def own_gauges(term: int, targets: Mapping[str, int]) -> Message:
    """The controller's."""
    wanted = [((metrics.WANTED.name, model), float(count)) for model, count in targets.items()]
    return (*wanted, ((metrics.TERM.name,), float(term)))
