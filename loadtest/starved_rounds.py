"""The same runs again and again on a machine that is not equally fast at all times.

Every second round goes backwards, so that a drift falls on the first and the last alike. Between the steps of
a run a step that is always the same says how fast the machine is just then; the simulator beside the run
takes the fitted steps times that.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import count, product
from statistics import fmean, median

from ellm.loadtest.open_loop import PROBE_EVERY, OpenLoopRun
from ellm.loadtest.sim.metrics import Metrics
from ellm.worker.api.config import WorkerConfig
from ellm.worker.engine.plan import ModelLimits
from ellm.worker.executor.base import Executor
from ellm.worker.executor.profile import step_entries, time_step

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
    """A decode step that is always the same, on an executor of its own. Between the steps of a run it says
    how fast the machine is just then for such work: for the weights and the KV that it reads, for what lies
    in caches, and for what the host does."""

    SEQUENCES, BLOCKS_EACH = 16, 10
    BLOCKS = SEQUENCES * BLOCKS_EACH

    def __init__(self, executor: Executor) -> None:
        """`executor` has at least `BLOCKS` blocks, and serves nobody."""
        self._executor, self._steps = executor, count()
        size = executor.limits.block_size
        start = (self.BLOCKS_EACH - 1) * size
        self._entries = step_entries(self.SEQUENCES, 0, start, self.BLOCKS_EACH, size)

    def __call__(self) -> float:
        """Seconds."""
        start = time.perf_counter()
        time_step(self._executor, self._steps, self._entries)
        return time.perf_counter() - start

    def close(self) -> None:
        self._executor.close()


def probing(run: OpenLoopRun) -> float:
    """What the probes of `run` took, as a share of what its steps took."""
    return sum(run.probe_s) / (sum(step.elapsed_s for step in run.steps) or 1.0)


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
