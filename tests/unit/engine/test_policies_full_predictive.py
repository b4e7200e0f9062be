"""`full-predictive`: who starts depends on what outputs have been like, on deadlines, and on how it went."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
from support.engine_driver import COSTS, LIMITS, EngineDriver, request

from ellm.worker.api.config import CacheConfig, SchedulerConfig
from ellm.worker.engine.plan import NewSequence
from ellm.worker.engine.policies.full_predictive import FullPredictive
from ellm.worker.engine.residency import Residency
from ellm.worker.engine.sequence import Sequence
from ellm.worker.engine.state import EngineState


def driver_of(num_blocks: int = 64, *, length: int | None = None, **scheduler: object) -> EngineDriver:
    """Requests say end-of-text after `length` tokens."""
    base = SchedulerConfig(policy="full-predictive", pipeline_depth=1)
    config = replace(base, **scheduler)  # type: ignore[arg-type]
    return EngineDriver(
        replace(LIMITS, num_blocks=num_blocks),
        scheduler=config,
        prefix_caching=False,
        output_length=None if length is None else lambda new: length,
    )


def test_certain_growth_is_reserved() -> None:
    """Each request will hold 4 + 60 tokens of 256: three at a time, and nobody is ever stopped."""
    preemptions = {}
    for name in ("full-chunked", "full-predictive"):
        driver = driver_of(policy=name)
        for i in range(8):
            driver.add(request(f"r{i}", 4, seed=i, max_tokens=60, ignore_eos=True))
        driver.run()
        preemptions[name] = driver.core.report(driver.now).num_preemptions
    assert preemptions["full-predictive"] == 0
    assert preemptions["full-chunked"] > 0
    assert max(len(plan.entries) for plan in driver.plans) == 4  # as one ends, the next comes


def test_short_answers_let_more_in() -> None:
    """The same 100 tokens allowed each: after a while of answers of 5 tokens, more run at once."""
    driver = driver_of(length=5)
    running = []
    for i in range(120):
        driver.add(request(f"r{i}", 8, seed=i, max_tokens=100))
    while driver.core.has_work:
        driver.turn()
        running.append(driver.core.report(driver.now).num_running)
    early, late = max(running[:4]), max(running[-40:])
    assert late >= 2 * early


def test_a_deadline_bounds_the_batch() -> None:
    """A step costs 0.01 s and 0.1 ms a row: 0.97 * 0.985 of 12 ms leave 14 rows, prompts among them."""
    most = {}
    for slo in (None, 12.0):
        driver = driver_of(2048, tpot_slo_ms=slo)
        for i in range(40):
            driver.add(request(f"r{i}", 4, seed=i, max_tokens=60, ignore_eos=True))
            driver.turn()  # the cost model learns on the way
        driver.run()
        most[slo] = max(plan.num_decode for plan in driver.plans[8:])
    assert most[None] == 40
    assert 8 <= most[12.0] <= 15


def test_nothing_hangs_where_nothing_fits() -> None:
    """A deadline that no step meets, prompts that fill the pool, and a request from elsewhere: all end."""
    driver = driver_of(24, tpot_slo_ms=0.01)
    for i in range(10):
        driver.add(request(f"r{i}", 60, seed=i, max_tokens=30, ignore_eos=bool(i % 2)))
    driver.add(request("moved", 10, output_ids=tuple(range(1, 41)), max_tokens=60))
    driver.run(3000)
    assert len(driver.reasons) == 11


def test_late_requests_make_it_careful() -> None:
    """Late they are; a deadline that a lone request could not keep would say nothing."""
    for slo_ms, careful in ((0.01, False), (10.2, True)):
        driver = driver_of(length=20, tpot_slo_ms=slo_ms)
        policy = driver.core._scheduler._policy
        assert isinstance(policy, FullPredictive)
        for seq in range(32):
            driver.add(request(f"r{seq}", 4, seed=seq, max_tokens=40))
        for live in driver.core._state.live.values():
            live.late = True
        driver.run()
        assert (policy.forecast.safety.z > 1.0) is careful


def test_what_it_learns_is_what_happened() -> None:
    driver = driver_of(length=70, max_num_seqs=4)
    for i in range(40):
        driver.add(request(f"r{i}", 10, seed=i, max_tokens=100 if i % 2 else 50))
    driver.run()
    policy = driver.core._scheduler._policy
    assert isinstance(policy, FullPredictive)
    lengths = policy.forecast.lengths
    assert lengths.survival(64) > 0.9  # those cut at 50 did not end there
    assert lengths.survival(96) < 0.35
    assert policy.forecast.step_cost.prefill_per_decode < 10 / 50


@pytest.mark.parametrize("shift", [1, 7])
def test_lengths_to_come_decide_nothing_now(shift: int) -> None:
    """Two runs whose answers differ only in length make the same plans until the first answer ends."""

    def length(new: NewSequence) -> int:
        return 30 + (new.prompt_ids[0] * shift) % 17

    plans = []
    for rule in (length, lambda new: 90 - length(new)):
        driver = EngineDriver(
            LIMITS,
            scheduler=SchedulerConfig(policy="full-predictive", pipeline_depth=1, tpot_slo_ms=20.0),
            prefix_caching=False,
            output_length=rule,
        )
        for i in range(12):
            driver.add(request(f"r{i}", 3 + i, seed=i, max_tokens=100))
        while not driver.reasons:
            driver.turn()
        plans.append([[(e.seq_id, e.start, e.num_tokens) for e in plan.entries] for plan in driver.plans])
    same = min(map(len, plans)) - 1
    assert same >= 29
    assert plans[0][:same] == plans[1][:same]


def calls_of_a_plan(num_running: int) -> int:
    """Of functions, Python's and C's: what a plan costs on any machine."""
    config = SchedulerConfig(policy="full-predictive", tpot_slo_ms=50.0)
    limits = replace(LIMITS, num_blocks=40_000, block_size=16, max_model_len=8192)
    state = EngineState(limits, config, CacheConfig())
    policy = FullPredictive()
    policy.attach(state, Residency(state), COSTS)
    for i in range(num_running + 1):
        seq = Sequence(request(f"r{i}", 200 + i, max_tokens=4000), i, frozenset({0}))
        seq.tpot_slo_s = 0.05
        seq.tokens.extend([1] * (11 * i))
        state.running.append(seq)
    newcomer = state.running.pop()
    policy.may_admit(state, newcomer, 20, 0.0)
    count = 0

    def seen(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(seen)
    try:
        policy.may_admit(state, newcomer, 20, 1.0)
    finally:
        sys.setprofile(None)
    return count


def test_a_plan_costs_a_few_calls_per_sequence() -> None:
    few, many = calls_of_a_plan(16), calls_of_a_plan(256)
    assert 256 < many < 10 * 256
    assert many < 16 * few  # no more than in proportion
