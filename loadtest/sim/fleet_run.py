"""A simulated fleet's day: the events to come, and the record that its figures are made from."""

from __future__ import annotations

import heapq
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from ellm.loadtest.sim.fleet_worker import FleetWorker

Handler = Callable[..., None]  # (now, whatever was given with it)


class Events:
    """In the order of their times; at one time, in the order in which they were made."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Handler, tuple[Any, ...]]] = []
        self._order = count()

    def at(self, when: float, handler: Handler, *what: Any) -> None:
        heapq.heappush(self._heap, (when, next(self._order), handler, what))

    def pop(self) -> tuple[float, Handler, tuple[Any, ...]]:
        when, _, handler, what = heapq.heappop(self._heap)
        return when, handler, what


@dataclass(frozen=True, slots=True)
class Sample:
    """The fleet at one moment."""

    at: float
    target: int
    ready: int
    starting: int
    draining: int
    held: int  # requests that engines have


@dataclass(slots=True)
class FleetRun:
    """What happened. Arrays are by request."""

    first_s: array[float]
    last_s: array[float]
    emitted: array[int]
    num_ends: array[int]  # with the last token: 1, or something is wrong
    failed: dict[int, str] = field(default_factory=dict)  # requests that got an error
    moved: Counter[str] = field(default_factory=Counter)  # by reason
    scalings: list[tuple[float, int, str]] = field(default_factory=list)  # when, target, why
    deaths: list[tuple[float, str]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    workers: list[FleetWorker] = field(default_factory=list)
    end_s: float = 0.0
    cpu_s: float = 0.0
