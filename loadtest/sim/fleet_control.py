"""The controller of a simulated fleet: its real brain with its scaler, and the books that routers keep of it.

As cluster_control.py, for workers that come and go; here what the brain says of their number counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from ellm.cluster.api.actions import Advise, Scale
from ellm.cluster.api.config import ControllerConfig, ModelScale
from ellm.cluster.api.guidance import Guidance
from ellm.cluster.api.view import RouterNote, RouterView, View, WorkerView
from ellm.cluster.controller import Controller
from ellm.loadtest.sim.cluster_control import SimLink
from ellm.loadtest.sim.fleet_routers import FleetRouter
from ellm.router.guidance import GuidanceBook
from ellm.worker.api.report import WorkerInfo, WorkerReport

if TYPE_CHECKING:
    from ellm.router.link import WorkerLink


class FleetControl:
    def __init__(self, config: ControllerConfig, scale: ModelScale, routers: Sequence[FleetRouter]) -> None:
        self._brain = Controller(config, term=1, models=[scale])
        self._brain.scalers[scale.model].adopt(scale.min_workers)
        self._routers = routers
        self._books = [GuidanceBook(len(routers)) for _ in routers]
        self._num_asked = [0] * len(routers)
        self._workers: dict[int, WorkerView] = {}
        self._notes: list[RouterView] = []  # since the last tick
        self._newest: Guidance | None = None

    def heard(self, number: int, info: WorkerInfo, report: WorkerReport) -> None:
        before = self._workers.get(number)
        self._workers[number] = WorkerView(info, report, 1 if before is None else before.num_heard + 1)

    def forget(self, number: int) -> None:
        """The directory names it no more."""
        self._workers.pop(number, None)

    def tick(self, now: float) -> Scale | None:
        """How many workers there should be from now on, where that changes."""
        scale = None
        view = View(tuple(self._workers.values()), tuple(self._notes), 1)
        for action in self._brain.tick(view, now):
            if isinstance(action, Advise):
                self._newest = action.guidance
            elif isinstance(action, Scale):
                scale = action
        self._notes.clear()
        return scale

    def ask(self, number: int, now: float) -> None:
        """Router `number` sends its note, and follows the answer."""
        book, router = self._books[number], self._routers[number]
        self._num_asked[number] += 1
        asked = self._num_asked[number]
        self._notes.append(RouterView(RouterNote(router.name, asked), asked))
        if self._newest is not None:
            book.take(self._newest, now)
        book.check(now)
        links = [
            SimLink(self._workers[one].info, view)
            for one, view in router.views.items()
            if one in self._workers
        ]
        book.apply(cast("Sequence[WorkerLink]", links))
