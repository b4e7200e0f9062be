"""The page behind `/metrics`: declared families and series as Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from ellm.worker.api.metrics import SUM, Key, Metric

CONTENT_TYPE = CONTENT_TYPE_LATEST
MODEL = "model_name"


class _Page(Collector):
    def __init__(self, families: Iterable[Family]) -> None:
        self._families = families

    def collect(self) -> Iterator[Family]:
        yield from self._families


def text(declared: Iterable[Metric], models: Sequence[str], series: Mapping[Key, float]) -> bytes:
    """Every declared family, with the series there are and zeros where they are known from the start."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Page(families(declared, models, series)))
    return generate_latest(registry)


def families(
    declared: Iterable[Metric], models: Sequence[str], series: Mapping[Key, float]
) -> Iterator[Family]:
    by_name: dict[str, dict[Key, float]] = {}
    for key, value in series.items():
        by_name.setdefault(key[0], {})[key[1:]] = value
    for metric in declared:
        found = by_name.get(metric.name, {})
        if metric.kind == "histogram":
            yield _histogram(metric, models, found)
            continue
        kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
        family = kind(metric.name, metric.help, labels=metric.labels)
        known = dict.fromkeys(_known(metric, models), 0.0)
        for values, value in sorted((known | found).items()):
            family.add_metric(values, value)
        yield family


def zeros(metrics: Iterable[Metric], models: Sequence[str]) -> dict[Key, float]:
    """The series of counters and histograms that there are from the start."""
    found: dict[Key, float] = {}
    for metric in metrics:
        if metric.kind == "histogram":
            found |= {(metric.name, model, "+Inf"): 0.0 for model in models}
        else:
            found |= {(metric.name, *values): 0.0 for values in _known(metric, models)}
    return found


def _known(metric: Metric, models: Sequence[str]) -> Iterator[Key]:
    if metric.labels[:1] == (MODEL,):
        own = metric.known or (((),) if metric.kind == "counter" and len(metric.labels) == 1 else ())
        yield from ((model, *values) for model in models for values in own)
    else:
        yield from metric.known


def _histogram(metric: Metric, models: Sequence[str], found: Mapping[Key, float]) -> Family:
    family = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
    known = dict.fromkeys((model,) for model in models)
    for values in sorted(known | dict.fromkeys(key[:-1] for key in found)):
        buckets = cumulated(metric, {key[-1]: n for key, n in found.items() if key[:-1] == values})
        family.add_metric(values, buckets=buckets, sum_value=found.get((*values, SUM), 0.0))
    return family


def cumulated(metric: Metric, parts: Mapping[str, float]) -> list[tuple[str, float]]:
    """(bound, observations up to it), from what each bucket holds."""
    count, buckets = 0.0, []
    for bound in (*map(str, metric.buckets), "+Inf"):
        count += parts.get(bound, 0.0)
        buckets.append((bound, count))
    return buckets
