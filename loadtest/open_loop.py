"""Requests that come by the clock, whatever the engine does, through EngineLoop in real time."""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ellm.worker.api.cost_model import StepFeatures
from ellm.worker.api.output import SequenceOutput
from ellm.worker.api.report import WorkerReport
from ellm.worker.api.request import EngineRequest
from ellm.worker.build import LoadedEngine
from ellm.worker.engine.plan import BatchPlan, ModelLimits, StepResult, step_features
from ellm.worker.executor.base import BegunStep, Executor
from ellm.worker.loop import EngineLoop
from ellm.worker.step_thread import beginning


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """One step as it ran. Seconds; `start_s` and `end_s` by the monotonic clock. A step may start, that is be
    asked for, before the one before it has ended."""

    features: StepFeatures
    start_s: float
    elapsed_s: float
    moved_bytes: int  # by copies that ended with it
    moving_s: float
    told_s: float | None = None
    probed: bool = False  # a probe ran after it

    @property
    def end_s(self) -> float:
        return self.start_s + self.elapsed_s if self.told_s is None else self.told_s

    @property
    def kind(self) -> str:
        if self.features.rows == self.features.decode_rows:
            return "decode only"
        return "mixed" if self.features.decode_rows else "prefill only"


PROBE_EVERY = 32  # steps


class RecordingExecutor:
    """Another executor, and what each of its steps took. Steps without rows are not kept. Between steps, now
    and then, what `probe` takes, in seconds."""

    def __init__(self, inner: Executor, probe: Callable[[], float] | None = None) -> None:
        self._inner = inner
        self._begin = beginning(inner)
        self._probe = probe
        self.steps: list[MeasuredStep] = []
        self.probe_s: list[float] = []

    @property
    def limits(self) -> ModelLimits:
        return self._inner.limits

    def execute(self, plan: BatchPlan) -> StepResult:
        return self.begin(plan).result()

    def begin(self, plan: BatchPlan) -> BegunStep:
        start = time.monotonic()
        return _RecordedStep(self, plan, start, self._begin(plan))

    def note(self, plan: BatchPlan, start_s: float, result: StepResult) -> None:
        if plan.entries and not plan.waits:
            times = result.copy_times
            moved = (0, 0.0)
            if times is not None:
                moved = (times.saved_bytes + times.loaded_bytes, times.saved_s + times.loaded_s)
            probe = self._probe if (len(self.steps) + 1) % PROBE_EVERY == 0 else None
            told_s, probed = time.monotonic(), probe is not None
            self.steps.append(
                MeasuredStep(step_features(plan), start_s, result.elapsed_s, *moved, told_s, probed)
            )
            if probe is not None:
                self.probe_s.append(probe())

    def close(self) -> None:
        self._inner.close()


class _RecordedStep:
    """What another executor has begun."""

    def __init__(self, owner: RecordingExecutor, plan: BatchPlan, start_s: float, step: BegunStep) -> None:
        self._owner, self._plan, self._start_s, self._step = owner, plan, start_s, step

    @property
    def ended(self) -> bool:
        return self._step.ended

    @property
    def feeds_back(self) -> bool:
        return self._step.feeds_back

    def wait(self) -> None:
        self._step.wait()

    def result(self) -> StepResult:
        result = self._step.result()
        self._owner.note(self._plan, self._start_s, result)
        return result


@dataclass(frozen=True, slots=True)
class OpenLoopRun:
    """By request, in the order given. Times in seconds since the run's start."""

    token_times: list[array[float]]
    tokens: list[list[int]]
    finish_reasons: list[str | None]
    steps: list[MeasuredStep]
    report: WorkerReport
    probe_s: list[float] = field(default_factory=list)


def run_open_loop(
    engine: LoadedEngine,
    requests: Sequence[EngineRequest],
    arrivals: Sequence[float],
    timeout_s: float = 300.0,
    probe: Callable[[], float] | None = None,
) -> OpenLoopRun:
    """Submit request i at `arrivals[i]` (ascending); returns when all have ended, and closes the engine.

    Raises RuntimeError if the engine fails or is not done in time.
    """
    executor = RecordingExecutor(engine.executor, probe)
    loop = EngineLoop(engine.core, executor, grammars=engine.grammars)
    index = {request.request_id: i for i, request in enumerate(requests)}
    times = [array("d") for _ in requests]
    tokens: list[list[int]] = [[] for _ in requests]
    reasons: list[str | None] = [None for _ in requests]
    done = threading.Event()
    left = len(requests)

    def publish(outputs: list[SequenceOutput]) -> None:
        nonlocal left
        now = time.monotonic() - begun
        for output in outputs:
            i = index[output.request_id]
            tokens[i] += output.token_ids
            times[i].extend([now] * len(output.token_ids))
            if output.finish_reason is not None:
                reasons[i] = output.finish_reason
                left -= 1
        if not left:
            done.set()

    begun = time.monotonic()
    loop.start(publish)
    for number, (request, arrival) in enumerate(zip(requests, arrivals, strict=True)):
        time.sleep(max(0.0, begun + arrival - time.monotonic()))
        loop.submit("open-loop", number, [request])
    deadline = time.monotonic() + timeout_s
    while not done.wait(0.5):
        if loop.failure is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{left} requests did not end: the engine is {loop.state}") from loop.failure
    loop.stop(30.0)
    report = engine.core.report(time.monotonic())
    return OpenLoopRun(times, tokens, reasons, executor.steps, report, executor.probe_s)
