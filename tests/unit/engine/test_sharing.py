"""Requests that share a prefix, deadlines that nobody could keep, and requests that come without end."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.engine_driver import LIMITS, EngineDriver, plain, request

from ellm.worker.api.config import SchedulerConfig
from ellm.worker.api.errors import ConfigError
from ellm.worker.api.request import EngineRequest, SamplingParams


@pytest.mark.parametrize("policy", ["adaptive", "full-predictive"])
def test_a_shared_prefix_counts_once(policy: str) -> None:
    """Sixty requests that share all but three tokens of their prompts run together, as without admission."""
    head = tuple(1 + i % 40 for i in range(100))
    most = {}
    for name in ("full-chunked", policy):
        scheduler = SchedulerConfig(policy=name, max_num_seqs=64, max_step_tokens=512)
        driver = EngineDriver(replace(LIMITS, num_blocks=200), scheduler=scheduler)
        sampling = SamplingParams(max_tokens=12, ignore_eos=True)
        driver.add(EngineRequest("first", (*head, 1, 2, 3), sampling))
        driver.turn()
        for i in range(59):
            driver.add(EngineRequest(f"r{i}", (*head, 1 + i % 40, 2, 4 + i // 40), sampling))
        most[name] = 0
        while driver.core.has_work:
            driver.turn()
            most[name] = max(most[name], driver.core.report(0.0).num_running)
    assert most["full-chunked"] > 30
    assert most[policy] > 0.6 * most["full-chunked"]


def test_a_deadline_that_nobody_could_keep_changes_nothing_for_others() -> None:
    """A step takes 10 ms at least: one request that wants 1 ms per token must not open the door to all."""
    most = {}
    for tight in (False, True):
        scheduler = SchedulerConfig(policy="adaptive", max_num_seqs=256, tpot_slo_ms=11.0)
        driver = EngineDriver(replace(LIMITS, num_blocks=2000), scheduler=scheduler)
        for i in range(150):
            slo = 0.001 if tight and i == 3 else None
            driver.add(request(f"r{i}", 30, seed=i, max_tokens=40, ignore_eos=True, tpot_slo_s=slo))
        most[tight] = 0
        while driver.core.has_work:
            driver.turn()
            most[tight] = max(most[tight], driver.core.report(0.0).num_running)
    assert most[True] <= 1.2 * most[False]


@pytest.mark.parametrize("slo_ms", [None, 13.0, 50.0])
@pytest.mark.parametrize("host_blocks", [0, 400])
def test_nobody_waits_for_ever_while_others_keep_coming(slo_ms: float | None, host_blocks: int) -> None:
    """Seats and blocks are short and requests come without end: whoever came is done within bounds."""
    limits = replace(LIMITS, num_blocks=60, num_host_blocks=host_blocks, block_bytes=1000)
    scheduler = SchedulerConfig(policy="adaptive", max_num_seqs=4, max_step_tokens=64, tpot_slo_ms=slo_ms)
    driver = EngineDriver(limits, scheduler=scheduler, check=False)
    since: dict[str, float] = {}
    for turn in range(9000):
        if driver.core.report(0.0).num_waiting < 3:
            driver.add(request(f"r{turn}", 8, seed=turn % 50, max_tokens=30 + turn % 11, ignore_eos=True))
            since[f"r{turn}"] = driver.now
        driver.turn()
        for name in driver.reasons:
            since.pop(name, None)
    oldest = max(driver.now - at for at in since.values())
    assert len(driver.reasons) > 400
    assert oldest < 60.0, f"one has waited {oldest:.0f} of {driver.now:.0f} seconds"


@pytest.mark.parametrize(
    ("policy", "transient_blocks", "param"),
    [
        ("literal(0.3)", 0, "cache.transient_blocks"),
        ("literal(0.3, stream=0.5)", 8, "cache.host_bytes"),
    ],
)
def test_literal_says_what_it_lacks(policy: str, transient_blocks: int, param: str) -> None:
    limits = replace(LIMITS, num_transient_blocks=transient_blocks)
    with pytest.raises(ConfigError) as caught:
        EngineDriver(limits, scheduler=SchedulerConfig(policy=policy))
    assert caught.value.param == param
    EngineDriver(limits, scheduler=SchedulerConfig(policy="literal(0)"))


def test_waiting_for_copies_is_no_step() -> None:
    limits = replace(LIMITS, num_blocks=40, num_host_blocks=40, block_bytes=10**9)  # 40 ms a block
    scheduler = replace(plain(), policy="full-swap")
    driver = EngineDriver(limits, scheduler=scheduler)
    for i in range(4):
        driver.add(request(f"r{i}", 30, seed=i, max_tokens=40, ignore_eos=True))
    driver.run()
    report = driver.core.report(driver.now)
    assert report.num_steps == sum(bool(plan.entries) for plan in driver.plans)
