"""Whatever is parked, released, saved, loaded and lost: the tokens are those of a roomy engine."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engine_driver import LIMITS, EngineDriver, plain, request, run_alone
from support.engine_scenarios import Setting, make_script, make_setting, output_length, play
from support.random_residency import RandomResidency

from ellm.worker.executor.simulated_link import LinkSpeed


def with_host(setting: Setting, rng: Random) -> Setting:
    blocks = rng.choice([0, 3, 20, 200])
    transient = rng.choice([0, 5, 100])
    limits = replace(
        setting.limits,
        num_host_blocks=blocks,
        block_bytes=1000 if blocks else 0,
        num_transient_blocks=transient,
    )
    return replace(setting, limits=limits)


def play_at_random(seed: int) -> EngineDriver:
    """One script under random residency, each stream compared with that of the request alone."""
    rng = Random(seed)
    setting = with_host(make_setting(rng, rng.choice([1.0, 1.3, 2.0, 4.0])), rng)
    script = make_script(rng, rng.randint(1, 8), setting.max_total)
    failing = rng.choice([0.0, 0.0, 0.2, 1.0])
    fails = Random(seed + 1)
    driver = play(
        setting,
        script,
        patience=40,
        policy=RandomResidency(seed),
        link=LinkSpeed(bytes_per_s=10 ** rng.uniform(3.5, 7)),
        copy_fails=lambda copy: fails.random() < failing,
    )
    for arrival in script:
        name = arrival.request.request_id
        if driver.reasons[name] == "abort":
            continue
        alone = run_alone(arrival.request, setting.limits, output_length)
        assert driver.streams[name] == alone.streams[name], name
        assert driver.reasons[name] == alone.reasons[name], name
    return driver


@settings(max_examples=150)
@given(st.integers(0, 2**32))
def test_tokens_do_not_depend_on_residency(seed: int) -> None:
    driver = play_at_random(seed)
    state = driver.core._state
    assert not driver.core.has_work
    assert state.pool.num_available == state.pool.num_blocks
    if state.host is not None:
        assert state.host.num_available == state.host.num_blocks


def test_the_scripts_meet_what_they_are_for() -> None:
    """Parks, restores, saves, loads, drops, recompute rows and streams happen in a handful of scripts."""
    totals = {"num_parks": 0, "num_restores": 0, "dropped_tokens": 0, "saved_tokens": 0, "loaded_tokens": 0}
    holes = streams = 0
    for seed in range(80):
        driver = play_at_random(seed)
        holes += sum(entry.recompute for plan in driver.plans for entry in plan.entries)
        streams += sum(len(plan.streams) for plan in driver.plans)
        report = driver.core.report(0.0)
        for name in totals:
            totals[name] += getattr(report, name)
    assert min(*totals.values(), holes, streams) > 20, (totals, holes, streams)


@pytest.mark.parametrize("turns", [1500, pytest.param(25_000, marks=pytest.mark.slow)])
def test_a_long_walk_keeps_every_reference_count(turns: int) -> None:
    """Requests come, are parked, cut, saved, loaded, given holes, aborted and lost in copies without end.
    Pools, host and counts are checked after every half of a turn; each turn is some four operations."""
    rng, fails = Random(7), Random(8)
    limits = replace(LIMITS, num_blocks=30, num_host_blocks=40, block_bytes=1000, num_transient_blocks=12)
    driver = EngineDriver(
        limits,
        scheduler=plain(max_step_tokens=40, max_num_seqs=6),
        policy=RandomResidency(9),
        link=LinkSpeed(bytes_per_s=1e6),
        copy_fails=lambda copy: fails.random() < 0.05,
    )
    for turn in range(turns):
        if driver.core.report(0.0).num_waiting < 4:
            name = f"r{turn}"
            salt = rng.choice(["", "", "tenant"])
            driver.add(
                request(name, rng.randint(1, 50), seed=turn % 9, max_tokens=rng.randint(1, 50), salt=salt)
            )
        driver.turn()
        if rng.random() < 0.05:
            driver.abort(rng.choice(list(driver.core._state.live)))
    report = driver.core.report(0.0)
    assert min(report.num_parks, report.num_restores, report.saved_tokens, report.loaded_tokens) > turns // 50
    for name in list(driver.core._state.live):
        driver.abort(name)
    driver.run()
    state = driver.core._state
    assert state.pool.num_available == state.pool.num_blocks
    assert state.host is not None
    assert state.host.num_available == state.host.num_blocks
    assert len(state.transient) == 12
