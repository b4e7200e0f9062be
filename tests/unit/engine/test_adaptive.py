"""`adaptive`: nothing at all without pressure, slack under it."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean

import pytest
from support.engine_driver import LIMITS, EngineDriver, plain, request

from ellm.worker.api.config import SchedulerConfig
from ellm.worker.engine.plan import ModelLimits
from ellm.worker.engine.policies.adaptive import Adaptive

ROOMY = replace(LIMITS, num_blocks=1000)


def adaptive(**limits: object) -> SchedulerConfig:
    return SchedulerConfig(policy="adaptive", **limits)  # type: ignore[arg-type]


def test_without_pressure_it_plans_what_full_chunked_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same plans, and no step spends time on ranking anybody."""

    def replan(self: Adaptive, now: float) -> None:
        raise AssertionError("a plan was made, and there was no need")

    monkeypatch.setattr(Adaptive, "_replan", replan)
    plans = []
    for scheduler in (plain(tpot_slo_ms=100.0), adaptive(tpot_slo_ms=100.0)):
        driver = EngineDriver(ROOMY, scheduler=scheduler, prefix_caching=True)
        for i in range(20):
            driver.add(request(f"r{i}", 5 + i, seed=i, max_tokens=10 + i, ignore_eos=True))
            driver.turn()
        driver.run()
        plans.append([(p.entries, p.new, p.released) for p in driver.plans])
    assert plans[0] == plans[1]


def burst(scheduler: SchedulerConfig) -> tuple[float, list[float]]:
    """Seventy requests decode, ten have just started, when forty prompts of 90 tokens come: mean seconds to
    the first token of these, and of each step until all have theirs."""
    driver = EngineDriver(starved(2300, 400), scheduler=scheduler, check=False)
    for i in range(70):
        driver.add(request(f"old{i}", 5, seed=i, max_tokens=110, ignore_eos=True))
    for _ in range(30):
        driver.turn()
    for i in range(10):
        driver.add(request(f"middle{i}", 60, seed=i, max_tokens=60, ignore_eos=True))
    while not driver.streams["middle9"]:
        driver.turn()
    names, since, steps = [f"new{i}" for i in range(40)], driver.now, []
    for i, name in enumerate(names):
        driver.add(request(name, 90, seed=i, max_tokens=30, ignore_eos=True))
    first: dict[str, float] = {}
    while len(first) < len(names):
        began = driver.now
        driver.turn()
        steps.append(driver.now - began)
        first |= {name: driver.now - since for name in names if driver.streams[name] and name not in first}
    return fmean(first.values()), steps


def test_a_burst_that_is_admitted_waits_no_longer_than_it_must() -> None:
    """Who has just started has no slack yet. Prompts got nothing but spare rows for it, although steps were
    far shorter than a token may take: first tokens came 2.5 times as late as without any care."""
    slo_s = 0.08
    ours, steps = burst(adaptive(tpot_slo_ms=1000 * slo_s))
    theirs, careless = burst(plain(tpot_slo_ms=1000 * slo_s))
    assert ours <= 1.1 * theirs + 0.05
    assert max(steps) <= slo_s < max(careless)


def starved(num_blocks: int, host_blocks: int = 0) -> ModelLimits:
    return replace(LIMITS, num_blocks=num_blocks, num_host_blocks=host_blocks, block_bytes=1000)


def test_a_newcomer_does_not_wait_for_one_that_is_ahead() -> None:
    """With an SLO of many steps, whoever has run for a while is seconds ahead; its memory goes to a newcomer
    at once, where first come first served lets it wait for an end."""
    waits = {}
    for name, scheduler in (("fcfs", plain(tpot_slo_ms=500.0)), ("slack", adaptive(tpot_slo_ms=500.0))):
        driver = EngineDriver(starved(26, 400), scheduler=scheduler)
        for i in range(2):
            driver.add(request(f"old{i}", 20, seed=i, max_tokens=55, ignore_eos=True))
        for _ in range(20):
            driver.turn()
        driver.add(request("new", 40, seed=9, max_tokens=5, ignore_eos=True))
        since = driver.now
        while not driver.streams["new"]:
            driver.turn()
        waits[name] = driver.now - since
        driver.run()
    assert waits["slack"] < 0.1
    assert waits["fcfs"] > 2 * waits["slack"]


