"""What a report says beside load: where the KV of admitted requests is, what that costs, who is in time."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from support.engine_driver import COSTS, LIMITS, EngineDriver, plain, request
from support.random_residency import RandomResidency

from ellm.worker.api.config import SchedulerConfig, WorkerConfig
from ellm.worker.api.cost_model import CostModel, StepFeatures
from ellm.worker.api.report import WorkerReport
from ellm.worker.engine.core import EngineCore
from ellm.worker.engine.load import Load
from ellm.worker.engine.sequence import Sequence
from ellm.worker.executor.simulated_link import LinkSpeed

ROOMY = replace(LIMITS, num_blocks=96, num_host_blocks=40, num_transient_blocks=12, block_bytes=1000)


def parts(report: WorkerReport) -> int:
    return (
        report.host_tokens + report.dropped_now_tokens + report.recomputing_tokens + report.streaming_tokens
    )


def held_nowhere(driver: EngineDriver) -> int:
    """Tokens of admitted requests whose KV was computed once and lies in no block of theirs now, counted
    block by block."""
    state = driver.core._state
    size, missing = state.block_size, 0
    for seq in (*state.running, *state.parked):
        valid = set(range(seq.num_computed))
        if seq.gap is not None:
            valid |= set(range(seq.gap.ready * size, seq.gap.end * size))
        if seq.hole is not None:
            valid -= set(range(seq.hole.first * size, seq.hole.end * size))
        missing += len(set(range(seq.high_water)) - valid)
    return missing


def test_every_uncached_token_is_counted_once_by_what_becomes_of_it() -> None:
    seen = dict.fromkeys(("host", "dropped_now", "recomputing", "streaming"), 0)
    for seed in range(4):
        driver = EngineDriver(
            ROOMY, scheduler=plain(max_step_tokens=200), policy=RandomResidency(seed), link=LinkSpeed(20e3)
        )
        for i in range(10):
            driver.add(request(f"r{i}", 20 + 3 * i, seed=i, max_tokens=60, ignore_eos=True))
        while driver.core.has_work:
            driver.turn()
            report = driver.core.report(driver.now)
            assert parts(report) == report.uncached_tokens == held_nowhere(driver)
            known = report.running_tokens + report.parked_tokens
            assert report.uncached_token_ratio == (report.uncached_tokens / known if known else 0.0)
            assert (report.recompute_debt_s > 0) == (report.uncached_tokens - report.streaming_tokens > 0)
            assert 0 <= report.host_blocks_used <= report.num_host_blocks == 40
            for name in seen:
                seen[name] += getattr(report, f"{name}_tokens")
        report = driver.core.report(driver.now)
        assert (report.uncached_tokens, report.recompute_debt_s) == (0, 0.0)
        holes = sum(e.num_tokens for plan in driver.plans for e in plan.entries if e.recompute)
        assert report.hole_tokens == holes > 0
        assert report.streamed_tokens == 4 * sum(len(plan.streams) for plan in driver.plans)
    assert min(seen.values()) > 0, seen


def test_dropped_tokens_cost_what_the_cost_model_says() -> None:
    core = EngineCore(LIMITS, WorkerConfig(scheduler=plain(max_step_tokens=32)), cost_model=COSTS)
    state = core._state
    seq = Sequence(request("r", 80), 0, frozenset())
    seq.high_water = 80
    seq.num_computed = 16
    state.parked.append(seq)
    report = core.report(0.0)
    assert (report.parked_tokens, report.uncached_tokens, report.dropped_now_tokens) == (80, 64, 64)
    chunk = COSTS.predict(StepFeatures(32, 0, 80, 32 * 80 // 2, 0)) - COSTS.predict(
        StepFeatures(0, 0, 0, 0, 0)
    )
    assert report.recompute_debt_s == pytest.approx(2 * chunk)


def test_the_prefill_rate_is_that_of_steps_with_prompts() -> None:
    known = EngineCore(
        LIMITS,
        WorkerConfig(scheduler=plain(max_step_tokens=100)),
        cost_model=CostModel.known(overhead_s=0.01, row_s=1e-4),
    )
    assert known.report(0.0).prefill_rate_tok_s == pytest.approx(100 / 0.02)  # before any step
    driver = EngineDriver(scheduler=plain(max_step_tokens=100))
    assert driver.core.report(0.0).prefill_rate_tok_s == 0.0
    driver.add(request("long", 100, max_tokens=20, ignore_eos=True))
    driver.turn()
    took = driver.now
    assert driver.core.report(driver.now).prefill_rate_tok_s == pytest.approx(100 / took)
    driver.run()  # steps without a prompt say nothing of it
    assert driver.core.report(driver.now).prefill_rate_tok_s == pytest.approx(100 / took)


def test_slack_and_attainment_are_of_those_with_a_promise() -> None:
    driver = EngineDriver(scheduler=SchedulerConfig(policy="full-chunked", max_num_seqs=8), late=False)
    driver.add(request("free", 10, max_tokens=4, ignore_eos=True))
    driver.turn()
    report = driver.core.report(driver.now)
    assert (report.slack_s, report.slo_attainment, report.max_running) == ((0.0, 0.0, 0.0), 1.0, 8)
    driver.add(request("easy", 10, max_tokens=20, ignore_eos=True, tpot_slo_s=1.0))
    driver.add(request("hard", 10, max_tokens=20, ignore_eos=True, tpot_slo_s=0.001))
    for _ in range(8):
        driver.turn()
    least, middle, most = driver.core.report(driver.now).slack_s
    assert least < 0.0 < most
    assert least < middle < most
    driver.run()
    assert driver.core.report(driver.now).slo_attainment == 0.5
    assert driver.core.report(driver.now + 100.0).slo_attainment == 1.0  # long ago


def test_pressure_changes_with_memory_and_with_those_who_wait() -> None:
    driver = EngineDriver(scheduler=plain(max_num_seqs=1))
    idle = driver.core.pressure
    driver.add(request("a", 100, max_tokens=20, ignore_eos=True))
    queued = driver.core.pressure
    driver.turn()
    running = driver.core.pressure
    assert len({idle, queued, running}) == 3
    driver.add(request("b", 10, seed=1, max_tokens=20, ignore_eos=True))
    assert driver.core.pressure not in {idle, running}


def test_memory_that_hovers_at_a_line_is_no_news_and_its_end_is() -> None:
    pool = SimpleNamespace(num_available=800, num_blocks=800)
    load = Load(SimpleNamespace(pool=pool, waiting=(), parked=(), limits=LIMITS))  # type: ignore[arg-type]

    def level(num_available: int) -> int:
        pool.num_available = num_available
        return load.pressure()[0]

    assert level(800) == 8
    assert {level(n) for n in (699, 701, 690, 710, 680, 720)} == {8}
    assert {level(n) for n in (670, 701, 720)} == {7}
    assert level(730) == 8
    assert [level(n) for n in (320, 10, 0)] == [4, 1, 0]
    assert level(400) == 4


def test_the_first_output_says_how_long_its_request_waited() -> None:
    driver = EngineDriver(scheduler=plain(max_num_seqs=1))
    driver.add(request("a", 10, max_tokens=5, ignore_eos=True))
    driver.add(request("b", 10, seed=1, max_tokens=5, ignore_eos=True))
    driver.run()
    waited = {name: [output.queue_time_s for output in outputs] for name, outputs in driver.outputs.items()}
    assert waited["a"] == [0.0] * 5
    assert waited["b"][0] > 0.04  # five steps of 10 ms
    assert waited["b"][1:] == [0.0] * 4
