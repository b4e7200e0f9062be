"""Requests of every kind through an engine's loop, as fast as they are said."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace

from support import golden
from support.workers import wait_until

from ellm.worker.api.config import SchedulerConfig, WorkerConfig
from ellm.worker.api.output import SequenceOutput
from ellm.worker.api.request import EngineRequest, SamplingParams
from ellm.worker.engine.core import EngineCore
from ellm.worker.engine.plan import BatchPlan, StepResult
from ellm.worker.executor.base import BegunStep, Executor
from ellm.worker.loop import EngineLoop

REQUESTS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True),
    "drawn": SamplingParams(temperature=0.9, seed=4, max_tokens=30, ignore_eos=True),
    "scored": SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=2, prompt_logprobs=1),
    "penalised": SamplingParams(
        temperature=0.0, max_tokens=25, ignore_eos=True, repetition_penalty=1.5, frequency_penalty=0.5
    ),
    "stopped": SamplingParams(temperature=0.0, max_tokens=40, stop_token_ids=tuple(range(200))),
}
LAST = replace(REQUESTS["greedy"], max_tokens=45)


def spoken(
    executor: Executor, requests: list[EngineRequest], policy: str
) -> tuple[dict[str, list[int]], dict[str, list[float]]]:
    """Tokens and their log-probabilities by request, through an engine's loop."""
    config = WorkerConfig(scheduler=SchedulerConfig(policy=policy, max_num_seqs=4, max_step_tokens=48))
    core, lock = EngineCore(executor.limits, config), threading.Lock()
    tokens: dict[str, list[int]] = {}
    scores: dict[str, list[float]] = {}
    left = {request.request_id for request in requests}

    def publish(outputs: list[SequenceOutput]) -> None:
        with lock:
            for output in outputs:
                assert output.error is None
                tokens.setdefault(output.request_id, []).extend(output.token_ids)
                told = [score.logprob for score in output.logprobs or () if score is not None]
                scores.setdefault(output.request_id, []).extend(told)
                if output.finish_reason is not None:
                    left.discard(output.request_id)

    loop = EngineLoop(core, executor)
    loop.start(publish)
    for number, request in enumerate(requests):
        loop.submit("router", number, [request])
        time.sleep(0.002)
    wait_until(lambda: not left or loop.failure is not None, 60)
    assert loop.failure is None
    wait_until(lambda: loop.num_outstanding == 0)
    core.check()
    assert loop.stop(10)
    return tokens, scores


def requests_of_every_kind(count: int) -> list[EngineRequest]:
    """`count` of each; then some that say so much that they are on their own in the end: of their steps none
    has to be read before the next may begin, however the others fell together."""
    return [
        EngineRequest(f"{kind} {i}", tuple(golden.prompt(9 + 14 * i, i)), replace(sampling, seed=i))
        for i in range(count)
        for kind, sampling in REQUESTS.items()
    ] + [EngineRequest(f"last {i}", tuple(golden.prompt(9, i)), LAST) for i in range(3)]


LAST_STEP_S = 0.2


class Lagging:
    """An executor whose steps take until the next one has been asked for, as a GPU's may. Whoever made the
    executor closes it. `read_first`: of each step that was begun, whether the one before had been read."""

    def __init__(self, inner: Executor, begin: Callable[[BatchPlan], BegunStep]) -> None:
        self._begin = begin
        self._unread = 0
        self._begun = threading.Condition()
        self.num_begun = 0
        self.limits = inner.limits
        self.read_first: list[bool] = []

    def execute(self, plan: BatchPlan) -> StepResult:
        raise AssertionError("it can begin")

    def begin(self, plan: BatchPlan) -> BegunStep:
        self.read_first.append(not self._unread)
        assert self._unread < 2, "two plans in flight"
        self._unread += 1
        with self._begun:
            self.num_begun += 1
            self._begun.notify_all()
        return _LaggingStep(self, self._begin(plan), self.num_begun)

    def wait_for_next(self, number: int) -> None:
        """Until another has been begun; not for ever, for there may be none."""
        with self._begun:
            self._begun.wait_for(lambda: self.num_begun > number, LAST_STEP_S)

    def told(self, step: BegunStep) -> StepResult:
        result = step.result()
        self._unread -= 1
        return result

    def close(self) -> None: ...


class _LaggingStep:
    ended = False

    def __init__(self, owner: Lagging, step: BegunStep, number: int) -> None:
        self._owner, self._step, self._number = owner, step, number

    @property
    def feeds_back(self) -> bool:
        return self._step.feeds_back

    def wait(self) -> None:
        self._owner.wait_for_next(self._number)

    def result(self) -> StepResult:
        return self._owner.told(self._step)
