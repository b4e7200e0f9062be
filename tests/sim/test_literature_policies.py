"""`hcache` in the simulator; its reference figures are held in test_simulator_reference.py."""

from __future__ import annotations

from ellm.loadtest.sim.run import simulate
from ellm.loadtest.sim.setting import Setting


def test_hidden_states_are_no_bargain_where_heads_share_kv() -> None:
    setting = Setting(
        model="llama3-8b", num_requests=60, rate=50.0, tpot_slo_ms=50.0, host_gb=8.0, kv_bytes=3e9
    )
    kept, hidden = (simulate(setting, policy, 1) for policy in ("full-offload", "hcache"))
    # The host has room for half as many tokens: more has to be computed again.
    assert hidden["recomputed_per_output_token"] > 2 * kept["recomputed_per_output_token"]
    assert hidden["throughput_tok_s"] < kept["throughput_tok_s"]
