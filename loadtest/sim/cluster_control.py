"""The controller of a simulated cluster: its real brain, and the real book that a router keeps of its advice.

It hears reports as late as routers do, ticks on its own, and each router asks it once a second at a phase of
its own, as in a deployment; only the lines between them are missing. Nothing is scaled, and no API key is
lent anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from ellm.cluster.api.actions import Advise
from ellm.cluster.api.config import ControllerConfig
from ellm.cluster.api.guidance import Guidance
from ellm.cluster.api.view import RouterNote, RouterView, View, WorkerView
from ellm.cluster.controller import Controller
from ellm.router.guidance import PERIOD_S, GuidanceBook
from ellm.router.policies import Replica
from ellm.worker.api.report import WorkerInfo, WorkerReport

if TYPE_CHECKING:
    from ellm.router.link import WorkerLink


@dataclass(frozen=True, slots=True)
class SimLink:
    """What a router's book wants of a line to a worker."""

    info: WorkerInfo
    replica: Replica


class SimControl:
    """One controller, and the books of `views`: each router's view of each worker, in the workers' order."""

    def __init__(self, infos: Sequence[WorkerInfo], views: Sequence[Sequence[Replica]]) -> None:
        config = ControllerConfig()
        self.tick_s, self.ask_s = config.tick_s, PERIOD_S
        self.newest: Guidance | None = None
        self._brain = Controller(config, term=1)
        self._infos = infos
        self._reports: list[WorkerReport | None] = [None] * len(infos)
        self._num_heard = [0] * len(infos)
        self._books = [GuidanceBook(len(views)) for _ in views]
        self._links = [
            [SimLink(info, view) for info, view in zip(infos, of_one, strict=True)] for of_one in views
        ]
        self._num_asked = [0] * len(views)
        self._notes: list[RouterView] = []  # since the last tick

    def hear(self, number: int, report: WorkerReport) -> None:
        """Of worker `number`."""
        self._reports[number] = report
        self._num_heard[number] += 1

    def tick(self, now: float) -> None:
        workers = tuple(
            WorkerView(info, report, heard)
            for info, report, heard in zip(self._infos, self._reports, self._num_heard, strict=True)
        )
        for action in self._brain.tick(View(workers, tuple(self._notes), 1), now):
            if isinstance(action, Advise):
                self.newest = action.guidance
        self._notes.clear()

    def ask(self, router: int, now: float) -> None:
        """Router number `router` sends its note, and follows the answer."""
        book = self._books[router]
        self._num_asked[router] += 1
        asked = self._num_asked[router]
        self._notes.append(RouterView(RouterNote(f"r{router}", asked), asked))
        if self.newest is not None:
            book.take(self.newest, now)
        book.check(now)
        book.apply(cast("Sequence[WorkerLink]", self._links[router]))


def worker_info(number: int, model: str, block_size: int, num_blocks: int, max_model_len: int) -> WorkerInfo:
    """Of worker `number`, whose name and epoch are `w<number>`."""
    name = f"w{number}"
    return WorkerInfo(
        worker_id=name,
        epoch=name,
        model=model,
        node="simulated",
        max_model_len=max_model_len,
        block_size=block_size,
        num_blocks=num_blocks,
        vocab_size=0,
        eos_token_ids=(),
        device="simulated",
        dtype="bfloat16",
        deterministic=False,
    )
