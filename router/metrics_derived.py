"""What a scrape shows of gauges that routers and workers told: summed over routers, newest of each worker."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ellm.router import metrics_declared as declared
from ellm.router.link import STALL_S
from ellm.worker.api import metrics as worker_metrics
from ellm.worker.api.metrics import STATES, Key
from ellm.worker.api.report import WorkerInfo, WorkerReport

Reports = dict[str, tuple[WorkerInfo, WorkerReport, float]]  # by epoch; with its age in seconds


def derived(
    gauges: dict[Key, float],
    reports: Iterable[tuple[WorkerInfo, WorkerReport, float]],
    models: Sequence[str],
) -> dict[Key, float]:
    """Gauges of routers, of workers, and those that are made of both."""
    recent: dict[Key, list[float]] = {}
    series: dict[Key, float] = {}
    routers = set()
    for key, value in gauges.items():
        if key[0] in (declared.RECENT, declared.RECENT_KEPT):
            recent.setdefault(key[1:3], [0.0, 0.0])[key[0] == declared.RECENT_KEPT] += value
        else:
            series[key] = value
        if key[0] == declared.SEEN.name:
            routers.add(key[1])
    for place, (count, kept) in recent.items():
        series[declared.ATTAINMENT.name, *place] = kept / count if count else 1.0
    series[declared.ROUTERS.name,] = float(len(routers))
    series.update(((declared.WORKERS.name, model, state), 0.0) for model in models for state in STATES)
    # A worker and its successor may both be there: a gauge has one sample for each worker id.
    for info, report, _ in sorted(reports, key=lambda entry: -entry[2]):
        stalled = report.state == "ready" and report.since_last_step_s >= STALL_S
        place = (declared.WORKERS.name, info.model, "failed" if stalled else report.state)
        series[place] = series.get(place, 0.0) + 1.0
        series.update(worker_metrics.gauges(info, report))
    return series
