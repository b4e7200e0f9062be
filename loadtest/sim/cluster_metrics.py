"""What a run of a simulated cluster was worth.

Goodput counts the tokens of requests that attain their SLOs by the mean (metrics.py), per second of the time
over which requests came: when the last straggler ends says more of that request than of the routing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ellm.loadtest.sim.cluster import ClusterRun
from ellm.loadtest.sim.cluster_setting import ClusterSetting
from ellm.loadtest.sim.workload import SimRequest
from ellm.router.policies.candidates import FALLBACKS

Figures = dict[str, float]


def figures(setting: ClusterSetting, requests: Sequence[SimRequest], run: ClusterRun) -> Figures:
    """Numbers by the names of the result file."""
    span = requests[-1].arrival_s
    arrivals = np.array([request.arrival_s for request in requests])
    first = np.array([times[0] for times in run.token_times])
    last = np.array([times[-1] for times in run.token_times])
    tokens = np.array([len(times) for times in run.token_times])
    ttft = first - arrivals
    tpot = (last - first) / np.maximum(1, tokens - 1)
    attains = tpot <= setting.tpot_slo_s
    if setting.ttft_slo_s is not None:
        attains &= ttft <= setting.ttft_slo_s
    prompt = sum(request.prompt_tokens for request in requests)
    counts = np.bincount(run.chosen, minlength=len(setting.workers))
    cached, guessed = np.array(run.cached_tokens), np.array(run.guessed_tokens)
    return {
        "goodput_tok_s": float(tokens[attains].sum() / span),
        "offered_tok_s": float(tokens.sum() / span),
        "slo_attainment": float(attains.mean()),
        "ttft_mean_s": float(ttft.mean()),
        "ttft_p50_s": float(np.percentile(ttft, 50)),
        "ttft_p99_s": float(np.percentile(ttft, 99)),
        "tpot_mean_s": float(tpot.mean()),
        "tpot_p99_s": float(np.percentile(tpot, 99)),
        "hit_share": float(cached.sum() / prompt),
        "guess_error_share": float(np.abs(cached - guessed).sum() / prompt),
        "least_share": float(counts.min() / len(requests)),
        "most_share": float(counts.max() / len(requests)),
        "parks": float(sum(report.num_parks for report in run.reports)),
        "preemptions": float(sum(report.num_preemptions for report in run.reports)),
        "decision_us": 1e6 * run.decisions_s / len(requests),
        "digest_bytes_per_s": run.digest_bytes / max(1, run.num_reports) / setting.report_s,
        "fallbacks": float(sum(run.reasons.get(reason, 0) for reason in FALLBACKS)),
        "cpu_s": run.cpu_s,
    }
