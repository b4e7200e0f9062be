"""A cluster at which nothing has happened yet exports to Ray every series that the dashboards draw: a panel
is empty because nothing happened, never because nothing was said."""

from __future__ import annotations

import asyncio
import json
import re
import time
from types import SimpleNamespace
from typing import Any

from support.tree import ROOT

from ellm.cluster.api import metrics as of_controller
from ellm.cluster.counting import own_gauges
from ellm.router import metrics_sharing
from ellm.router.guidance import GuidanceBook
from ellm.router.metrics import RouterMetrics
from ellm.router.metrics_reference import DERIVED
from ellm.router.metrics_sharing import DECLARED, Outlet, SharedMetrics
from ellm.worker.api import metrics as of_workers
from ellm.worker.api.metric_export import MetricExport
from ellm.worker.api.report import WorkerInfo, WorkerReport

INFO = WorkerInfo("w0", "e0", "m", "n", 1024, 16, 64, 1000, (0,), "cpu", "float32", True)


class Names:
    """Takes what Ray would, and keeps the names under which Ray shows it."""

    def __init__(self) -> None:
        self.found: set[str] = set()
        names = self.found

        class Gauge:
            suffix = ""

            def __init__(self, name: str, *_: object) -> None:
                self.name = name + self.suffix

            def set(self, value: float, tags: dict[str, str]) -> None:
                names.add(self.name)

        class Counter(Gauge):
            suffix = "_total"

            def inc(self, value: float, tags: dict[str, str]) -> None:
                assert value > 0.0, "Ray refuses it"
                names.add(self.name)

        self.library: Any = SimpleNamespace(Counter=Counter, Gauge=Gauge)


def drawn() -> set[str]:
    """Names that the dashboards ask for."""
    return {
        f"ellm{name}"
        for path in (ROOT / "helm" / "files" / "dashboards").glob("*.json")
        for panel in json.loads(path.read_text())["panels"]
        for target in panel["targets"]
        for name in re.findall(r"\$\{prefix\}(\w+)", target["expr"])
    }


def of_a_router(names: Names) -> None:
    """Its first push."""
    metrics = RouterMetrics("m", time.monotonic)
    metrics.worker_report(INFO, WorkerReport(1))
    dispatcher = SimpleNamespace(admission=SimpleNamespace(num_inflight=0))
    service: Any = SimpleNamespace(model="m", metrics=metrics, dispatcher=dispatcher)
    export = MetricExport(names.library, DECLARED)

    async def push() -> None:
        shared = SharedMetrics([service], GuidanceBook(1), Outlet(None, export), lambda _: None)
        shared.start()
        try:
            async with asyncio.timeout(30.0):
                while not names.found:
                    await asyncio.sleep(0.01)
        finally:
            await shared.close()

    asyncio.run(push())


def test_nothing_that_is_drawn_is_missing(monkeypatch: Any) -> None:
    monkeypatch.setattr(metrics_sharing, "PUSH_S", 0.01)
    names = Names()
    of_a_router(names)
    report = WorkerReport(1)
    worker = dict(of_workers.counts(INFO, report)) | dict(of_workers.gauges(INFO, report))
    MetricExport(names.library, of_workers.DECLARED).update(worker)
    MetricExport(names.library, of_controller.DECLARED).update(dict(own_gauges(1, {"m": 2})))
    assert len(drawn()) > 40
    assert drawn() - names.found == drawn() & DERIVED == {"ellm_workers_lost_total"}
