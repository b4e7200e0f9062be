"""Drives an EngineCore over the simulated executor, as a worker's loop would, and checks what comes out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace

from ellm.worker.api.config import CacheConfig, SchedulerConfig, WorkerConfig
from ellm.worker.api.cost_model import CostModel
from ellm.worker.api.output import SequenceOutput
from ellm.worker.api.request import EngineRequest, SamplingParams
from ellm.worker.engine.core import EngineCore
from ellm.worker.engine.plan import BatchPlan, BlockCopy, ModelLimits, NewSequence, StepResult
from ellm.worker.engine.policies import Policy
from ellm.worker.executor.base import Executor
from ellm.worker.executor.simulated import SimulatedExecutor
from ellm.worker.executor.simulated_link import LinkSpeed

EOS = 0
LIMITS = ModelLimits(num_blocks=64, block_size=4, max_model_len=128, vocab_size=50, eos_token_ids=(EOS,))
COSTS = CostModel.known(overhead_s=0.01, row_s=1e-4, kv_token_s=1e-6)


def plain(**limits: object) -> SchedulerConfig:
    """The policy whose decisions a test can foresee, with these limits."""
    return SchedulerConfig(policy="full-chunked", **limits)  # type: ignore[arg-type]


def request(name: str, num_prompt: int = 6, *, seed: int = 0, **fields: object) -> EngineRequest:
    """`num_prompt` tokens made from `seed`; fields of SamplingParams or of EngineRequest."""
    prompt = tuple(1 + (31 * seed + 7 * i + i * i) % 49 for i in range(num_prompt))
    own = {key: fields.pop(key) for key in list(fields) if key in EngineRequest.__dataclass_fields__}
    sampling = SamplingParams(seed=seed, **fields)  # type: ignore[arg-type]
    return EngineRequest(name, **{"prompt_ids": prompt, "sampling": sampling, **own})  # type: ignore[arg-type]


class EngineDriver:
    """`late` executes a plan just before its result is taken, so after the next one was planned; otherwise at
    once. Every output is checked to come exactly once and in order; `check` runs the engine's own check."""

    def __init__(
        self,
        limits: ModelLimits = LIMITS,
        *,
        scheduler: SchedulerConfig | None = None,
        prefix_caching: bool = True,
        output_length: Callable[[NewSequence], int | None] | None = None,
        late: bool = True,
        check: bool = True,
        policy: Policy | None = None,
        link: LinkSpeed | None = None,
        copy_fails: Callable[[BlockCopy], bool] | None = None,
    ) -> None:
        config = WorkerConfig(
            scheduler=scheduler or plain(), cache=CacheConfig(prefix_caching=prefix_caching)
        )
        self.core = EngineCore(limits, config, policy=policy)
        self.executor = SimulatedExecutor(
            limits, COSTS, output_length=output_length, link=link, copy_fails=copy_fails
        )
        self.now = 0.0
        self.plans: list[BatchPlan] = []
        self.streams: dict[str, list[int]] = {}
        self.outputs: dict[str, list[SequenceOutput]] = {}
        self.reasons: dict[str, str] = {}
        self._late, self._check = late, check
        self._outstanding: deque[tuple[BatchPlan, StepResult | None]] = deque()

    def add(self, new: EngineRequest) -> bool:
        added = self.core.add_request(new, self.now)
        if added:
            self.streams[new.request_id] = list(new.output_ids)
            self.outputs[new.request_id] = []
            self.reasons.pop(new.request_id, None)
        return added

    def abort(self, request_id: str, attempt: int = 0) -> bool:
        aborted = self.core.abort(request_id, attempt, self.now)
        if aborted:
            self.reasons[request_id] = "abort"
        if self._check:
            self.core.check()
        return aborted

    def begin(self) -> BatchPlan | None:
        plan = self.core.begin_step(self.now)
        if plan is not None:
            self.plans.append(plan)
            self._outstanding.append((plan, None if self._late else self.executor.execute(plan)))
        if self._check:
            self.core.check()
        return plan

    def finish(self) -> list[SequenceOutput]:
        plan, result = self._outstanding.popleft()
        if result is None:
            result = self.executor.execute(plan)
        self.now += result.elapsed_s
        outputs = self.core.finish_step(plan, result, self.now)
        for output in outputs:
            self._take(output)
        if self._check:
            self.core.check()
        return outputs

    def turn(self) -> list[SequenceOutput]:
        """Plan as far as the engine goes, then take one step back."""
        while self.begin() is not None:
            pass
        assert self._outstanding, "there is work, and nothing is planned"
        return self.finish()

    def run(self, max_turns: int = 100_000) -> int:
        """To the end; returns the number of turns."""
        turns = 0
        while self.core.has_work:
            assert turns < max_turns, "the engine does not come to an end"
            self.turn()
            turns += 1
        return turns

    def _take(self, output: SequenceOutput) -> None:
        name = output.request_id
        assert name not in self.reasons, f"{name}: output after its end"
        assert output.output_index == len(self.streams[name]), f"{name}: an index is lost or comes twice"
        self.streams[name].extend(output.token_ids)
        self.outputs[name].append(output)
        if output.finish_reason is not None:
            self.reasons[name] = output.finish_reason


def run_alone(
    one: EngineRequest, limits: ModelLimits, output_length: Callable[[NewSequence], int | None] | None
) -> EngineDriver:
    """`one` and nothing else in an engine with room for everything, one plan at a time."""
    roomy = replace(limits, num_blocks=limits.max_model_len)
    config = plain(max_step_tokens=limits.max_model_len, pipeline_depth=1)
    driver = EngineDriver(roomy, scheduler=config, prefix_caching=False, output_length=output_length)
    driver.add(one)
    driver.run()
    return driver


def play(
    executor: Executor,
    requests: Iterable[EngineRequest],
    scheduler: SchedulerConfig,
    policy: Policy | None = None,
) -> EngineDriver:
    """`requests`, one a turn, on a real executor, to their end."""
    driver = EngineDriver(executor.limits, scheduler=scheduler, policy=policy)
    driver.executor = executor  # type: ignore[assignment]
    for request in requests:
        assert driver.add(request)
        driver.turn()
    driver.run(max_turns=20_000)
    return driver
