"""Engines on the simulated executor for tests of what stands above them, and an executor that can be held."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace

from ellm.worker.api.config import SchedulerConfig, WorkerConfig
from ellm.worker.api.cost_model import CostModel
from ellm.worker.api.report import WorkerInfo
from ellm.worker.api.request import EngineRequest, SamplingParams
from ellm.worker.engine.core import EngineCore
from ellm.worker.engine.plan import BatchPlan, ModelLimits, StepResult
from ellm.worker.executor.simulated import SimulatedExecutor
from ellm.worker.front import WorkerFront
from ellm.worker.loop import EngineLoop

LIMITS = ModelLimits(num_blocks=256, block_size=16, max_model_len=1024, vocab_size=1000, eos_token_ids=(0,))


class HeldExecutor:
    """A simulated executor whose steps wait while `gate` is clear, and fail once `error` is set."""

    def __init__(self, step_s: float = 0.001, limits: ModelLimits = LIMITS) -> None:
        cost = CostModel.known(overhead_s=step_s)
        self._inner = SimulatedExecutor(limits, cost, verify=True, realtime=True)
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.steps: list[int] = []
        self.closed = False

    @property
    def limits(self) -> ModelLimits:
        return self._inner.limits

    def execute(self, plan: BatchPlan) -> StepResult:
        self.gate.wait(10)
        if self.error is not None:
            raise self.error
        self.steps.append(plan.step)
        return self._inner.execute(plan)

    def close(self) -> None:
        self.closed = True
        self._inner.close()


def worker_config(depth: int = 2, **changes: float) -> WorkerConfig:
    """A short heartbeat; a test about leases sets its own."""
    scheduler = SchedulerConfig(pipeline_depth=depth, max_num_seqs=64, max_step_tokens=256)
    config = WorkerConfig(scheduler=scheduler, heartbeat_s=0.05, router_lease_s=10.0, outbox_items=64)
    return replace(config, **changes)


def make_engine(
    executor: HeldExecutor, config: WorkerConfig, **options: object
) -> tuple[EngineCore, EngineLoop]:
    core = EngineCore(executor.limits, config)
    return core, EngineLoop(core, executor, report_s=config.heartbeat_s, **options)  # type: ignore[arg-type]


def make_front(executor: HeldExecutor, config: WorkerConfig) -> tuple[WorkerFront, EngineLoop, EngineCore]:
    core, engine = make_engine(executor, config)
    limits = executor.limits
    info = WorkerInfo(
        "w0", "e0", "m", "n", limits.max_model_len, limits.block_size, limits.num_blocks, limits.vocab_size,
        limits.eos_token_ids, "simulated", "none", True,
    )  # fmt: skip
    return WorkerFront(info, config, engine), engine, core


def request(name: str, max_tokens: int = 8, prompt_len: int = 20, attempt: int = 0) -> EngineRequest:
    """A request whose prompt depends on its name; it runs to max_tokens."""
    start = sum(name.encode())
    prompt = tuple(1 + (start + i) % 999 for i in range(prompt_len))
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return EngineRequest(name, prompt, params, attempt=attempt)


def bulky(name: str, max_tokens: int) -> EngineRequest:
    """A request whose outputs are large: it soon fills a stream that nobody reads."""
    plain = request(name, max_tokens)
    return replace(plain, sampling=replace(plain.sampling, logprobs=50))


def expected_tokens(req: EngineRequest) -> tuple[int, ...]:
    """What the simulated executor says to this request, alone and one step at a time."""
    config = worker_config(depth=1)
    core = EngineCore(LIMITS, config)
    executor = SimulatedExecutor(LIMITS, CostModel.known(overhead_s=0.0))
    core.add_request(req, 0.0)
    tokens: list[int] = []
    while (plan := core.begin_step(0.0)) is not None:
        for output in core.finish_step(plan, executor.execute(plan), 0.0):
            tokens += output.token_ids
    return tuple(tokens)


def wait_until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)
