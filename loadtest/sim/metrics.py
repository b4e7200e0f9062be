"""What a run was worth: throughput, goodput, attainment, TTFT, TPOT, and the bound that nobody can pass.

A request attains its SLO, by the *mean*, if (t_last - t_first) / (tokens - 1) <= SLO; *strictly*, if token i
(from 0) comes by t_first + SLO * (i + 4) for every i; in both, if TTFT <= its own SLO where there is one.
Goodput is the tokens of the requests that attain, per second.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ellm.loadtest.sim.device import OVERHEAD_S, Device
from ellm.loadtest.sim.replica import Trajectory
from ellm.loadtest.sim.workload import SimRequest

GRACE = 4  # tokens by which a stream may lag behind its schedule
WARM_UP = 0.1  # share of the arrivals that the window leaves out

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Metrics:
    """Seconds, tokens and shares; the names are those of the result file."""

    throughput_tok_s: float
    goodput_tok_s: float
    slo_attainment: float
    goodput_strict_tok_s: float
    slo_attainment_strict: float
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    tpot_mean_s: float
    tpot_p99_s: float
    gap_p99_s: float  # between two tokens of a request
    duration_s: float


@dataclass(frozen=True, slots=True)
class _Served:
    """One request's figures."""

    arrival_s: float
    end_s: float
    tokens: int
    ttft_s: float
    tpot_s: float  # 0 for a single token
    mean: bool  # attains
    strict: bool


def measure(
    arrivals: Sequence[float],
    token_times: Sequence[array[float]],
    tpot_slo_s: float,
    ttft_slo_s: float | None = None,
) -> Metrics:
    """Figures of requests that have all ended: `token_times[i]` are those of the request that came at
    `arrivals[i]`. Time counts from the first arrival to the last token."""
    served = [
        _serve(arrival, np.frombuffer(times), tpot_slo_s, ttft_slo_s)
        for arrival, times in zip(arrivals, token_times, strict=True)
    ]
    duration = max(one.end_s for one in served) - min(one.arrival_s for one in served)
    ttft = np.array([one.ttft_s for one in served])
    tpot = np.array([one.tpot_s for one in served if one.tokens > 1] or [0.0])
    gaps = [np.diff(np.frombuffer(times)) for times in token_times if len(times) > 1]
    return Metrics(
        throughput_tok_s=sum(one.tokens for one in served) / duration,
        goodput_tok_s=sum(one.tokens for one in served if one.mean) / duration,
        slo_attainment=sum(one.mean for one in served) / len(served),
        goodput_strict_tok_s=sum(one.tokens for one in served if one.strict) / duration,
        slo_attainment_strict=sum(one.strict for one in served) / len(served),
        ttft_mean_s=float(ttft.mean()),
        ttft_p50_s=float(np.percentile(ttft, 50)),
        ttft_p99_s=float(np.percentile(ttft, 99)),
        tpot_mean_s=float(tpot.mean()),
        tpot_p99_s=float(np.percentile(tpot, 99)),
        gap_p99_s=float(np.percentile(np.concatenate(gaps), 99)) if gaps else 0.0,
        duration_s=duration,
    )


def measure_window(
    arrivals: Sequence[float],
    token_times: Sequence[array[float]],
    tpot_slo_s: float,
    ttft_slo_s: float | None = None,
) -> Metrics:
    """The same of all but the first tenth of the arrivals: what is said of the start is left out."""
    first = min(int(WARM_UP * len(arrivals)), len(arrivals) - 1)
    return measure(arrivals[first:], token_times[first:], tpot_slo_s, ttft_slo_s)


