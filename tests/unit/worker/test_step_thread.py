"""The next step is asked for before the one before has been read, where nothing forbids it."""

from __future__ import annotations

import threading
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import golden
from support.checkpoints import write_checkpoint
from support.spoken import Lagging, requests_of_every_kind, spoken
from support.workers import wait_until

from ellm.worker.engine.plan import BatchPlan, ModelLimits, PlanEntry, StepResult
from ellm.worker.step_thread import StepThread

ENTRY = PlanEntry(1, 0, 1, (0,), [0], True)


class Device:
    """Steps end when they are let go, and are read in their order."""

    limits = ModelLimits(4, 16, 64, 10, (0,))

    def __init__(self) -> None:
        self.events: list[str] = []
        self.num_looks = 0  # at whether a step has ended
        self.waited: list[int] = []
        self.fault: Exception | None = None  # of a wait
        self._ends: dict[int, threading.Event] = defaultdict(threading.Event)
        self.feeds_back = False
        self.error: tuple[str, Exception] | None = None

    def execute(self, plan: BatchPlan) -> StepResult:
        raise AssertionError("it can begin")

    def begin(self, plan: BatchPlan) -> Step:
        self.note(f"begin {plan.step}")
        return Step(self, plan.step)

    def end(self, step: int) -> None:
        self._ends[step].set()

    def end_of(self, step: int) -> threading.Event:
        return self._ends[step]

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
        self._device.num_looks += 1
        return self._device.end_of(self._number).is_set()

    @property
    def feeds_back(self) -> bool:
        return self._device.feeds_back

    def wait(self) -> None:
        self._device.waited.append(self._number)
        assert self._device.end_of(self._number).wait(30)
        if self._device.fault is not None:
            raise self._device.fault

    def result(self) -> StepResult:
        self._device.note(f"read {self._number}")
        self._device.end(self._number)  # what has been read has ended
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
    device.end(2)
    wait_until(lambda: running.told == [0, 1, 2])
    running.thread.stop(wait=True)


def test_a_step_that_takes_long_is_not_looked_at_again_and_again(device: Device) -> None:
    """A thread sleeps until it has ended; a plan that comes meanwhile is begun all the same."""
    running = Running(device)
    for last in range(1, 40, 2):
        running.start(last - 1)
        wait_until(lambda last=last: device.waited[-1:] == [last - 1])  # type: ignore[misc]
        running.start(last)
        wait_until(lambda last=last: running.told[-1:] == [last - 1])  # type: ignore[misc]
        device.end(last - 1)
        wait_until(lambda last=last: device.waited[-1:] == [last])  # type: ignore[misc]
        device.end(last)
        wait_until(lambda last=last: running.told[-1:] == [last])  # type: ignore[misc]
    assert running.told == list(range(40))
    assert device.waited == list(range(40)), "each is waited for once"
    assert device.num_looks <= 3 * 40, "one when it has begun, one for each thing that comes meanwhile"
    running.thread.stop(wait=True)


def test_who_waits_can_be_stopped(device: Device) -> None:
    """The end of the thread does not wait for a device that hangs, unless it is told to."""
    running = Running(device)
    running.start(0)
    wait_until(lambda: device.waited == [0])
    running.thread.stop(wait=False)
    wait_until(lambda: running.told == [0])
    device.end(0)


def test_a_device_that_fails_while_it_is_waited_for_ends_the_thread(device: Device) -> None:
    device.fault = device_error = RuntimeError("an illegal memory access was encountered")
    device.error = ("read 0", device_error)
    running = Running(device)
    running.start(0)
    wait_until(lambda: device.waited == [0])
    device.end(0)
    wait_until(lambda: running.crashes == [device_error])


@pytest.mark.parametrize(
    "following",
    [{"entries": ()}, {"waits": True}, {"entries": (replace(ENTRY, prompt_logprobs=True),)}, {}],
    ids=["no rows", "waits for copies", "scores a prompt", "feeds back"],
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
    device.end(1)
    wait_until(lambda: bool(running.crashes))
    assert [str(error) for error in running.crashes] == ["CUDA out of memory"]
    assert running.told == ([] if event == "read 0" else [0]), "what had ended before is told"
    running.start(2)
    running.thread.stop(wait=True)
    assert "begin 2" not in device.events


@pytest.mark.parametrize("policy", ["full-chunked", "literal(0.5, stream=0.5)"])
def test_a_device_that_lags_says_the_same(tmp_path: Path, policy: str) -> None:
    """Results are there only when they are waited for: as of a GPU, whose next step has been asked for by
    then. Also where blocks leave, come back and are streamed meanwhile."""
    write_checkpoint(tmp_path, "llama")
    room = {"num_blocks": 40, "transient_blocks": 12, "host_bytes": 1 << 20}
    requests = requests_of_every_kind(3)
    expected = spoken(golden.executor(tmp_path, jit=False, **room), requests, policy)
    executor = golden.executor(tmp_path, jit=False, **room)
    lagging = Lagging(executor, executor.begin)
    tokens, scores = spoken(lagging, requests, policy)
    executor.close()
    assert tokens == expected[0]
    assert sum(map(len, scores.values())) == 3 * 12
    for name, told in scores.items():
        assert told == pytest.approx(expected[1][name], abs=1e-4)
    assert lagging.read_first.count(False) > 5, "steps were begun before the one before had been read"
    assert lagging.read_first.count(True) > 5, "others had to be read first"
