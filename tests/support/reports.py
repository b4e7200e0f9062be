"""Reports of workers that nobody runs, for tests of who reads them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ellm.cluster.api.view import RouterNote, RouterView, TenantUse, View, WorkerView
from ellm.worker.api.report import WorkerInfo, WorkerReport

BLOCK = 16
BLOCKS = 1000
INFO = WorkerInfo("w0", "e0", "m", "n0", 2048, BLOCK, BLOCKS, 4096, (1,), "cpu", "float32", True)
WELL = WorkerReport(
    seq=1, num_running=4, max_running=64, free_blocks=700, num_blocks=BLOCKS, headroom_tokens=700 * BLOCK,
    running_tokens=300 * BLOCK, step_time_s=0.02, prefill_rate_tok_s=10_000.0, num_steps=1,
)  # fmt: skip


class Fleet:
    """Workers w0, w1, ... of model m that report again at each `view`, and routers that send notes."""

    def __init__(self, count: int, **report: Any) -> None:
        self.reports = [replace(WELL, **report) for _ in range(count)]
        self.epochs = [f"e{i}" for i in range(count)]
        self.silent: set[int] = set()
        self.notes: dict[str, RouterNote] = {}
        self._heard = 0

    def change(self, index: int, **report: Any) -> None:
        self.reports[index] = replace(self.reports[index], **report)

    def info(self, index: int) -> WorkerInfo:
        return replace(INFO, worker_id=f"w{index}", epoch=self.epochs[index])

    def view(self, newest_term: int = 0) -> View:
        """Each has made a step since the last one, unless it is silent."""
        self._heard += 1
        workers = []
        for index, report in enumerate(self.reports):
            if index not in self.silent:
                self.change(index, seq=report.seq + 1, num_steps=report.num_steps + 1)
            heard = 0 if index in self.silent else self._heard
            workers.append(WorkerView(self.info(index), self.reports[index], heard))
        routers = tuple(RouterView(note, self._heard) for note in self.notes.values())
        return View(tuple(workers), routers, newest_term)

    def note(self, router: str, *uses: TenantUse, held_back: tuple[bytes, ...] = ()) -> None:
        known = self.notes.get(router)
        self.notes[router] = RouterNote(router, 1 if known is None else known.seq + 1, uses, held_back)
