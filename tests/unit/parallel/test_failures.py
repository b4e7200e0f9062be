"""Real rank processes that are killed, stopped, orphaned or cannot load: the group ends, and says why."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from support import golden
from support.checkpoints import write_checkpoint
from support.failing_ranks import busy, drive, end_at_once, fail_to_load, fill_up
from support.plans import PlanDriver
from support.workers import wait_until

from ellm.worker.api.config import ModelConfig, WorkerConfig
from ellm.worker.api.errors import ConfigError
from ellm.worker.api.output import SequenceOutput
from ellm.worker.api.request import EngineRequest, SamplingParams
from ellm.worker.build import load_engine
from ellm.worker.engine.core import EngineCore
from ellm.worker.loop import EngineLoop
from ellm.worker.parallel.group import GroupFailed, RankSpec, Timeouts
from ellm.worker.parallel.local_group import LocalGroup
from ellm.worker.watchdog import process_start

TIMEOUTS = Timeouts(start_s=120.0, step_s=2.0, heartbeat_s=0.2)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> WorkerConfig:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, "llama")
    return golden.config(folder, jit=False, tensor_parallel_size=2, profile=False)


@pytest.fixture
def group(config: WorkerConfig) -> Iterator[LocalGroup]:
    made = LocalGroup(config, timeouts=TIMEOUTS)
    yield made
    made.end(0.0)
    made.executor.close()


def decode_until_failure(driver: PlanDriver) -> tuple[Exception, float]:
    """What ended it, and how long the last step took."""
    for _ in range(400):
        start = time.monotonic()
        try:
            driver.step({1: 1})
        except Exception as error:
            return error, time.monotonic() - start
    raise AssertionError("the group goes on without a rank")


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_stops_in_a_step_ends_the_group(group: LocalGroup, kind: signal.Signals) -> None:
    driver = busy(group)
    pid = group.processes[0].pid
    assert pid is not None
    timer = threading.Timer(0.05, os.kill, (pid, kind))
    timer.start()
    error, took_s = decode_until_failure(driver)
    assert isinstance(error, GroupFailed)
    assert took_s < TIMEOUTS.step_s + 4.0
    # The death of a process is seen at its connections, not by waiting.
    assert ("Timed out" in str(error)) == (kind == signal.SIGSTOP)
    assert group.executor.failure is error
    with pytest.raises(GroupFailed):
        driver.step({1: 1})


def test_a_rank_that_dies_while_nothing_is_done_is_noticed(group: LocalGroup) -> None:
    failures: list[Exception] = []
    group.executor._on_failure = failures.append
    busy(group)
    group.processes[0].kill()
    until = time.monotonic() + 10
    while not failures and time.monotonic() < until:
        time.sleep(0.02)
    assert isinstance(failures[0], GroupFailed)
    assert len(failures) == 1


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGSTOP])
def test_followers_end_without_rank_0(config: WorkerConfig, kind: signal.Signals) -> None:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    driver = context.Process(target=drive, args=(config, TIMEOUTS, there))
    driver.start()
    assert here.poll(120)
    (pid,) = here.recv()
    mark = process_start(pid)
    assert mark is not None
    time.sleep(0.2)
    assert driver.pid is not None
    os.kill(driver.pid, kind)
    start = time.monotonic()
    try:
        while process_start(pid) == mark and time.monotonic() - start < TIMEOUTS.step_s + 10:
            time.sleep(0.02)
        assert process_start(pid) != mark
    finally:
        driver.kill()
        driver.join()


@pytest.mark.parametrize(
    ("follow", "error", "words"),
    [
        (fail_to_load, ConfigError, "rank 1: the disk is on fire"),
        (end_at_once, GroupFailed, "rank 1: its process ended with code 3"),
    ],
)
def test_a_rank_that_cannot_load_fails_all(
    config: WorkerConfig, follow: Callable[[WorkerConfig, RankSpec], None], error: type[Exception], words: str
) -> None:
    before = set(multiprocessing.active_children())
    with pytest.raises(error, match=words):
        LocalGroup(config, timeouts=TIMEOUTS, follow=follow)
    assert set(multiprocessing.active_children()) <= before


def test_a_rank_that_cannot_begin_a_step_ends_the_group_and_its_requests_are_kept(
    config: WorkerConfig,
) -> None:
    """Without a word about them: their routers move what a failed worker has not answered."""
    group = LocalGroup(config, timeouts=TIMEOUTS, follow=fill_up)
    group.executor.queues = True
    published: list[SequenceOutput] = []
    failures: list[BaseException] = []
    core = EngineCore(group.executor.limits, config)
    loop = EngineLoop(core, group.executor, on_failure=failures.append)
    try:
        loop.start(published.extend)
        sampling = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
        loop.submit("router", 0, [EngineRequest("r", tuple(golden.prompt(20, 1)), sampling)])
        wait_until(lambda: bool(failures), 30)
    finally:
        group.end(0.0)
        group.executor.close()
    assert isinstance(loop.failure, GroupFailed)
    assert str(loop.failure) == "rank 1: CUDA out of memory. Tried to allocate 2.00 GiB"
    assert group.executor.failure is loop.failure
    assert loop.state == "failed"
    assert 10 < sum(len(output.token_ids) for output in published) < 20, "what was said stands"
    assert all(output.error is None and output.finish_reason is None for output in published)
    assert core.has_work


@pytest.mark.parametrize(("size", "words"), [(4, "does not divide the model's 6 attention heads"), (6, "")])
def test_a_size_that_the_model_cannot_have_is_refused_before_anything_starts(
    config: WorkerConfig, size: int, words: str
) -> None:
    start = time.monotonic()
    before = set(multiprocessing.active_children())
    wrong = replace(config, tensor_parallel_size=size)
    if size == 6:  # six heads, and two key/value heads for three ranks each: that can be had
        wrong = replace(wrong, tensor_parallel_size=3, model=ModelConfig(path=config.model.path))
        words = "3 and the model's 2 key/value heads: neither divides the other"
    with pytest.raises(ConfigError, match=words) as caught:
        load_engine(wrong, lambda what, share: None)
    assert caught.value.param == "tensor_parallel_size"
    assert set(multiprocessing.active_children()) == before
    assert time.monotonic() - start < 30


def test_an_engine_of_two_ranks(config: WorkerConfig) -> None:
    before = set(multiprocessing.active_children())
    loaded = load_engine(replace(config, profile=True), lambda what, share: None)
    try:
        assert (loaded.device, loaded.dtype) == ("cpu", "float32")
        assert loaded.core.cost_model.to_dict()["num_steps"] != 0
    finally:
        loaded.executor.close()
    assert set(multiprocessing.active_children()) <= before
