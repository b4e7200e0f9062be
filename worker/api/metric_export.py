"""Declared metrics through another library's objects: Ray's, which then export them as `ray_ellm_*`.

A process exports its own series and nobody else's: whoever reads them adds up. Ray counts by increments, so
this remembers what was said. A histogram goes out as the gauges `_bucket`, `_sum` and `_count`, cumulated as
Prometheus has them: one call per bucket and period, not one per observation.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from math import nan
from typing import Any, Protocol

from ellm.worker.api.metrics import SUM, Key, Metric

PERIOD_S = 2.0
# A counter that nothing has increased is not exported: `increase()` misses the first one, a ratio with it is
# empty. Ray takes no 0, so each begins with the least number there is; what is added to it is exact.
NOTHING = sys.float_info.min


class Library(Protocol):
    """`ray.util.metrics`, or what looks like it: `Counter(name, description, tag_keys).inc(value, tags)` and
    `Gauge(...).set(value, tags)`."""

    Counter: Any
    Gauge: Any


class MetricExport:
    """One per process."""

    def __init__(self, library: Library, declared: Iterable[Metric]) -> None:
        self._library = library
        self._declared = {metric.name: metric for metric in declared}
        self._made: dict[str, Any] = {}
        self._said: dict[Key, float] = {}

    def update(self, series: Mapping[Key, float]) -> None:
        """What holds now. A gauge that is missing is said to be no number, for its last one would stay."""
        for key, value in series.items():
            metric = self._declared.get(key[0])
            if metric is None or metric.kind == "histogram":
                continue
            if metric.kind == "counter":
                self._count(metric, key, value)
            else:  # also one that has not changed: Ray exports what was set since it last did
                self._set(metric.name, metric.help, metric.labels, key[1:], value)
                self._said[key] = value
        for key in [k for k in self._said if k not in series and self._declared[k[0]].kind == "gauge"]:
            metric = self._declared[key[0]]
            self._set(metric.name, metric.help, metric.labels, key[1:], nan)
            del self._said[key]
        self._histograms(series)

    def _count(self, metric: Metric, key: Key, value: float) -> None:
        grown = value - self._said.get(key, 0.0)
        if key not in self._said:
            grown = max(grown, NOTHING)
        if grown > 0.0:
            name = metric.name.removesuffix("_total")  # Ray adds its own
            made = self._made.get(name)
            if made is None:
                made = self._made[name] = self._library.Counter(name, metric.help, metric.labels)
            made.inc(grown, dict(zip(metric.labels, key[1:], strict=True)))
            self._said[key] = value

    def _set(self, name: str, text: str, labels: Key, values: Key, value: float) -> None:
        made = self._made.get(name)
        if made is None:
            made = self._made[name] = self._library.Gauge(name, text, labels)
        made.set(value, dict(zip(labels, values, strict=True)))

    def _histograms(self, series: Mapping[Key, float]) -> None:
        found: dict[Key, dict[str, float]] = {}
        for key, value in series.items():
            metric = self._declared.get(key[0])
            if metric is not None and metric.kind == "histogram":
                found.setdefault(key[:-1], {})[key[-1]] = value
        for key, parts in found.items():
            metric, values = self._declared[key[0]], key[1:]
            count = 0.0
            for bound in (*map(str, metric.buckets), "+Inf"):
                count += parts.get(bound, 0.0)
                labels = (*metric.labels, "le")
                self._set(f"{metric.name}_bucket", metric.help, labels, (*values, bound), count)
            self._set(f"{metric.name}_sum", metric.help, metric.labels, values, parts.get(SUM, 0.0))
            self._set(f"{metric.name}_count", metric.help, metric.labels, values, count)
