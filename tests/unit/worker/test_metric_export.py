"""Declared metrics through another library's counters and gauges, as Ray's."""

from __future__ import annotations

from math import isnan
from types import SimpleNamespace
from typing import Any

from ellm.worker.api.metric_export import MetricExport
from ellm.worker.api.metrics import Metric, counter, gauge

LATENCY = Metric("ellm_latency_seconds", "histogram", "How long.", ("model_name",), "seconds", (0.1, 1.0))


class Book:
    """What a library was told, by name and labels."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, ...], float] = {}
        self.increments: list[float] = []

    def library(self) -> Any:
        book = self

        class Told:
            def __init__(self, name: str, text: str, labels: tuple[str, ...]) -> None:
                self.name, self.labels = name, labels

            def set(self, value: float, tags: dict[str, str]) -> None:
                assert set(tags) == set(self.labels)
                book.values[self.name, *tags.values()] = value

            def inc(self, value: float, tags: dict[str, str]) -> None:
                book.increments.append(value)
                place = (self.name, *tags.values())
                book.values[place] = book.values.get(place, 0.0) + value

        return SimpleNamespace(Counter=Told, Gauge=Told)


def test_counters_go_by_increments_and_gauges_that_are_gone_are_no_number() -> None:
    book = Book()
    export = MetricExport(book.library(), [counter("tokens", "Tokens.", "m"), gauge("waiting", "Now.", "m")])
    export.update({("ellm_tokens_total", "a"): 5.0, ("ellm_waiting", "a"): 2.0, ("ellm_other", "a"): 1.0})
    export.update({("ellm_tokens_total", "a"): 5.0, ("ellm_waiting", "a"): 3.0})
    export.update({("ellm_tokens_total", "a"): 7.0})
    assert book.increments == [5.0, 2.0]
    assert book.values["ellm_tokens", "a"] == 7.0
    assert isnan(book.values["ellm_waiting", "a"])
    assert ("ellm_other", "a") not in book.values


def test_a_counter_that_nothing_has_increased_is_there() -> None:
    book = Book()
    export = MetricExport(book.library(), [counter("parks", "Parks.", "m")])
    for value in (0.0, 0.0, 3.0, 3.0):
        export.update({("ellm_parks_total", "a"): value})
    least, grown = book.increments  # Ray refuses 0
    assert 0.0 < least < 1e-300
    assert grown == book.values["ellm_parks", "a"] == 3.0


def test_a_histogram_is_three_gauges() -> None:
    book = Book()
    export = MetricExport(book.library(), [LATENCY])
    export.update(
        {(LATENCY.name, "m", "0.1"): 2.0, (LATENCY.name, "m", "+Inf"): 1.0, (LATENCY.name, "m", "sum"): 9.0}
    )
    assert book.values == {
        ("ellm_latency_seconds_bucket", "m", "0.1"): 2.0,
        ("ellm_latency_seconds_bucket", "m", "1.0"): 2.0,
        ("ellm_latency_seconds_bucket", "m", "+Inf"): 3.0,
        ("ellm_latency_seconds_sum", "m"): 9.0,
        ("ellm_latency_seconds_count", "m"): 3.0,
    }
