"""The whole cluster as the page draws it: each worker's memory by state, latencies and what was promised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ellm.router import metrics_declared as declared
from ellm.router.link import STALL_S
from ellm.router.metrics_sharing import ClusterView
from ellm.worker.api.metrics import PREFIX, Key, Metric, kv_tokens
from ellm.worker.api.report import WorkerInfo, WorkerReport

COUNTERS = (
    *("prompt_tokens", "generation_tokens", "recomputed_tokens", "streamed_tokens"),
    *("prefix_cache_queries", "prefix_cache_hits", "workers_lost", "slo_goodput_tokens"),
)


def overview(view: ClusterView, models: Sequence[str]) -> dict[str, Any]:
    """As JSON has it. Counters are of all routers and workers since the cluster's start."""
    newest = sorted(view.reports.values(), key=lambda entry: (entry[0].model, entry[0].worker_id, entry[2]))
    return {
        "complete": view.complete,
        "num_routers": int(view.series.get((declared.ROUTERS.name,), 0.0)),
        "models": [
            _model(model, view.series, [w for w in newest if w[0].model == model]) for model in models
        ],
        "workers": [_worker(*entry) for entry in newest],
    }


def _model(
    model: str, series: Mapping[Key, float], workers: Sequence[tuple[WorkerInfo, WorkerReport, float]]
) -> dict[str, Any]:
    info = workers[0][0] if workers else None
    ended = sum(value for key, value in series.items() if key[:2] == (declared.SUCCESS.name, model))
    totals = {name: series.get((f"{PREFIX}{name}_total", model), 0.0) for name in COUNTERS}
    return {
        "name": model,
        "ttft_slo_s": None if info is None else info.ttft_slo_s,
        "tpot_slo_s": None if info is None else info.tpot_slo_s,
        "ttft": _buckets(declared.TTFT, model, series),
        "tpot": _buckets(declared.TPOT, model, series),
        "attainment": {
            key[2]: round(value, 4)
            for key, value in series.items()
            if key[:2] == (declared.ATTAINMENT.name, model)
        },
        "counters": {**totals, "finished": ended},
    }


def _buckets(metric: Metric, model: str, series: Mapping[Key, float]) -> dict[str, Any]:
    bounds = [*map(str, metric.buckets), "+Inf"]
    return {
        "bounds": list(metric.buckets),
        "counts": [series.get((metric.name, model, bound), 0.0) for bound in bounds],
    }


def _worker(info: WorkerInfo, report: WorkerReport, age_s: float) -> dict[str, Any]:
    stalled = report.state == "ready" and report.since_last_step_s >= STALL_S
    return {
        "key": info.epoch,
        "id": info.worker_id,
        "model": info.model,
        "node": info.node,
        "device": info.device,
        "tp": info.tensor_parallel_size,
        "state": "failed" if stalled else report.state,
        "age_s": round(age_s, 3),
        "pool_tokens": info.block_size * report.num_blocks,
        "kv": kv_tokens(info, report),
        "uncached": {
            "recomputed": report.recomputing_tokens,
            "streamed": report.streaming_tokens,
            "host": report.host_tokens,
            "dropped": report.dropped_now_tokens,
        },
        "num_running": report.num_running,
        "num_waiting": report.num_waiting,
        "num_parked": report.num_parked,
        "step_s": report.step_time_s,
        "slo_attainment": report.slo_attainment,
    }
