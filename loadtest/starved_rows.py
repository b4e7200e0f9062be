"""What a policy did on a starved pool, as a row of the result, and ours beside the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median

from ellm.loadtest.result import Row
from ellm.loadtest.starved_rounds import Sample, mean_metrics

BASELINE, OURS = "full-recompute", "adaptive"


def rows_of(samples: Sequence[Sample]) -> list[Row]:
    """A row per policy and host setting, means over its runs; ratios are medians within a round."""
    names = dict.fromkeys((one.host, one.policy) for one in samples)
    rows = {
        (host, policy): _row([s for s in samples if (s.host, s.policy) == (host, policy)])
        for host, policy in names
    }
    for host in dict.fromkeys(one.host for one in samples):
        base = {one.round: one.real for one in samples if (one.host, one.policy) == (host, BASELINE)}
        ours = {one.round: one.real for one in samples if (one.host, one.policy) == (host, OURS)}
        both = [(base[number], ours[number]) for number in base.keys() & ours.keys()]
        if both:
            rows[host, OURS] |= {
                "ratio": median(b.goodput_tok_s / max(a.goodput_tok_s, 1e-9) for a, b in both),
                "ratio TTFT": median(a.ttft_mean_s / b.ttft_mean_s for a, b in both),
                "against": BASELINE,
            }
    return list(rows.values())


def _row(rounds: Sequence[Sample]) -> Row:
    real, sim = mean_metrics([one.real for one in rounds]), mean_metrics([one.sim for one in rounds])
    reports, tokens = [one.run.report for one in rounds], sum(map(len, rounds[0].run.tokens))
    return {
        "policy": rounds[0].policy,
        "host tier": rounds[0].host,
        "runs": len(rounds),
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
