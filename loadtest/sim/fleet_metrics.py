"""What a simulated fleet's day was worth, as totals and minute by minute.

Goodput counts the tokens of requests that attain their SLOs by the mean (metrics.py), per second of the day.
In the series a request counts in the minute in which it came. GPU hours run from the moment a worker is asked
for until its device is free again: starts, drains and deaths that nobody has noticed yet are paid for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ellm.loadtest.sim.fleet_run import FleetRun
from ellm.loadtest.sim.fleet_setting import FleetSetting
from ellm.loadtest.sim.workload import SimRequest

BINS = 120  # of the series: a minute each in two hours

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def num_lost(requests: Sequence[SimRequest], run: FleetRun) -> int:
    """Requests that did not end exactly once with exactly their tokens, whatever happened to them instead."""
    whole = sum(
        1
        for request, tokens, ends in zip(requests, run.emitted, run.num_ends, strict=True)
        if tokens == request.output_tokens and ends == 1
    )
    return len(requests) - whole


def fleet_figures(setting: FleetSetting, requests: Sequence[SimRequest], run: FleetRun) -> dict[str, Any]:
    """Numbers by the names of the result file; what did not end is no part of times and counts as a miss."""
    ended = np.frombuffer(run.num_ends, dtype=np.int64) == 1
    came = np.array([request.arrival_s for request in requests])
    tokens = np.frombuffer(run.emitted, dtype=np.int64)
    first, last = np.frombuffer(run.first_s), np.frombuffer(run.last_s)
    ttft, tpot = first - came, (last - first) / np.maximum(1, tokens - 1)
    attains = ended & (tpot <= setting.tpot_slo_s) & (ttft <= setting.ttft_slo_s)
    duration = setting.duration_s
    hours = sum(worker.paid_s(run.end_s) for worker in run.workers) / 3600.0 * setting.tp
    good = float(tokens[attains].sum())
    targets = [setting.min_workers, *(target for _, target, _ in run.scalings)]
    steps = list(pairwise(targets))
    deaths = Counter(kind for _, kind in run.deaths)
    return {
        "requests": len(requests),
        "lost": num_lost(requests, run),
        "errors": len(run.failed),
        "tokens_asked": sum(request.output_tokens for request in requests),
        "tokens": int(tokens.sum()),
        "offered_tok_s": sum(request.output_tokens for request in requests) / duration,
        "goodput_tok_s": good / duration,
        "slo_attainment": float(attains.mean()),
        "ttft_mean_s": float(ttft[ended].mean()),
        "ttft_p50_s": float(np.percentile(ttft[ended], 50)),
        "ttft_p99_s": float(np.percentile(ttft[ended], 99)),
        "tpot_mean_s": float(tpot[ended].mean()),
        "tpot_p99_s": float(np.percentile(tpot[ended], 99)),
        "gpu_hours": hours,
        "good_tokens_per_gpu_hour": good / hours,
        "crashes": deaths["crash"],
        "silent_deaths": deaths["silent"],
        "scalings_up": sum(after > before for before, after in steps),
        "scalings_down": sum(after < before for before, after in steps),
        "most_workers": max(sample.ready for sample in run.samples),
        "moved_by_death": run.moved["death"],
        "moved_by_drain": run.moved["drain"],
        "cpu_s": run.cpu_s,
        "simulated_s_per_cpu_s": run.end_s / run.cpu_s,
        "series": _series(setting, came, ttft, tokens, attains, run),
        "scalings": [[at, target, reason] for at, target, reason in run.scalings],
        "deaths": [[at, kind] for at, kind in run.deaths],
    }


def _series(
    setting: FleetSetting,
    came: Floats,
    ttft: Floats,
    tokens: NDArray[np.int64],
    attains: Bools,
    run: FleetRun,
) -> list[dict[str, float]]:
    width = setting.duration_s / BINS
    place = np.minimum((came / width).astype(int), BINS - 1)
    series = []
    for number in range(BINS):
        mine = place == number
        count = int(mine.sum())
        begin = number * width
        at = next((sample for sample in run.samples if sample.at >= begin), run.samples[-1])
        series.append(
            {
                "minute": begin / 60.0,
                "offered_req_s": count / width,
                "offered_tok_s": float(tokens[mine].sum()) / width,
                "goodput_tok_s": float(tokens[mine & attains].sum()) / width,
                "slo_attainment": float(attains[mine].mean()) if count else 1.0,
                "ttft_mean_s": float(ttft[mine].mean()) if count else 0.0,
                "ttft_p99_s": float(np.percentile(ttft[mine], 99)) if count else 0.0,
                "target": at.target,
                "ready": at.ready,
                "starting": at.starting,
                "held": at.held,
            }
        )
    return series
