"""The baselines in the reference setting (13B on an A100-80G, 600 requests of ShareGPT lengths at 50 per
second, SLO 50 ms) give the figures of an independent simulator that was written before this one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ellm.loadtest.sim.run import prepare, simulate, simulate_all
from ellm.loadtest.sim.setting import Setting

SETTING = Setting(rate=50.0, num_requests=600, tpot_slo_ms=50.0)
# policy: tokens/s, goodput, attainment, preemptions, recomputed per output token; means of ten seeds
REFERENCE = {
    "full-chunked": (932, 371, 0.310, 1_200, 0.60),
    "full-recompute": (922, 314, 0.255, 1_180, 0.61),
}
HOSTED = {"full-swap": (942, 342, 0.263, 1_180, 0.0), "hcache": (975, 451, 0.371, 1_210, 0.0)}
TUNED = "full-recompute(max_num_seqs=40)"  # goodput 896 at attainment 0.977


def figures(one: dict[str, Any]) -> tuple[float, ...]:
    keys = ("throughput_tok_s", "goodput_tok_s", "slo_attainment", "preemptions")
    return tuple(one[key] for key in (*keys, "recomputed_per_output_token"))


@pytest.mark.parametrize("policy", REFERENCE)
def test_one_seed_is_near(policy: str) -> None:
    """One seed scatters: goodput by a tenth. On the way the cost is looked at: 3,000 requests of 1,276 tokens
    in three minutes would be 47 microseconds for each."""
    one = simulate(SETTING, policy, 1)
    rate, goodput, attainment, preemptions, recomputed = REFERENCE[policy]
    assert figures(one) == (
        pytest.approx(rate, rel=0.03),
        pytest.approx(goodput, rel=0.25),
        pytest.approx(attainment, rel=0.25),
        pytest.approx(preemptions, rel=0.15),
        pytest.approx(recomputed, rel=0.15),
    )
    assert one["throughput_of_bound"] == pytest.approx(0.885, abs=0.02)
    assert one["cpu_us_per_token"]["all"] < 40
    assert one["cost_model_error"] < 0.05


def test_recompute_in_every_step_loses_what_the_arithmetic_says() -> None:
    """Each token of a hole costs a row of 101 microseconds in every step: with 5 % of a full memory uncached,
    2,950 rows or 0.3 s beside the 0.04 s of the step itself. On paper 144 tokens/s, of 968."""
    setting = replace(SETTING, num_requests=100, max_step_tokens=32_768)
    literal = simulate(setting, "literal(0.05)", 1)
    assert 100 < literal["throughput_tok_s"] < 200
    assert literal["goodput_tok_s"] == 0.0
    assert literal["uncached_ratio_mean"] == pytest.approx(0.05, abs=0.01)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_seeds_are_the_reference() -> None:
    seeds = list(range(1, 11))
    result = simulate_all(prepare(SETTING, [*REFERENCE, TUNED], seeds), jobs=2)["policies"]
    result |= simulate_all(prepare(replace(SETTING, host_gb=64.0), [*HOSTED], seeds), jobs=2)["policies"]
    for policy, (rate, goodput, attainment, preemptions, recomputed) in (REFERENCE | HOSTED).items():
        # The last block of one that was moved is computed again unless it is full.
        assert figures(result[policy]) == (
            pytest.approx(rate, rel=0.03),
            pytest.approx(goodput, rel=0.15),
            pytest.approx(attainment, rel=0.15),
            pytest.approx(preemptions, rel=0.12),
            pytest.approx(recomputed, rel=0.12, abs=0.02),
        )
    tuned = result[TUNED]
    assert tuned["goodput_tok_s"] == pytest.approx(896, rel=0.03)
    assert tuned["slo_attainment"] == pytest.approx(0.977, abs=0.02)
