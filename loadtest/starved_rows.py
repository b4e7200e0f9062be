"""What a policy did on a starved pool, as a row of the result, and ours beside the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from ellm.loadtest.result import Row
from ellm.loadtest.starved_rounds import Sample, mean_metrics

BASELINE, OURS = "full-recompute", "adaptive"


def rows_of(samples: Sequence[Sample]) -> list[Row]:
    """A row per policy and host setting, means over the rounds, and ratios of means."""
    names = dict.fromkeys((one.host, one.policy) for one in samples)
    return with_ratios(
        [_row([s for s in samples if (s.host, s.policy) == (host, policy)]) for host, policy in names]
    )


def _row(rounds: Sequence[Sample]) -> Row:
    real, sim = mean_metrics([one.real for one in rounds]), mean_metrics([one.sim for one in rounds])
    reports, tokens = [one.run.report for one in rounds], sum(map(len, rounds[0].run.tokens))
    return {
        "policy": rounds[0].policy,
        "host tier": rounds[0].host,
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
        "preempted": fmean(report.num_preemptions for report in reports),
        "parked": fmean(report.num_parks for report in reports),
        "recomputed per output": fmean(report.recomputed_tokens for report in reports) / tokens,
        "same tokens": "yes",  # check_tokens raised otherwise
        "machine": fmean(one.slowness for one in rounds),
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
