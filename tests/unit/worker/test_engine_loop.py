"""EngineLoop on the simulated executor: same tokens at any depth, two plans at once, aborts, failure."""

from __future__ import annotations

import itertools
import threading
import time
from collections import defaultdict
from collections.abc import Iterator

import pytest
from support.workers import HeldExecutor, expected_tokens, make_engine, request, wait_until, worker_config

from ellm.worker.api.output import SequenceOutput
from ellm.worker.loop import HURRY_PERIOD_S, EngineLoop


class Sink:
    """What a loop has published."""

    def __init__(self) -> None:
        self.steps: list[list[SequenceOutput]] = []

    def __call__(self, outputs: list[SequenceOutput]) -> None:
        self.steps.append(outputs)

    @property
    def outputs(self) -> list[SequenceOutput]:
        return [output for step in self.steps for output in step]

    def tokens(self) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = defaultdict(tuple)
        for output in self.outputs:
            assert output.output_index == len(found[output.request_id])
            found[output.request_id] += output.token_ids
        return dict(found)

    def finished(self) -> set[str]:
        return {o.request_id for o in self.outputs if o.finish_reason is not None}


@pytest.fixture
def running() -> Iterator[list[EngineLoop]]:
    """Loops put here are stopped."""
    loops: list[EngineLoop] = []
    yield loops
    for loop in loops:
        loop.stop(5)


@pytest.mark.parametrize("depth", [1, 2])
def test_tokens_are_those_of_each_request_alone(depth: int, running: list[EngineLoop]) -> None:
    executor, sink = HeldExecutor(0.0), Sink()
    _, loop = make_engine(executor, worker_config(depth))
    running.append(loop)
    loop.start(sink)
    requests = [request(f"r{i}", max_tokens=3 + i, prompt_len=10 + 13 * i) for i in range(12)]
    for seq in range(4):
        loop.submit("router", seq, requests[3 * seq : 3 * seq + 3])
        time.sleep(0.003)
    wait_until(lambda: len(sink.finished()) == 12)
    assert sink.tokens() == {r.request_id: expected_tokens(r) for r in requests}
    assert executor.steps == sorted(executor.steps)


@pytest.mark.parametrize("depth", [1, 2])
def test_as_many_plans_are_made_as_the_depth_allows(depth: int, running: list[EngineLoop]) -> None:
    executor, sink = HeldExecutor(), Sink()
    executor.gate.clear()
    _, loop = make_engine(executor, worker_config(depth))
    running.append(loop)
    loop.start(sink)
    loop.submit("router", 0, [request("a")])
    wait_until(lambda: loop.num_outstanding == depth)
    time.sleep(0.02)
    assert loop.num_outstanding == depth
    assert sink.steps == []
    executor.gate.set()
    wait_until(lambda: sink.finished() == {"a"})
    assert sink.tokens()["a"] == expected_tokens(request("a"))


def test_each_step_is_published_once_with_all_its_sequences(running: list[EngineLoop]) -> None:
    executor, sink = HeldExecutor(), Sink()
    _, loop = make_engine(executor, worker_config())
    running.append(loop)
    loop.start(sink)
    loop.submit("router", 0, [request(f"r{i}", max_tokens=10) for i in range(5)])
    wait_until(lambda: len(sink.finished()) == 5)
    assert [len(step) for step in sink.steps] == [5] * 10


def test_nothing_follows_an_abort_and_its_blocks_are_free(running: list[EngineLoop]) -> None:
    executor, sink = HeldExecutor(), Sink()
    core, loop = make_engine(executor, worker_config())
    running.append(loop)
    loop.start(sink)
    loop.submit("router", 0, [request("a", 900), request("b", 900)])
    wait_until(lambda: len(sink.steps) > 5)
    executor.gate.clear()
    loop.abort([("a", 0), ("b", 0), ("never-seen", 3)])
    wait_until(loop._mailbox.empty)
    time.sleep(0.02)
    seen = len(sink.outputs)
    executor.gate.set()
    wait_until(lambda: not core.has_work)
    assert len(sink.outputs) == seen
    wait_until(lambda: loop.report.free_blocks + loop.report.cached_blocks == loop.report.num_blocks)
    core.check()


def test_a_refusal_is_published_at_once_and_the_rest_runs(running: list[EngineLoop]) -> None:
    executor, sink = HeldExecutor(), Sink()
    _, loop = make_engine(executor, worker_config())
    running.append(loop)
    loop.start(sink)
    executor.gate.clear()  # not even a step is needed
    loop.submit("router", 0, [request("long", max_tokens=5000), request("good", 4)])
    wait_until(lambda: len(sink.outputs) == 1)
    refused = sink.outputs[0]
    assert (refused.request_id, refused.finish_reason) == ("long", "error")
    assert refused.error is not None
    assert refused.error[0] == "context_length_exceeded"
    executor.gate.set()
    wait_until(lambda: sink.finished() == {"long", "good"})


