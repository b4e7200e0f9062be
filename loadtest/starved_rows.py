"""What a policy did on a starved pool, as a row of the result, and ours beside the baseline."""

from __future__ import annotations

from ellm.loadtest.open_loop import OpenLoopRun
from ellm.loadtest.result import Row
from ellm.loadtest.sim.metrics import Metrics

BASELINE, OURS = "full-recompute", "adaptive"


def row_of(name: str, host: str, real: Metrics, run: OpenLoopRun, sim: Metrics) -> Row:
    report, tokens = run.report, sum(map(len, run.tokens))
    return {
        "policy": name,
        "host tier": host,
        "tok/s": real.throughput_tok_s,
        "goodput": real.goodput_tok_s,
        "attainment": real.slo_attainment,
        "goodput strict": real.goodput_strict_tok_s,
        "attainment strict": real.slo_attainment_strict,
        "TTFT mean, s": real.ttft_mean_s,
        "TTFT p50, s": real.ttft_p50_s,
        "TTFT p99, s": real.ttft_p99_s,
        "TPOT mean, s": real.tpot_mean_s,
        "TPOT p99, s": real.tpot_p99_s,
        "preempted": float(report.num_preemptions),
        "parked": float(report.num_parks),
        "recomputed per output": report.recomputed_tokens / tokens,
        "same tokens": "yes",  # check_tokens raised otherwise
        "sim goodput error": sim.goodput_tok_s / max(real.goodput_tok_s, 1e-9) - 1.0,
        "sim TTFT error": sim.ttft_mean_s / real.ttft_mean_s - 1.0,
    }


def with_ratios(rows: list[Row]) -> list[Row]:
    """Ours beside the baseline of the same host setting."""
    for host in dict.fromkeys(row["host tier"] for row in rows):
        of_host = {row["policy"]: row for row in rows if row["host tier"] == host}
        if BASELINE in of_host and OURS in of_host:
            base, ours = of_host[BASELINE], of_host[OURS]
            ours["ratio"] = ours["goodput"] / max(base["goodput"], 1e-9)
            ours["ratio TTFT"] = base["TTFT mean, s"] / ours["TTFT mean, s"]
            ours["against"] = BASELINE
    return rows
