"""When a sequence ends, what its last output says, and what is dropped after it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.engine_driver import EOS, LIMITS, EngineDriver, plain, request

from ellm.worker.api.config import WorkerConfig
from ellm.worker.api.request import EngineRequest
from ellm.worker.engine.core import EngineCore
from ellm.worker.engine.plan import BatchPlan, StepResult

DEPTHS = pytest.mark.parametrize("depth", [1, 2])


def play(tokens: list[int], depth: int, one: EngineRequest) -> tuple[list[int], str | None, int | None]:
    """Run `one` with an executor that says exactly `tokens`; its stream, finish reason and stop token."""
    core = EngineCore(LIMITS, WorkerConfig(scheduler=plain(pipeline_depth=depth)))
    core.add_request(one, 0.0)
    said, stream, plans = 0, list[int](), list[BatchPlan]()
    reason, stop = None, None
    while core.has_work:
        while (plan := core.begin_step(0.0)) is not None:
            plans.append(plan)
        plan = plans.pop(0)
        count = sum(entry.samples for entry in plan.entries)
        result = StepResult(plan.step, tuple(tokens[said : said + count]), 0.01)
        said += count
        for output in core.finish_step(plan, result, 0.0):
            assert reason is None, "an output after the last"
            stream.extend(output.token_ids)
            reason, stop = output.finish_reason, output.stop_token_id
        core.check()
    assert said <= len(stream) + depth - 1  # no more than one step too far
    return stream, reason, stop


@DEPTHS
def test_max_tokens_is_exact_and_nothing_is_planned_past_it(depth: int) -> None:
    stream, reason, stop = play([5, 6, 7], depth, request("r", max_tokens=3))
    assert (stream, reason, stop) == ([5, 6, 7], "length", None)


@DEPTHS
def test_end_of_text_ends_and_what_was_planned_beyond_is_dropped(depth: int) -> None:
    stream, reason, stop = play([5, EOS, 9, 9], depth, request("r", max_tokens=10))
    assert (stream, reason, stop) == ([5, EOS], "stop", EOS)


@DEPTHS
def test_end_of_text_can_be_ignored_and_a_stop_token_not(depth: int) -> None:
    one = request("r", max_tokens=10, ignore_eos=True, stop_token_ids=(7, 8))
    assert play([EOS, 5, 8, 9, 9], depth, one) == ([EOS, 5, 8], "stop", 8)


@DEPTHS
def test_nothing_stops_before_min_tokens(depth: int) -> None:
    one = request("r", max_tokens=10, min_tokens=3, stop_token_ids=(7,))
    assert play([EOS, 7, 7, 9, 9], depth, one) == ([EOS, 7, 7], "stop", 7)


@DEPTHS
def test_a_stop_token_in_the_last_place_is_a_stop(depth: int) -> None:
    assert play([5, EOS], depth, request("r", max_tokens=2)) == ([5, EOS], "stop", EOS)


@DEPTHS
def test_limits_of_a_moved_request_count_from_its_prompt(depth: int) -> None:
    one = request("r", max_tokens=5, min_tokens=4, output_ids=(9, 9))
    assert play([EOS, EOS, 9], depth, one) == ([EOS, EOS], "stop", EOS)
    assert play([7, 7, 7], depth, one) == ([7, 7, 7], "length", None)


def test_several_end_of_text_tokens() -> None:
    core = EngineCore(replace(LIMITS, eos_token_ids=(3, 4)), WorkerConfig())
    core.add_request(request("r"), 0.0)
    plan = core.begin_step(0.0)
    assert plan is not None
    (output,) = core.finish_step(plan, StepResult(plan.step, (4,), 0.01), 0.0)
    assert (output.finish_reason, output.stop_token_id) == ("stop", 4)


def test_a_prompt_can_be_scored_without_a_token() -> None:
    driver = EngineDriver(scheduler=plain(max_step_tokens=4))
    driver.add(request("r", 10, max_tokens=0, prompt_logprobs=1))
    driver.run()
    (output,) = driver.outputs["r"]
    assert (output.token_ids, output.finish_reason, output.output_index) == ((), "length", 0)
    assert output.prompt_logprobs is not None
    assert [score is None for score in output.prompt_logprobs] == [True] + [False] * 9


def test_prompt_scores_ignore_hits_and_come_once() -> None:
    driver = EngineDriver(scheduler=plain(max_step_tokens=8))
    driver.add(request("plain", 30, max_tokens=2))
    driver.run()
    driver.add(request("scored", 30, max_tokens=3, prompt_logprobs=0, ignore_eos=True))
    driver.run()
    first, *later = driver.outputs["scored"]
    assert first.prompt_logprobs is not None
    assert len(first.prompt_logprobs) == 30
    assert first.num_cached_tokens == 0
    assert all(output.prompt_logprobs is None for output in later)


def test_logprobs_come_with_every_token() -> None:
    driver = EngineDriver()
    driver.add(request("r", max_tokens=4, logprobs=2, ignore_eos=True))
    driver.run()
    for output in driver.outputs["r"]:
        assert output.logprobs is not None
        assert [len(score.top) for score in output.logprobs] == [2]


def test_a_failure_ends_everything_once() -> None:
    driver = EngineDriver(scheduler=plain(max_num_seqs=2))
    for i in range(4):
        driver.add(request(f"r{i}", seed=i, max_tokens=30, ignore_eos=True))
    for _ in range(3):
        driver.turn()
    driver.begin()
    outputs = {
        output.request_id: output for output in driver.core.fail_all("internal_error", "it broke", driver.now)
    }
    assert sorted(outputs) == ["r0", "r1", "r2", "r3"]
    for name, output in outputs.items():
        assert (output.finish_reason, output.error) == ("error", ("internal_error", "it broke"))
        assert output.output_index == len(driver.streams[name])
    assert driver.core.fail_all("internal_error", "again", driver.now) == []
    driver.core.check()
    report = driver.core.report(driver.now)
    assert not driver.core.has_work
    assert report.free_blocks + report.cached_blocks == report.num_blocks


def test_results_come_back_in_order_and_complete() -> None:
    core = EngineCore(LIMITS, WorkerConfig())
    core.add_request(request("r", max_tokens=9), 0.0)
    first, second = core.begin_step(0.0), core.begin_step(0.0)
    assert first is not None
    assert second is not None
    with pytest.raises(AssertionError, match="in order"):
        core.finish_step(second, StepResult(second.step, (5,), 0.01), 0.0)
    with pytest.raises(AssertionError, match="another step"):
        core.finish_step(first, StepResult(7, (5,), 0.01), 0.0)


@pytest.mark.parametrize("token_ids", [(), (5, 6)])
def test_a_result_has_one_token_for_each_row_that_samples(token_ids: tuple[int, ...]) -> None:
    core = EngineCore(LIMITS, WorkerConfig())
    core.add_request(request("r", max_tokens=9), 0.0)
    plan = core.begin_step(0.0)
    assert plan is not None
    with pytest.raises(AssertionError, match="tokens"):
        core.finish_step(plan, StepResult(plan.step, token_ids, 0.01), 0.0)


@pytest.mark.parametrize(("slo_ms", "late"), [(0.5, True), (10_000.0, False)])
@pytest.mark.parametrize("name", ["tpot_slo_ms", "ttft_slo_ms"])
def test_a_token_past_its_deadline_makes_a_request_late(name: str, slo_ms: float, late: bool) -> None:
    driver = EngineDriver(scheduler=plain(**{name: slo_ms}))
    driver.add(request("r", max_tokens=20, ignore_eos=True))
    seq = driver.core._state.live["r"]
    driver.run()
    assert seq.late is late
