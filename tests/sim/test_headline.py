"""The headline in small: overload under an SLO, and first tokens near saturation. Simulated, so the figures
are the same on every machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ellm.loadtest.sim.curve import LOOKS, POLICIES, goodput_curve
from ellm.loadtest.sim.headline import HOST_GB, NEAR_SATURATION, OURS, OVERLOAD, UNTUNED, WITH_HOST
from ellm.loadtest.sim.never_worse import CVS, GPUS, LOADS, MODELS, SLO_RATIOS, chessboard
from ellm.loadtest.sim.ratio_sweep import literal, starved, write_chats
from ellm.loadtest.sim.run import simulate

SEED = 1


def test_in_overload_it_keeps_the_slo_and_has_the_most_goodput() -> None:
    setting = replace(OVERLOAD, num_requests=200)
    hosted = replace(setting, host_gb=HOST_GB)
    ours = simulate(hosted, OURS, SEED)
    others = {policy: simulate(setting, policy, SEED) for policy in UNTUNED}
    others |= {policy: simulate(hosted, policy, SEED) for policy in WITH_HOST}
    goodput = {policy: one["goodput_tok_s"] for policy, one in others.items()}
    assert ours["slo_attainment"] >= 0.97
    assert ours["goodput_tok_s"] > 1.1 * max(goodput.values()), goodput
    assert ours["goodput_tok_s"] > 2 * goodput["full-recompute"]


def test_near_saturation_first_tokens_come_sooner() -> None:
    setting = replace(NEAR_SATURATION, rate=0.85, num_requests=250)
    ours = simulate(replace(setting, host_gb=HOST_GB), OURS, SEED)
    chunked = simulate(setting, "full-chunked", SEED)
    assert ours["slo_attainment"] >= 0.97
    assert ours["ttft_mean_s"] < 0.5
    assert chunked["ttft_mean_s"] > 5 * ours["ttft_mean_s"]


def test_recompute_in_every_step_pays_where_memory_is_a_few_hundred_tokens(tmp_path: Path) -> None:
    trace = tmp_path / "short-chats.csv"
    write_chats(trace)
    rates = {
        tokens: [
            simulate(replace(starved(trace, tokens), num_requests=100), literal(r), SEED)["throughput_tok_s"]
            for r in (0.0, 0.4)
        ]
        for tokens in (256, 2_048)
    }
    assert rates[256][1] > 1.3 * rates[256][0]
    assert rates[2_048][1] < 0.5 * rates[2_048][0]


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy not in LOOKS])
def test_one_run_stands_for_all_slos_of_a_policy_that_does_not_look(policy: str) -> None:
    setting = replace(OVERLOAD, num_requests=40, host_gb=HOST_GB)
    once = goodput_curve(setting, policy, SEED, [45.0, 150.0])
    assert once[150.0] == goodput_curve(setting, policy, SEED, [150.0])[150.0]


def test_the_chessboard_has_every_value_beside_every_other() -> None:
    points = chessboard(HOST_GB)
    assert len(points) == len(MODELS) * len(GPUS) * len(LOADS) * len(SLO_RATIOS) * len(CVS) // 2
    columns = [tuple(point.columns.values()) for point in points]
    for i, j in ((0, 1), (0, 3), (2, 3), (3, 4), (2, 4)):
        pairs = {(row[i], row[j]) for row in columns}
        assert len(pairs) == len({a for a, _ in pairs}) * len({b for _, b in pairs})