def test_a_failing_step_ends_the_loop_and_answers_nobody() -> None:
    executor, sink, failures = HeldExecutor(), Sink(), list[BaseException]()
    _, loop = make_engine(executor, worker_config(), on_failure=failures.append)
    loop.start(sink)
    loop.submit("router", 0, [request("a", 900)])
    wait_until(lambda: len(sink.steps) > 2)
    executor.error = RuntimeError("device lost")
    wait_until(lambda: loop.state == "failed")
    assert [str(f) for f in failures] == ["device lost"]
    assert loop.failure is failures[0]
    assert sink.finished() == set()
    assert loop.stop(5)  # the thread is gone


def test_a_broken_invariant_ends_the_loop_too() -> None:
    executor, sink, failures = HeldExecutor(), Sink(), list[BaseException]()
    core, loop = make_engine(executor, worker_config(), on_failure=failures.append)
    core.finish_step = lambda *_: (_ for _ in ()).throw(AssertionError("broken"))  # type: ignore[method-assign]
    loop.start(sink)
    loop.submit("router", 0, [request("a")])
    wait_until(lambda: loop.state == "failed")
    assert [type(f) for f in failures] == [AssertionError]


def test_a_stall_is_work_without_a_step(running: list[EngineLoop]) -> None:
    executor, sink = HeldExecutor(), Sink()
    _, loop = make_engine(executor, worker_config())
    running.append(loop)
    loop.start(sink)
    time.sleep(1.0)  # nothing to do is no stall, however long
    assert loop.since_progress_s() == 0.0
    executor.gate.clear()
    loop.submit("router", 0, [request("a", 4)])
    assert loop.since_progress_s() < 0.9  # nor does idle time count once work comes
    time.sleep(0.3)
    assert loop.since_progress_s() > 0.25
    executor.gate.set()
    wait_until(lambda: sink.finished() == {"a"})
    wait_until(lambda: loop.since_progress_s() == 0.0)


def test_the_report_echoes_the_newest_submit_that_it_knows(running: list[EngineLoop]) -> None:
    executor, sink = HeldExecutor(), Sink()
    _, loop = make_engine(executor, worker_config())
    running.append(loop)
    loop.start(sink)
    executor.gate.clear()
    loop.submit("r1", 5, [request("a")])
    loop.submit("r2", 1, [])
    loop.submit("r1", 4, [request("b")])  # overtaken on the way
    wait_until(lambda: dict(loop.report.last_submit_seq) == {"r1": 5, "r2": 1})
    wait_until(lambda: loop.report.num_running + loop.report.num_waiting == 2)
    loop.forget_router("r1")
    wait_until(lambda: dict(loop.report.last_submit_seq) == {"r2": 1})
    executor.gate.set()


def test_a_change_of_pressure_is_told_before_a_report_is_due(running: list[EngineLoop]) -> None:
    executor, sink, hurried = HeldExecutor(), Sink(), list[tuple[float, int]]()
    _, loop = make_engine(executor, worker_config(heartbeat_s=60.0))
    running.append(loop)
    loop.start(sink, lambda: hurried.append((time.monotonic(), loop.report.headroom_tokens)))
    time.sleep(0.05)
    for i in range(8):  # they come and go: memory and queue change all the time
        loop.submit("router", i, [request(f"r{i}", 100 + 50 * i, prompt_len=300)])
    wait_until(lambda: len(sink.finished()) == 8)
    assert len(hurried) >= 2
    assert min(headroom for _, headroom in hurried) < loop.report.num_blocks * 16
    gaps = [b[0] - a[0] for a, b in itertools.pairwise(hurried)]
    assert min(gaps) > 0.9 * HURRY_PERIOD_S
    seen = len(hurried)
    time.sleep(0.1)
    assert len(hurried) <= seen + 1  # nothing changes any more


def test_a_step_takes_as_long_as_it_shall_at_least(running: list[EngineLoop]) -> None:
    executor, sink = HeldExecutor(0.0), Sink()
    _, loop = make_engine(executor, worker_config(min_step_s=0.02))
    running.append(loop)
    loop.start(sink)
    begun = time.monotonic()
    loop.submit("router", 0, [request("a", 10)])
    wait_until(lambda: sink.finished() == {"a"})
    assert time.monotonic() - begun >= 0.2
    assert sink.tokens()["a"] == expected_tokens(request("a", 10))


def test_stop_ends_both_threads_and_closes_the_executor() -> None:
    others = set(threading.enumerate())
    executor, sink = HeldExecutor(0.01), Sink()
    _, loop = make_engine(executor, worker_config())
    loop.start(sink)
    loop.submit("router", 0, [request("a", 900)])  # 9 s
    wait_until(lambda: len(sink.steps) > 2)
    assert loop.stop(5)
    assert loop.state == "stopped"
    assert executor.closed
    names = ("ellm-engine", "ellm-step")
    wait_until(lambda: not [t for t in set(threading.enumerate()) - others if t.name in names])
    _, unborn = make_engine(HeldExecutor(), worker_config())
    assert unborn.stop(1)