def test_a_better_priority_is_parked_last() -> None:
    driver = EngineDriver(starved(40, 400), scheduler=adaptive(tpot_slo_ms=200.0))
    for i in range(3):
        driver.add(request(f"r{i}", 24, seed=i, max_tokens=60, ignore_eos=True, priority=i))
    parked: set[str] = set()
    while driver.core.has_work:
        driver.turn()
        parked |= {seq.request.request_id for seq in driver.core._state.parked}
    assert parked
    assert "r0" not in parked


def test_requests_without_an_slo_all_come_to_their_end() -> None:
    driver = EngineDriver(starved(40), scheduler=adaptive())
    for i in range(12):
        driver.add(request(f"r{i}", 10 + i, seed=i, max_tokens=40, ignore_eos=True))
    driver.run()
    assert set(driver.reasons.values()) == {"length"}


def test_blocks_of_a_later_run_are_found() -> None:
    """The first blocks of a prompt are evicted, later ones are not: only the missing stretch is computed."""
    limits = replace(LIMITS, num_blocks=12)
    driver = EngineDriver(limits, scheduler=plain())
    first = request("first", 41, max_tokens=2, ignore_eos=True)
    driver.add(first)
    driver.run()
    state = driver.core._state
    hashes = [state.pool.index._hash_of[block] for block in range(12)]
    front = [block for block, name in enumerate(hashes) if name is not None][:3]
    for block in front:  # as an eviction would, from the front
        del state.pool._cached[block]
        state.pool.index.forget(block)
        state.pool._free.append(block)
    state.check([])
    computed = sum(plan.num_rows for plan in driver.plans)
    driver.add(replace(first, request_id="second"))
    driver.run()
    assert driver.streams["second"] == driver.streams["first"]
    rows = sum(plan.num_rows for plan in driver.plans) - computed
    assert rows == 3 * 4 + 1 + 1  # three blocks, the last token of the prompt, one output


def test_an_abort_counts_as_an_end_of_the_output() -> None:
    """Stop strings are matched by the router, which aborts: lengths would else look longer than they are."""
    driver = EngineDriver(starved(40), scheduler=adaptive())
    policy = driver.core._policy
    assert isinstance(policy, Adaptive)
    before = policy.forecast.lengths.survival(40)
    for i in range(30):
        driver.add(request(f"r{i}", 5, seed=i, max_tokens=60))
        while len(driver.streams[f"r{i}"]) < 10:
            driver.turn()
        driver.abort(f"r{i}")
    assert policy.forecast.lengths.survival(40) < 0.5 * before


@pytest.mark.parametrize(
    ("bytes_per_s", "loads", "computes"), [(1e3, False, True), (1e12, True, False)], ids=["slow", "fast"]
)
def test_a_restore_takes_one_path_where_the_other_gains_little(
    bytes_per_s: float, loads: bool, computes: bool
) -> None:
    """A link that is slow beside the rows is not used, and one that is fast is used alone."""
    driver = EngineDriver(starved(26, 400), scheduler=adaptive(tpot_slo_ms=500.0))
    policy = driver.core._policy
    assert isinstance(policy, Adaptive)
    policy.traffic.load_cost.observe(1000, 1000 / bytes_per_s)
    for i in range(3):
        driver.add(request(f"r{i}", 20, seed=i, max_tokens=55, ignore_eos=True))
    driver.run()
    totals = driver.core._state.totals
    assert totals.num_restores > 0
    assert (totals.loaded_tokens > 0) is loads
    # What the host never had is computed in any case.
    assert (totals.recomputed_tokens > totals.dropped_tokens) is computes
