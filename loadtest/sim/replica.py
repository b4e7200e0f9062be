"""One engine in simulated time: arrivals, plans, results, tokens with the time at which they came.

It drives EngineCore as the worker's loop does: up to two plans are outstanding, step n + 1 starts when step n
ends, and the core is asked for a plan after every arrival and every result. It decides nothing. `run` is the
whole of one replica's time; a cluster calls `submit`, `plan` and `finish` in its own.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import thread_time

from ellm.loadtest.sim.executor import TOKEN
from ellm.loadtest.sim.workload import SimRequest
from ellm.worker.api.errors import EllmError
from ellm.worker.api.output import SequenceOutput
from ellm.worker.api.report import WorkerReport
from ellm.worker.api.request import EngineRequest, SamplingParams
from ellm.worker.engine.core import EngineCore
from ellm.worker.engine.plan import BatchPlan, StepResult
from ellm.worker.executor.base import Executor

_REPORT_EVERY = 8  # steps
_PROGRESS_EVERY = 512  # steps
_STUCK_AFTER = 10_000  # steps that take no time


class SimulationError(EllmError):
    """The engine does not get on: what a person must look into."""

    code = "simulation_error"


@dataclass(slots=True)
class CpuTime:
    """Seconds that this machine spent, by part."""

    plan: float = 0.0  # EngineCore.begin_step
    execute: float = 0.0
    finish: float = 0.0  # EngineCore.finish_step
    total: float = 0.0
    worst_plan: float = 0.0


@dataclass(slots=True)
class Trajectory:
    """What happened."""

    token_times: list[array[float]]  # by request, seconds of simulated time
    report: WorkerReport
    duration_s: float  # until the last step has ended
    uncached_ratio: float  # mean over time
    mean_batch: float  # decode rows per step
    cost_error_median: float  # relative, of the engine's own cost model, over the last steps
    cpu: CpuTime = field(default_factory=CpuTime)


class Replica:
    """`on_plan(plan, now)` sees every plan as it is made; `on_tokens(n)` how many tokens there are so far."""

    def __init__(
        self,
        core: EngineCore,
        executor: Executor,
        requests: Sequence[SimRequest],
        *,
        tpot_slo_s: float | None = None,
        ttft_slo_s: float | None = None,
        on_plan: Callable[[BatchPlan, float], None] | None = None,
        on_tokens: Callable[[int], None] | None = None,
    ) -> None:
        self._core = core
        self._executor = executor
        self._requests = requests
        self._slos = (tpot_slo_s, ttft_slo_s)
        self._on_plan = on_plan
        self._on_tokens = on_tokens or (lambda count: None)
        self.watches = True  # the uncached ratio, and how far it is; a cluster asks for reports enough
        self.clock: Callable[[], float] = thread_time  # of this machine's own time, by part
        self.times: dict[str, array[float]] = {}  # whoever drives it itself says whether it wants them
        self._outstanding: deque[BatchPlan] = deque()
        self._running: StepResult | None = None  # of the first outstanding plan
        self.ends_at = 0.0
        self._cpu = CpuTime()
        self._num_steps = 0
        self._num_decode = 0
        self._without_time = 0
        self._uncached_s = 0.0
        self._reported_at = 0.0

    @property
    def runs(self) -> bool:
        """A step is under way; it ends at `ends_at`."""
        return bool(self._outstanding)

    def run(self) -> Trajectory:
        """Until every request has ended. Raises SimulationError if the engine does not get on."""
        begun = thread_time()
        core, requests = self._core, self._requests
        self.times = {str(i): array("d") for i in range(len(requests))}
        now, arrived = 0.0, 0
        while True:
            self.plan(now)
            arrival = requests[arrived].arrival_s if arrived < len(requests) else None
            if arrival is not None and (not self._outstanding or arrival <= self.ends_at):
                now = max(now, arrival)
                self.submit(arrived, now)
                arrived += 1
            elif self._outstanding:
                now = self.ends_at
                self.finish(now)
            elif core.has_work:
                report = core.report(now)
                raise SimulationError(
                    f"wedged at {now:.3f} s: {report.num_running} run, {report.num_parked} are parked, "
                    f"{report.num_waiting} wait, and no plan is made"
                )
            else:
                break
        self._cpu.total = thread_time() - begun
        self._on_tokens(sum(map(len, self.times.values())))
        return Trajectory(
            token_times=list(self.times.values()),
            report=core.report(now),
            duration_s=now,
            uncached_ratio=self._uncached_s / self._reported_at if self._reported_at else 0.0,
            mean_batch=self._num_decode / max(1, self._num_steps),
            cost_error_median=core.cost_model.error_median,
            cpu=self._cpu,
        )

    def submit(self, index: int, now: float, *, attempt: int = 0, emitted: int = 0) -> None:
        """Request number `index` has come, with the tokens that it got elsewhere."""
        request = self._requests[index]
        tpot_slo_s, ttft_slo_s = self._slos
        # The seed is the request's number: by it the executor finds the true length.
        sampling = SamplingParams(seed=index, max_tokens=request.max_tokens)
        self._core.add_request(
            EngineRequest(
                str(index),
                request.prompt_ids(index),
                sampling,
                attempt=attempt,
                output_ids=(TOKEN,) * emitted,
                tpot_slo_s=tpot_slo_s,
                ttft_slo_s=ttft_slo_s,
            ),
            now,
        )

    def plan(self, now: float) -> None:
        """Plan as far as the core goes; the first plan starts at once."""
        cpu = self._cpu
        while True:
            start = self.clock()
            plan = self._core.begin_step(now)
            taken = self.clock() - start
            cpu.plan += taken
            if plan is None:
                return
            cpu.worst_plan = max(cpu.worst_plan, taken)
            if self._on_plan is not None:
                self._on_plan(plan, now)
            self._outstanding.append(plan)
            if self._running is None:
                self._start(plan, now)

    def _start(self, plan: BatchPlan, now: float) -> None:
        start = self.clock()
        self._running = self._executor.execute(plan)
        self._cpu.execute += self.clock() - start
        elapsed_s = self._running.elapsed_s
        self.ends_at = now + elapsed_s
        self._without_time = 0 if elapsed_s > 0.0 else self._without_time + 1
        if self._without_time > _STUCK_AFTER:  # it would go on for ever
            raise SimulationError(f"stuck at {now:.3f} s: {_STUCK_AFTER} steps took no time")

    def finish(self, now: float) -> list[SequenceOutput]:
        """The first outstanding step has ended: the next one starts before its result is looked at."""
        plan, result = self._outstanding.popleft(), self._running
        assert result is not None
        self._running = None
        if self._outstanding:
            self._start(self._outstanding[0], now)
        start = self.clock()
        outputs = self._core.finish_step(plan, result, now)
        self._cpu.finish += self.clock() - start
        if times := self.times:
            for output in outputs:
                times[output.request_id].append(now)
        self._num_steps += 1
        self._num_decode += plan.num_decode
        if self.watches and self._num_steps % _REPORT_EVERY == 0:
            ratio = self._core.report(now).uncached_token_ratio
            self._uncached_s += ratio * (now - self._reported_at)
            self._reported_at = now
        if self.watches and self._num_steps % _PROGRESS_EVERY == 0:
            self._on_tokens(self._core.report(now).generation_tokens)
        return outputs
