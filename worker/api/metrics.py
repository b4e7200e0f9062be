"""Metrics, declared once: name, kind, labels, help, unit. This folder's own are what a worker reports.

A series is named by a key: (metric, *label values in the order of the declaration), and for a histogram a
last word that is a bucket's bound, "+Inf" or "sum". Counts of buckets are not cumulated, so that series of
several processes can be added up. What serves or exports metrics goes by these declarations alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from ellm.worker.api.report import WorkerInfo, WorkerReport

Kind = Literal["counter", "gauge", "histogram"]
Key = tuple[str, ...]

PREFIX = "ellm_"
SUM = "sum"
STATES = ("ready", "loading", "draining", "failed")


@dataclass(frozen=True, slots=True)
class Metric:
    """One family. `known`: label values that are there from the start, at 0; all labels but `model_name`."""

    name: str  # with the prefix, and a counter's with `_total`
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    unit: str = ""  # seconds, tokens, bytes, ratio (0 to 1), ...; "" for plain counts
    buckets: tuple[float, ...] = ()
    known: tuple[tuple[str, ...], ...] = ()


def counter(
    name: str, text: str, *labels: str, unit: str = "", known: tuple[tuple[str, ...], ...] = ()
) -> Metric:
    return Metric(f"{PREFIX}{name}_total", "counter", text, labels, unit, (), known)


def gauge(name: str, text: str, *labels: str, unit: str = "") -> Metric:
    return Metric(PREFIX + name, "gauge", text, labels, unit)


_M, _W = "model_name", "worker"


def _total(name: str, field: str, text: str, unit: str = "") -> tuple[Metric, str]:
    return counter(name, text, _M, unit=unit), field


def _of(
    name: str, text: str, value: Callable[[WorkerReport], float], unit: str = ""
) -> tuple[Metric, Callable[[WorkerReport], float]]:
    return gauge(name, text, _M, _W, unit=unit), value


# With the report's field: totals of an incarnation, added up over all that there ever were.
COUNTERS = (
    _total("num_preemptions", "num_preemptions", "Sequences put back into the queue for want of blocks."),
    _total("prompt_tokens", "prompt_tokens", "Prompt tokens processed.", "tokens"),
    _total("generation_tokens", "generation_tokens", "Tokens generated.", "tokens"),
    _total(
        "prefix_cache_queries", "prefix_queries", "Prompt tokens looked up in the prefix cache.", "tokens"
    ),
    _total("prefix_cache_hits", "prefix_hits", "Prompt tokens found in the prefix cache.", "tokens"),
    _total("recomputed_tokens", "recomputed_tokens", "Tokens computed again, holes included.", "tokens"),
    _total("steps", "num_steps", "Engine steps."),
    _total("busy_seconds", "busy_s", "Time in engine steps.", "seconds"),
    _total("num_parks", "num_parks", "Sequences set aside while ahead of their deadlines."),
    _total("num_restores", "num_restores", "Sequences brought back that had given up blocks."),
    _total("dropped_tokens", "dropped_tokens", "Tokens whose KV was given up without a copy.", "tokens"),
    _total("saved_tokens", "saved_tokens", "Tokens whose KV was copied to the host.", "tokens"),
    _total("loaded_tokens", "loaded_tokens", "Tokens whose KV was copied back from the host.", "tokens"),
    _total(
        "streamed_tokens",
        "streamed_tokens",
        "Tokens whose KV was streamed from the host in a step.",
        "tokens",
    ),
    _total(
        "hole_tokens", "hole_tokens", "Tokens recomputed in a step, for holes of running requests.", "tokens"
    ),
)

GAUGES = (
    _of("num_requests_running", "Sequences in the batch.", lambda r: r.num_running),
    _of("num_requests_waiting", "Sequences in the queue.", lambda r: r.num_waiting),
    _of("parked_requests", "Sequences set aside for a while.", lambda r: r.num_parked),
    _of(
        "kv_cache_usage_perc",
        "Share of KV blocks that admitted sequences hold, 0 to 1.",
        lambda r: 1 - (r.free_blocks + r.cached_blocks) / r.num_blocks if r.num_blocks else 0.0,
        "ratio",
    ),
    _of(
        "kv_cache_headroom_tokens", "Tokens that fit without evicting.", lambda r: r.headroom_tokens, "tokens"
    ),
    _of("uncached_tokens", "Admitted context without KV.", lambda r: r.uncached_tokens, "tokens"),
    _of(
        "uncached_token_ratio",
        "Share of admitted context without KV.",
        lambda r: r.uncached_token_ratio,
        "ratio",
    ),
    _of("recomputing_tokens", "Uncached: recomputed in each step.", lambda r: r.recomputing_tokens, "tokens"),
    _of(
        "streaming_tokens",
        "Uncached: streamed from the host in each step.",
        lambda r: r.streaming_tokens,
        "tokens",
    ),
    _of("host_tokens", "Uncached: to be brought back from the host.", lambda r: r.host_tokens, "tokens"),
    _of("dropped_now_tokens", "Uncached: to be computed again.", lambda r: r.dropped_now_tokens, "tokens"),
    _of("parked_tokens", "Context of parked sequences.", lambda r: r.parked_tokens, "tokens"),
    _of(
        "host_kv_usage_perc",
        "Share of the host tier's blocks in use, 0 to 1.",
        lambda r: r.host_blocks_used / r.num_host_blocks if r.num_host_blocks else 0.0,
        "ratio",
    ),
    _of(
        "recompute_debt_seconds",
        "Predicted extra time of a step for holes, and to bring back what waits for it.",
        lambda r: r.recompute_debt_s,
        "seconds",
    ),
    _of(
        "prefill_rate_tokens_per_second",
        "Prompt tokens per second of steps with any.",
        lambda r: r.prefill_rate_tok_s,
        "tokens per second",
    ),
    _of(
        "worker_slo_attainment_ratio",
        "Share of requests that ended within the last minute and kept what they were promised.",
        lambda r: r.slo_attainment,
        "ratio",
    ),
    _of("step_time_seconds", "Moving average of a step's time.", lambda r: r.step_time_s, "seconds"),
    _of(
        "cost_model_error_ratio",
        "Relative error of predicted step times.",
        lambda r: r.cost_model_error,
        "ratio",
    ),
    _of("worker_peak_memory_bytes", "Peak memory of a worker.", lambda r: r.peak_memory_bytes, "bytes"),
)

KV_TOKENS = gauge(
    "kv_cache_tokens",
    "The KV pool by state: running, parked, cached (reusable, held by nobody), free. Adds up to the pool.",
    *(_M, _W, "state"),
    unit="tokens",
)

DECLARED = (*(metric for metric, _ in COUNTERS), *(metric for metric, _ in GAUGES), KV_TOKENS)


def kv_tokens(info: WorkerInfo, report: WorkerReport) -> dict[str, int]:
    """State -> tokens of the device's pool. Parked sequences hold their context but for what they gave up, of
    which those that are being restored have a part: so parked is at least this."""
    size = info.block_size
    held = (report.num_blocks - report.free_blocks - report.cached_blocks) * size
    parked = min(held, max(0, report.parked_tokens - report.host_tokens - report.dropped_now_tokens))
    return {
        "running": held - parked,
        "parked": parked,
        "cached": report.cached_blocks * size,
        "free": report.free_blocks * size,
    }


def counts(info: WorkerInfo, report: WorkerReport) -> Iterator[tuple[Key, float]]:
    """The counters of one incarnation."""
    for metric, field in COUNTERS:
        yield (metric.name, info.model), float(getattr(report, field))


def gauges(info: WorkerInfo, report: WorkerReport) -> Iterator[tuple[Key, float]]:
    """What a worker is like now."""
    for metric, value in GAUGES:
        yield (metric.name, info.model, info.worker_id), float(value(report))
    for state, tokens in kv_tokens(info, report).items():
        yield (KV_TOKENS.name, info.model, info.worker_id, state), float(tokens)
