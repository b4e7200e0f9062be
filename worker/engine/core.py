"""EngineCore: requests in, plans out, results in, tokens out. Pure; time is an argument.

Up to two plans are outstanding and come back in order: step n + 1 may be planned while step n runs, with
rows whose input token step n is still sampling. Blocks of a sequence that ended or was preempted are given
back when the last plan that names it has come back.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from ellm.worker.api.config import WorkerConfig
from ellm.worker.api.cost_model import CostModel
from ellm.worker.api.errors import QueueFull, Unavailable
from ellm.worker.api.output import SequenceOutput
from ellm.worker.api.report import WorkerReport
from ellm.worker.api.request import EngineRequest
from ellm.worker.engine.completion import Completion
from ellm.worker.engine.hole_ways import HoleWays
from ellm.worker.engine.load import Load
from ellm.worker.engine.plan import BatchPlan, ModelLimits, StepResult, step_features
from ellm.worker.engine.policies import Policy, make_policy, resolve_config
from ellm.worker.engine.residency import Residency
from ellm.worker.engine.scheduler import ScheduledStep, Scheduler
from ellm.worker.engine.sequence import Sequence
from ellm.worker.engine.state import EngineState
from ellm.worker.engine.submission import check_request
from ellm.worker.engine.tombstones import Tombstones


class EngineCore:
    """The brain of one worker. Its caller executes the plans, one at a time and in order."""

    def __init__(
        self,
        limits: ModelLimits,
        config: WorkerConfig,
        *,
        cost_model: CostModel | None = None,
        policy: Policy | None = None,
    ) -> None:
        """`policy`: in place of the one that the config names. Raises ConfigError for limits that cannot work
        and for an unknown policy."""
        config = replace(config, scheduler=resolve_config(config.scheduler)[0])
        self.limits = limits
        self.config = config
        self.cost_model = cost_model or CostModel()  # learns from every finished step
        self._state = EngineState(limits, config.scheduler, config.cache)
        policy, residency = policy or make_policy(config.scheduler), Residency(self._state)
        self._policy = policy
        policy.attach(self._state, residency, self.cost_model)
        self._state.indexes = config.cache.prefix_caching or policy.parks
        self._scheduler = Scheduler(self._state, policy, residency)
        self._completion = Completion(self._state, policy, residency)
        self._tombstones = Tombstones()
        self._load = Load(self._state)
        self._eos = frozenset(limits.eos_token_ids)
        self._hole_ways = HoleWays(limits.hole_ways) if len(limits.hole_ways) > 1 else None
        self._outstanding: deque[ScheduledStep] = deque()
        self._next_order = 0

    @property
    def has_work(self) -> bool:
        """A request is not finished, or a plan or a copy has not come back."""
        copies = self._state.copies
        return bool(self._state.live or self._outstanding or (copies is not None and copies.under_way))

    @property
    def max_total_tokens(self) -> int:
        """Prompt and output together of the longest request that is accepted."""
        return self._state.max_total_tokens

    def add_request(self, request: EngineRequest, now: float) -> bool:
        """Queue a request; idempotent. False if this attempt is live already, older than the live one, or
        was aborted before it came. A newer attempt replaces an older one.

        Raises PromptTooLong, InvalidRequest (naming the field) and QueueFull.
        """
        state = self._state
        former = state.live.get(request.request_id)
        if former is not None and request.attempt <= former.request.attempt:
            return False
        if self._tombstones.covers(request.request_id, request.attempt, now):
            return False
        if former is not None:
            self._policy.aborted(former, now)
            state.finish(former)  # whatever becomes of the newer attempt, nobody listens to this one
        check_request(request, self.limits.vocab_size, state.max_total_tokens)
        if state.waiting.full:
            raise QueueFull(
                f"{len(state.waiting)} requests are waiting", retry_after_s=self._load.retry_after_s()
            )
        if not self.has_work:
            self._load.work_came(now)
        seq = Sequence(request, self._next_order, self._eos)
        self._promise(seq, now)
        if not state.prefix_caching:
            seq.salt = f"\0{self._next_order}"  # its blocks are for itself alone
        self._next_order += 1
        state.live[request.request_id] = seq
        state.waiting.push(seq)
        return True

    def _promise(self, seq: Sequence, now: float) -> None:
        """What the request was promised; the config's promises where it brings none of its own."""
        seq.arrived_at = now
        scheduler = self.config.scheduler
        if seq.tpot_slo_s is None and scheduler.tpot_slo_ms is not None:
            seq.tpot_slo_s = scheduler.tpot_slo_ms / 1000
        if seq.ttft_slo_s is None and scheduler.ttft_slo_ms is not None:
            seq.ttft_slo_s = scheduler.ttft_slo_ms / 1000

    def abort(self, request_id: str, attempt: int, now: float) -> bool:
        """End every attempt up to `attempt`, also one that is still to come; no output follows. Idempotent.
        True if one was live."""
        seq = self._state.live.get(request_id)
        self._tombstones.put(request_id, attempt, now)
        if seq is None or seq.request.attempt > attempt:
            return False
        self._policy.aborted(seq, now)
        self._state.finish(seq)
        return True

    def begin_step(self, now: float) -> BatchPlan | None:
        """The next plan; None if nothing can run now, or if `pipeline_depth` plans are outstanding."""
        if len(self._outstanding) >= self.config.scheduler.pipeline_depth:
            return None
        step = self._scheduler.schedule(now, idle=not self._outstanding)
        if step is None:
            return None
        plan = step.plan
        if self._hole_ways is not None and plan.entries and plan.entries[-1].recompute:
            step.plan = replace(plan, way=self._hole_ways.choose(plan))
        self._outstanding.append(step)
        return step.plan

    def finish_step(self, plan: BatchPlan, result: StepResult, now: float) -> list[SequenceOutput]:
        """Take the oldest outstanding plan's result; returns what is new, one item per sequence."""
        assert self._outstanding, "no plan is outstanding"
        assert self._outstanding[0].plan is plan, "plans come back in order"
        assert result.step == plan.step, "a result of another step"
        step = self._outstanding.popleft()
        outputs = self._completion.apply(step, result, now)
        if plan.entries and not plan.waits:
            features = step_features(plan)
            if plan.way is not None and self._hole_ways is not None:
                self._hole_ways.measured(plan, result.elapsed_s, self.cost_model.predict(features))
            self.cost_model.update(features, result.elapsed_s)
        self._policy.stepped(plan, result, now)
        if plan.entries:
            self._load.step_finished(plan, result, outputs, now)
        else:
            self._load.waited(result, now)
        return outputs

    def hand_back(self, now: float, *, everybody: bool) -> list[SequenceOutput]:
        """End those who wait or are parked, and with `everybody` those who run: an output tells their routers
        to go on elsewhere with the tokens they have."""
        state = self._state
        leaving = list(state.live.values()) if everybody else [*state.waiting, *state.parked]
        error = (Unavailable.code, "the worker goes and gives the request back")
        return [self._fail(seq, error, now) for seq in leaving]

    def fail_all(self, code: str, message: str, now: float) -> list[SequenceOutput]:
        """End everything, plans included, with an error output for each request."""
        outputs = [self._fail(seq, (code, message), now) for seq in list(self._state.live.values())]
        while self._outstanding:
            for seq in dict.fromkeys(self._outstanding.popleft().sequences):
                seq.num_outstanding -= 1
                self._state.plan_returned(seq)
        if self._state.copies is not None:
            self._state.copies.abandon()
        return outputs

    def _fail(self, seq: Sequence, error: tuple[str, str], now: float) -> SequenceOutput:
        request, index = seq.request, len(seq.tokens) - seq.num_prompt
        self._policy.aborted(seq, now)
        self._state.finish(seq)
        return SequenceOutput(
            *(request.request_id, request.attempt, index, (), "error"), error=error, events=seq.take_events()
        )

    def take_released(self) -> tuple[int, ...]:
        """Sequences that no later plan names and no plan has let go yet: for a caller that plans no more, and
        goes on with the same executor."""
        released = tuple(self._state.released)
        self._state.released.clear()
        return released

    def report(self, now: float) -> WorkerReport:
        """Load and totals; `state`, memory and submit numbers are the caller's to fill in."""
        return self._load.report(self.cost_model, self.has_work, now)

    @property
    def pressure(self) -> tuple[int, ...]:
        """Something that stays equal until others should hear of this engine's load at once. O(1)."""
        return self._load.pressure()

    def check(self) -> None:
        """Raise AssertionError unless every invariant of sequences, blocks and plans holds."""
        self._state.check([step.sequences for step in self._outstanding])
