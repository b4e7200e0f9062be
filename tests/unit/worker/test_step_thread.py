"""The next step is asked for before the one before has been read, where nothing forbids it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import golden
from support.checkpoints import write_checkpoint
from support.workers import wait_until

from ellm.worker.api.config import SchedulerConfig, WorkerConfig
from ellm.worker.api.output import SequenceOutput
from ellm.worker.api.request import EngineRequest, SamplingParams
from ellm.worker.engine.core import EngineCore
from ellm.worker.engine.plan import BatchPlan, ModelLimits, PlanEntry, StepResult
from ellm.worker.executor.local import LocalExecutor
from ellm.worker.loop import EngineLoop
from ellm.worker.model.staging import ToHost
from ellm.worker.step_thread import StepThread

ENTRY = PlanEntry(1, 0, 1, (0,), [0], True)


class Device:
    """Steps end when they are let go, and are read in their order."""

    limits = ModelLimits(4, 16, 64, 10, (0,))

    def __init__(self) -> None:
        self.events: list[str] = []
        self.ended: set[int] = set()
        self.feeds_back = False
        self.error: tuple[str, Exception] | None = None

    def execute(self, plan: BatchPlan) -> StepResult:
        raise AssertionError("it can begin")

    def begin(self, plan: BatchPlan) -> Step:
        self.note(f"begin {plan.step}")
        return Step(self, plan.step)

    def note(self, event: str) -> None:
        if self.error is not None and event == self.error[0]:
            raise self.error[1]
        self.events.append(event)

    def close(self) -> None: ...


class Step:
    def __init__(self, device: Device, number: int) -> None:
        self._device, self._number = device, number

    @property
    def ended(self) -> bool:
        return self._number in self._device.ended

    @property
    def feeds_back(self) -> bool:
        return self._device.feeds_back

    def result(self) -> StepResult:
        self._device.note(f"read {self._number}")
        return StepResult(self._number, (), 0.0)


class Running:
    def __init__(self, device: Device) -> None:
        self.told: list[int] = []
        self.crashes: list[Exception] = []
        self.thread = StepThread(device, lambda result: self.told.append(result.step), self.crashes.append)

    def start(self, *steps: int, entries: tuple[PlanEntry, ...] = (ENTRY,), waits: bool = False) -> None:
        for step in steps:
            self.thread.start(BatchPlan(step, entries, (), (), len(entries), len(entries), waits=waits))


@pytest.fixture
def device() -> Device:
    return Device()


def test_a_step_is_queued_behind_the_one_that_runs(device: Device) -> None:
    running = Running(device)
    running.start(0)
    wait_until(lambda: device.events == ["begin 0"])
    running.start(1)
    wait_until(lambda: device.events == ["begin 0", "begin 1", "read 0"])
    running.start(2)
    wait_until(lambda: device.events[-2:] == ["begin 2", "read 1"])
    assert running.told == [0, 1], "the last is read when it has ended, or when there is another"
    device.ended.add(2)
    wait_until(lambda: running.told == [0, 1, 2])
    running.thread.stop(wait=True)


@pytest.mark.parametrize(
    "following", [{"entries": ()}, {"waits": True}, {}], ids=["no rows", "waits for copies", "feeds back"]
)
def test_what_must_be_read_first_is(device: Device, following: dict[str, object]) -> None:
    device.feeds_back = not following
    running = Running(device)
    running.start(0)
    wait_until(lambda: device.events == ["begin 0"])
    running.start(1, **following)  # type: ignore[arg-type]
    wait_until(lambda: device.events == ["begin 0", "read 0", "begin 1"])
    running.thread.stop(wait=True)
    assert running.told == [0, 1], "plans that were started are finished"


@pytest.mark.parametrize("event", ["begin 1", "read 0", "read 1"])
def test_the_first_error_ends_the_thread(device: Device, event: str) -> None:
    device.error = (event, torch.OutOfMemoryError("CUDA out of memory"))
    running = Running(device)
    running.start(0, 1)
    device.ended.add(1)
    wait_until(lambda: bool(running.crashes))
    assert [str(error) for error in running.crashes] == ["CUDA out of memory"]
    running.start(2)
    running.thread.stop(wait=True)
    assert "begin 2" not in device.events


REQUESTS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True),
    "drawn": SamplingParams(temperature=0.9, seed=4, max_tokens=30, ignore_eos=True),
    "scored": SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=2, prompt_logprobs=1),
    "penalised": SamplingParams(
        temperature=0.0, max_tokens=25, ignore_eos=True, repetition_penalty=1.5, frequency_penalty=0.5
    ),
    "stopped": SamplingParams(temperature=0.0, max_tokens=40, stop_token_ids=tuple(range(200))),
}


def spoken(
    executor: LocalExecutor, requests: list[EngineRequest], policy: str
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


@pytest.mark.parametrize("policy", ["full-chunked", "literal(0.5, stream=0.5)"])
def test_a_device_that_lags_says_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    """Results are there only when they are waited for, or after a few looks: as of a GPU, whose next step has
    been asked for by then. Also where blocks leave, come back and are streamed meanwhile."""
    write_checkpoint(tmp_path, "llama")
    room = {"num_blocks": 40, "transient_blocks": 12, "host_bytes": 1 << 20}
    requests = [
        EngineRequest(f"{kind} {i}", tuple(golden.prompt(9 + 14 * i, i)), replace(sampling, seed=i))
        for i in range(3)
        for kind, sampling in REQUESTS.items()
    ]
    expected = spoken(golden.executor(tmp_path, jit=False, **room), requests, policy)
    read: list[bool] = []
    looks: dict[int, int] = {}
    monkeypatch.setattr(ToHost, "there", property(lambda self: late(looks, id(self))))
    begin = LocalExecutor.begin
    pending: list[object] = []

    def noted(executor: LocalExecutor, plan: BatchPlan) -> object:
        read.append(not pending)
        step = begin(executor, plan)
        pending.append(step)
        result: Callable[[], StepResult] = step.result

        def wait() -> StepResult:
            pending.remove(step)
            return result()

        step.result = wait  # type: ignore[method-assign]
        return step

    monkeypatch.setattr(LocalExecutor, "begin", noted)
    tokens, scores = spoken(golden.executor(tmp_path, jit=False, **room), requests, policy)
    assert tokens == expected[0]
    assert sum(map(len, scores.values())) == 3 * 12
    for name, told in scores.items():
        assert told == pytest.approx(expected[1][name], abs=1e-4)
    assert read.count(False) > 5, "steps were begun before the one before had been read"
    assert read.count(True) > 5, "others had to be read first"


def late(looks: dict[int, int], key: int) -> bool:
    looks[key] = looks.get(key, 0) + 1
    return looks[key] > 30
