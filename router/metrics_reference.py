"""docs/metrics.md, written from the declarations. `python -m ellm.router.metrics_reference` prints it."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from ellm.cluster.api import metrics as cluster_metrics
from ellm.router import metrics_declared
from ellm.worker.api import metrics as worker_metrics
from ellm.worker.api.metrics import Metric

HEAD = """# Metrics

Generated from the declarations by `python -m ellm.router.metrics_reference`; how they are gathered stands in
[monitoring.md](monitoring.md).

`/metrics` of any router shows the whole cluster under these names. Ray exports the same ones per process as
`ray_ellm_*`, but for those that a scrape derives from several processes (marked with \\*). `model_name` is
the served name, `worker` the worker's id, `router` an incarnation of a router.
"""
SECTIONS = (
    ("Workers", "What workers report. Counters add up over all incarnations.", worker_metrics.DECLARED),
    ("Controller", "Missing while there is no controller.", cluster_metrics.DECLARED),
    ("Routers", "What routers count, added up over all of them.", metrics_declared.DECLARED),
)
DERIVED = {
    metric.name
    for metric in (
        *(metrics_declared.LOST, metrics_declared.ATTAINMENT, metrics_declared.WORKERS),
        *(metrics_declared.ROUTERS, metrics_declared.COMPLETE),
    )
}


def page() -> str:
    parts = [HEAD]
    for title, text, metrics in SECTIONS:
        parts += [f"\n## {title}\n{text}\n\n", table(metrics)]
    buckets = metrics_declared.HISTOGRAMS
    parts.append("\n## Buckets\n")
    for bounds in dict.fromkeys(metric.buckets for metric in buckets):
        names = ", ".join(f"`{metric.name}`" for metric in buckets if metric.buckets == bounds)
        parts.append(f"- {names}: {' '.join(f'{bound:g}' for bound in bounds)}\n")
    return "".join(parts)


def table(metrics: Iterable[Metric]) -> str:
    rows = ["| name | type | labels | unit | what |\n|---|---|---|---|---|\n"]
    for metric in metrics:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        mark = "\\*" if metric.name in DERIVED else ""
        cells = (f"`{metric.name}`{mark}", metric.kind, labels, metric.unit, metric.help)
        rows.append(f"| {' | '.join(cells)} |\n")
    return "".join(rows)


if __name__ == "__main__":
    sys.stdout.write(page())
