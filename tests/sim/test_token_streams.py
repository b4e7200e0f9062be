"""What comes out does not depend on how it was scheduled: pool, budget, depth, arrivals, aborts, moves."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from hypothesis import event, given, settings
from hypothesis import strategies as st
from support.engine_driver import EngineDriver, run_alone
from support.engine_scenarios import Arrival, Setting, make_script, make_setting, output_length, play


@st.composite
def scenarios(draw: st.DrawFn) -> tuple[Setting, list[Arrival]]:
    """The number of requests and the room shrink; the rest follows from a seed."""
    rng = Random(draw(st.integers(0, 2**32)))
    setting = make_setting(rng, draw(st.sampled_from([1.0, 1.0, 1.3, 2.0, 6.0])))
    return setting, make_script(rng, draw(st.integers(1, 16)), setting.max_total)


def assert_nothing_left(driver: EngineDriver) -> None:
    report = driver.core.report(driver.now)
    assert report.num_running == report.num_waiting == 0
    assert report.free_blocks + report.cached_blocks == report.num_blocks
    driver.core.check()  # with nobody left, every reference count must be 0


@settings(max_examples=200)
@given(scenarios())
def test_streams_equal_those_of_each_request_alone(scenario: tuple[Setting, list[Arrival]]) -> None:
    setting, script = scenario
    driver = play(setting, script)
    assert_nothing_left(driver)
    report = driver.core.report(driver.now)
    event(f"preempted: {report.num_preemptions > 0}, hit: {report.prefix_hits > 0}")
    event(f"depth {setting.scheduler.pipeline_depth}, preempted: {report.num_preemptions > 0}")
    for arrival in script:
        name = arrival.request.request_id
        alone = run_alone(arrival.request, setting.limits, output_length)
        if driver.reasons[name] == "abort":
            assert alone.streams[name][: len(driver.streams[name])] == driver.streams[name]
            continue
        assert driver.streams[name] == alone.streams[name]
        assert driver.reasons[name] == alone.reasons[name]
        ours, theirs = driver.outputs[name], alone.outputs[name]
        assert [o.logprobs for o in ours] == [o.logprobs for o in theirs]
        assert [o.prompt_logprobs for o in ours] == [o.prompt_logprobs for o in theirs]
        assert [o.stop_token_id for o in ours] == [o.stop_token_id for o in theirs]


@settings(max_examples=60)
@given(scenarios(), st.integers(0, 30))
def test_a_request_moved_to_another_worker_goes_on_as_it_would_have(
    scenario: tuple[Setting, list[Arrival]], cut: int
) -> None:
    setting, script = scenario
    resumed, expected = [], {}
    for arrival in script:
        alone = run_alone(arrival.request, setting.limits, output_length)
        stream = alone.streams[arrival.request.request_id]
        head = tuple(stream[: min(cut, len(stream) - 1)]) if stream else ()
        moved = replace(arrival.request, output_ids=head, attempt=1)
        resumed.append(Arrival(arrival.turn, moved, None))
        expected[moved.request_id] = (stream, alone.reasons[moved.request_id])
    driver = play(setting, resumed)
    assert_nothing_left(driver)
    for name, (stream, reason) in expected.items():
        assert (driver.streams[name], driver.reasons[name]) == (stream, reason)
        assert all(output.attempt == 1 for output in driver.outputs[name])


@settings(max_examples=30)
@given(scenarios())
def test_the_same_script_gives_the_same_plans(scenario: tuple[Setting, list[Arrival]]) -> None:
    setting, script = scenario
    first, second = play(setting, script), play(setting, script)
    assert [(p.new, p.released, p.num_rows) for p in first.plans] == [
        (p.new, p.released, p.num_rows) for p in second.plans
    ]
    assert [p.entries for p in first.plans] == [p.entries for p in second.plans]
    assert first.now == second.now
