"""Every policy, under any script, pool and host tier: the tokens are those of a roomy engine, everything
comes to its end, and nothing is left behind."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, lru_cache
from random import Random

import pytest
from support.engine_driver import EngineDriver, run_alone
from support.engine_scenarios import make_script, make_setting, output_length, play

from ellm.worker.api.request import EngineRequest
from ellm.worker.engine.plan import ModelLimits
from ellm.worker.engine.policies import POLICIES
from ellm.worker.executor.simulated_link import LinkSpeed

SCRIPTS, MORE = range(40), range(40, 120)


@cache  # the policies have their scripts in common
def said_alone(request: EngineRequest, limits: ModelLimits) -> tuple[list[int], str]:
    """Its tokens in an engine with room for everything, and how it ended."""
    alone = run_alone(request, limits, output_length)
    return alone.streams[request.request_id], alone.reasons[request.request_id]


@lru_cache(len(SCRIPTS))  # of one policy
def play_with(policy: str, seed: int) -> EngineDriver:
    rng = Random(seed)
    setting = make_setting(rng, rng.choice([1.0, 1.3, 2.0, 4.0]))
    host_blocks = rng.choice([3, 20, 200] if "stream=" in policy else [0, 3, 20, 200])
    limits = replace(
        setting.limits,
        num_host_blocks=host_blocks,
        block_bytes=1000 if host_blocks else 0,
        num_transient_blocks=rng.choice([5, 50]),
    )
    slo_ms = rng.choice([None, 5.0, 13.0, 20.0, 100.0])
    scheduler = replace(setting.scheduler, policy=policy, tpot_slo_ms=slo_ms)
    setting = replace(setting, limits=limits, scheduler=scheduler)
    script = make_script(rng, rng.randint(1, 12), setting.max_total)
    link = LinkSpeed(bytes_per_s=10 ** rng.uniform(3.5, 7))
    driver = play(setting, script, patience=20, link=link)
    for arrival in script:
        name = arrival.request.request_id
        if driver.reasons[name] != "abort":
            assert (driver.streams[name], driver.reasons[name]) == said_alone(arrival.request, limits), name
    return driver


def test_adaptive_parks_saves_and_restores_in_these_scripts() -> None:
    totals = {"num_parks": 0, "num_restores": 0, "saved_tokens": 0, "loaded_tokens": 0}
    for seed in SCRIPTS:
        report = play_with("adaptive", seed).core.report(0.0)
        for name in totals:
            totals[name] += getattr(report, name)
    assert min(totals.values()) > 0, totals


LITERAL = ["literal(0)", "literal(0.3)", "literal(0.6, stream=0.5)", "literal(0.5, stream=1.0)"]


@pytest.mark.parametrize("policy", [*sorted(set(POLICIES) - {"literal"}), *LITERAL])
@pytest.mark.parametrize(
    "scripts", [SCRIPTS, pytest.param(MORE, marks=pytest.mark.slow)], ids=["some", "more"]
)
def test_tokens_do_not_depend_on_the_policy(policy: str, scripts: range) -> None:
    for seed in scripts:
        driver = play_with(policy, seed)
        state = driver.core._state
        assert not driver.core.has_work
        assert state.pool.num_available == state.pool.num_blocks
        assert state.host is None or state.host.num_available == state.host.num_blocks
