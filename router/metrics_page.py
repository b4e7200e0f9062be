"""The page behind `/metrics`: what every model's metrics and the router's own say, one family per name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ellm.router.guidance import GuidanceBook


class Source(Protocol):
    def collect(self) -> Iterable[Metric]: ...


class MetricsPage(Collector):
    """Families of the same name from several sources become one; their samples differ by labels."""

    def __init__(self, sources: Iterable[Source]) -> None:
        self._sources = tuple(sources)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return generate_latest(registry)

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for source in self._sources:
            for family in source.collect():
                known = families.setdefault(family.name, family)
                if known is not family:
                    known.samples.extend(family.samples)
        yield from families.values()


class GuidanceMetrics:
    """Whether the controller's advice is followed, and how often it was not."""

    def __init__(self, book: GuidanceBook, clock: Callable[[], float]) -> None:
        self._book = book
        self._clock = clock

    def collect(self) -> Iterator[Metric]:
        fallbacks = CounterMetricFamily(
            "ellm_controller_absences", "Times this router had to do without advice.", labels=["reason"]
        )
        for reason, count in sorted(self._book.fallbacks.items()):
            fallbacks.add_metric([reason], count)
        yield fallbacks
        heard = self._book.heard(self._clock())
        seen = GaugeMetricFamily("ellm_controller_seen", "1 while the controller's advice is followed.")
        seen.add_metric([], float(heard.seen))
        yield seen
        age = GaugeMetricFamily("ellm_controller_guidance_age_seconds", "Age of the controller's last word.")
        if heard.age_s is not None:
            age.add_metric([], heard.age_s)
        yield age