def summarise(
    requests: Sequence[SimRequest],
    trajectory: Trajectory,
    tpot_slo_s: float,
    ttft_slo_s: float | None = None,
) -> dict[str, Any]:
    """One policy's part of the result file."""
    arrivals = [request.arrival_s for request in requests]
    times = trajectory.token_times
    report, cpu = trajectory.report, trajectory.cpu
    tokens = max(1, sum(map(len, times)))
    return {
        **asdict(measure(arrivals, times, tpot_slo_s, ttft_slo_s)),
        "preemptions": report.num_preemptions,
        "recomputed_per_output_token": report.recomputed_tokens / tokens,
        "uncached_ratio_mean": trajectory.uncached_ratio,
        "parks": report.num_parks,
        "restores": report.num_restores,
        "dropped_tokens": report.dropped_tokens,
        "saved_tokens": report.saved_tokens,
        "loaded_tokens": report.loaded_tokens,
        "prefix_hit_tokens": report.prefix_hits,
        "steps": report.num_steps,
        "busy_s": report.busy_s,
        "mean_batch": trajectory.mean_batch,
        "cost_model_error": trajectory.cost_error_median,
        "window": asdict(measure_window(arrivals, times, tpot_slo_s, ttft_slo_s)),
        "cpu_us_per_token": {
            "plan": 1e6 * cpu.plan / tokens,
            "execute": 1e6 * cpu.execute / tokens,
            "finish": 1e6 * cpu.finish / tokens,
            "all": 1e6 * cpu.total / tokens,
        },
        "cpu_plan_mean_ms": 1e3 * cpu.plan / max(1, report.num_steps),
        "cpu_plan_worst_ms": 1e3 * cpu.worst_plan,
    }


def bound_tok_s(requests: Sequence[SimRequest], device: Device) -> float:
    """Tokens per second of a schedule that keeps the memory full at every step, with prompts for free and no
    tail: a step's constant part is shared by all that fit. No policy that keeps all KV of those it runs can
    pass it."""
    tokens, read = sum(r.output_tokens for r in requests), context_read(requests)
    constant_s = OVERHEAD_S + device.all_reduce_s[0] + device.weights_s
    capacity = device.pool_bytes / device.model.kv_token_bytes
    return tokens / (read / capacity * constant_s + read * device.kv_token_s)


def capacity_tok_s(requests: Sequence[SimRequest], device: Device, max_num_seqs: int) -> float:
    """The bound where no more than `max_num_seqs` run at once, and rows beyond the knee cost time: what load
    is a share of. The same as the bound where long contexts fill the memory before that."""
    tokens = sum(r.output_tokens for r in requests)
    read = context_read(requests)
    steps = max(read * device.model.kv_token_bytes / device.pool_bytes, tokens / max_num_seqs)
    linear_s = max(device.weights_s, tokens / steps * device.row_s)
    return tokens / (steps * (OVERHEAD_S + device.all_reduce_s[0] + linear_s) + read * device.kv_token_s)


def context_read(requests: Sequence[SimRequest]) -> int:
    """Tokens of context that decoding all of it reads: token k of an output reads prompt + k."""
    return sum(
        r.output_tokens * r.prompt_tokens + r.output_tokens * (r.output_tokens + 1) // 2 for r in requests
    )


def realised_load(requests: Sequence[SimRequest], capacity: float) -> float:
    """Output tokens that were asked for per second of arrivals, as a share of `capacity`."""
    span = requests[-1].arrival_s
    return sum(r.output_tokens for r in requests) / span / capacity if span > 0.0 else float("inf")


def _serve(arrival_s: float, times: Floats, slo_s: float, ttft_slo_s: float | None) -> _Served:
    assert len(times), "a request without a token"
    first, last = float(times[0]), float(times[-1])
    tpot = (last - first) / (len(times) - 1) if len(times) > 1 else 0.0
    deadlines = first + slo_s * (np.arange(len(times)) + GRACE)
    in_time = ttft_slo_s is None or first - arrival_s <= ttft_slo_s
    return _Served(
        arrival_s,
        last,
        len(times),
        first - arrival_s,
        tpot,
        mean=in_time and tpot <= slo_s,
        strict=in_time and bool((times <= deadlines).all()),
    )
