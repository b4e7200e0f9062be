"""The same runs again and again on a machine that is not equally fast at all times.

Every second round goes backwards, so that a drift falls on the first and the last alike. Between the steps of
a run the same short piece of work says how fast the machine is just then; the simulator beside the run takes
the fitted steps times that.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import product
from statistics import fmean, median

import torch

from ellm.loadtest.open_loop import PROBE_EVERY, OpenLoopRun
from ellm.loadtest.sim.metrics import Metrics
from ellm.worker.api.config import WorkerConfig
from ellm.worker.engine.plan import ModelLimits

SIMULATED = 0.1  # of a run's time, at most: the simulator's
NEAREST = 9  # probes: over some seconds


@dataclass(frozen=True, slots=True)
class Taken:
    """One run of a policy, as it was."""

    policy: str
    host: str
    round: int
    config: WorkerConfig
    limits: ModelLimits
    run: OpenLoopRun
    real: Metrics


@dataclass(frozen=True, slots=True)
class Sample:
    """A run, and the simulator's. `slowness`: of the machine, by that of the runs that were fitted."""

    policy: str
    host: str
    round: int
    real: Metrics
    sim: Metrics
    run: OpenLoopRun
    slowness: float


def in_turns(
    rounds: int, hosts: Sequence[str], policies: Sequence[str], pairs: int = 0, pair: Sequence[str] = ()
) -> Iterator[tuple[int, str, str]]:
    """(round, host tier, policy): `rounds` of all, then `pairs` of those in `pair` alone."""
    for number in range(rounds + pairs):
        forth = list(product(hosts, policies if number < rounds else pair))
        for host, policy in reversed(forth) if number % 2 else forth:
            yield number, host, policy


def has_time(until: float | None, durations_s: Sequence[float]) -> bool:
    """Whether another run as long as the longest so far ends by `until`, of time.monotonic, and the
    simulator's runs after it."""
    longest_s = max(durations_s, default=0.0)
    left_s = 1.2 * longest_s + SIMULATED * (sum(durations_s) + longest_s)
    return until is None or time.monotonic() + left_s < until


class Probe:
    """A fixed piece of work of some tenths of a millisecond, such as a step consists of: a few rows by
    weights that lie in memory. Between the steps of a run it says how fast the machine is just then."""

    ROWS, WIDTH, OUT, PARTS = 16, 512, 2048, 16

    def __init__(self) -> None:
        self._x = torch.ones(self.ROWS, self.WIDTH)
        self._parts = [torch.ones(self.OUT, self.WIDTH) for _ in range(self.PARTS)]
        self._next = 0

    def __call__(self) -> float:
        """Seconds."""
        self._next = (self._next + 1) % self.PARTS  # not the one that the last call left in the cache
        start = time.perf_counter()
        torch.nn.functional.linear(self._x, self._parts[self._next])
        return time.perf_counter() - start


def pace(run: OpenLoopRun) -> float:
    """Seconds of a probe during `run`, in the mean but for hiccups; 0 without probes."""
    kept = sorted(run.probe_s)[: -(len(run.probe_s) // 20) or None]
    return fmean(kept) if kept else 0.0


def paces(run: OpenLoopRun) -> list[float]:
    """Seconds of a probe at each step, the median of the nearest; 0 without probes."""
    near = [median(run.probe_s[max(0, i - NEAREST // 2) :][:NEAREST]) for i in range(len(run.probe_s))] or [
        0.0
    ]
    return [near[min(i // PROBE_EVERY, len(near) - 1)] for i in range(len(run.steps))]


def mean_metrics(several: Sequence[Metrics]) -> Metrics:
    """Field by field."""
    return Metrics(**{f.name: fmean(getattr(one, f.name) for one in several) for f in fields(Metrics)})
