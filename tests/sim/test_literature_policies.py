"""The papers' policies in the simulator, beside an independent simulator of the same setting."""

from __future__ import annotations

from statistics import fmean

import pytest

from ellm.loadtest.sim.run import simulate
from ellm.loadtest.sim.setting import Setting

PAPER = Setting(num_requests=600, rate=50.0, tpot_slo_ms=50.0, host_gb=64.0)  # 13B on an A100-80G


def test_hcache_beside_the_reference() -> None:
    runs = [simulate(PAPER, "hcache", seed) for seed in (1, 2)]
    assert fmean(run["throughput_tok_s"] for run in runs) == pytest.approx(975, rel=0.03)
    assert fmean(run["preemptions"] for run in runs) == pytest.approx(1_210, rel=0.12)
    assert fmean(run["goodput_tok_s"] for run in runs) == pytest.approx(451, rel=0.15)


def test_hidden_states_are_no_bargain_where_heads_share_kv() -> None:
    setting = Setting(
        model="llama3-8b", num_requests=60, rate=50.0, tpot_slo_ms=50.0, host_gb=8.0, kv_bytes=3e9
    )
    kept, hidden = (simulate(setting, policy, 1) for policy in ("full-offload", "hcache"))
    # The host has room for half as many tokens: more has to be computed again.
    assert hidden["recomputed_per_output_token"] > 2 * kept["recomputed_per_output_token"]
    assert hidden["throughput_tok_s"] < kept["throughput_tok_s"]
