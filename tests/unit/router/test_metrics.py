"""Names and buckets of the field, counters that never run backwards, and what requests add to them."""

from __future__ import annotations

from dataclasses import replace

import httpx
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from support.router_server import MODEL, RouterServer, wait_until

from ellm.cluster.api.counters import CounterBook
from ellm.router.histogram import Histogram
from ellm.router.metrics import RouterMetrics
from ellm.router.metrics_declared import TTFT
from ellm.router.metrics_page import cumulated, text
from ellm.router.metrics_sharing import DECLARED
from ellm.worker.api.metrics import kv_tokens
from ellm.worker.api.report import WorkerInfo, WorkerReport

INFO = WorkerInfo("w0", "e0", "m", "n", 1024, 16, 64, 1000, (0,), "cpu", "float32", True)


def values(text: str) -> dict[str, float]:
    """Sample -> value; labels other than the model's in braces."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()) if k != "model_name")
            found[sample.name + ("{" + labels + "}" if labels else "")] = sample.value
    return found


def test_the_endpoint_has_the_fields_names(client: httpx.Client) -> None:
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    assert response.text.endswith("\n")
    names = {
        f.name: f.type for f in text_string_to_metric_families(response.text) if f.name.startswith("ellm_")
    }
    for name in (
        "ellm_time_to_first_token_seconds", "ellm_inter_token_latency_seconds",
        "ellm_time_per_output_token_seconds", "ellm_e2e_request_latency_seconds",
        "ellm_request_queue_time_seconds", "ellm_request_prefill_time_seconds",
        "ellm_request_decode_time_seconds",
    ):  # fmt: skip
        assert names[name] == "histogram"
    for name in (
        "ellm_prompt_tokens", "ellm_generation_tokens", "ellm_num_preemptions", "ellm_request_success",
        "ellm_prefix_cache_queries", "ellm_prefix_cache_hits", "ellm_router_failovers",
        "ellm_admission_rejections", "ellm_router_decisions", "ellm_streamed_tokens",
        "ellm_recomputed_tokens", "ellm_hole_tokens",
    ):  # fmt: skip
        assert names[name] == "counter"
        assert f"{name}_total" in response.text
    for name in (
        "ellm_num_requests_running", "ellm_num_requests_waiting", "ellm_kv_cache_usage_perc",
        "ellm_kv_cache_headroom_tokens", "ellm_router_report_age_seconds", "ellm_step_time_seconds",
        "ellm_host_kv_usage_perc", "ellm_uncached_tokens", "ellm_uncached_token_ratio",
        "ellm_parked_requests", "ellm_recompute_debt_seconds", "ellm_prefill_rate_tokens_per_second",
    ):  # fmt: skip
        assert names[name] == "gauge"
    assert ":" not in "".join(names)


def test_requests_are_counted(server: RouterServer, client: httpx.Client) -> None:
    before = values(client.get("/metrics").text)
    body = {"model": MODEL, "prompt": [7, 8, 9], "max_tokens": 5, "n": 2, "ignore_eos": True}
    assert client.post("/v1/completions", json=body).status_code == 200
    assert client.post("/v1/completions", json={**body, "n": 0}).status_code == 400

    def grown(name: str) -> float:
        return values(client.get("/metrics").text)[name] - before.get(name, 0.0)

    assert grown("ellm_request_success_total{finished_reason=length}") == 2
    assert grown("ellm_request_errors_total{code=invalid_value}") == 1
    assert grown("ellm_time_to_first_token_seconds_count") == 2
    # One per output: a router that is behind gets several tokens in one, and all in one leave no gap.
    gaps = grown("ellm_inter_token_latency_seconds_count")
    assert gaps <= 8
    assert grown("ellm_e2e_request_latency_seconds_count") == 2
    assert grown("ellm_time_per_output_token_seconds_count") == 2 or gaps < 4
    assert grown("ellm_time_to_first_token_seconds_sum") > 0
    wait_until(lambda: grown("ellm_generation_tokens_total") == 10)
    assert grown("ellm_prompt_tokens_total") >= 3


@given(st.lists(st.floats(0, 5000, allow_nan=False), max_size=50))
def test_a_histogram_cumulates(observed: list[float]) -> None:
    histogram = Histogram(TTFT.buckets)
    for value in observed:
        histogram.observe(value)
    parts = dict(histogram.series())
    assert abs(parts.get("sum", 0.0) - sum(observed)) <= 1e-6 * (1 + sum(observed))
    buckets = cumulated(TTFT, parts)
    for bound, count in buckets:
        assert count == sum(value <= float(bound) for value in observed)
    assert buckets[-1] == ("+Inf", len(observed))


def page(metrics: RouterMetrics, book: CounterBook) -> dict[str, float]:
    """What a scrape would show of the workers that this router has heard."""
    for source, counts in metrics.worker_series():
        book.merge(source, counts.items())
    return values(text(DECLARED, ["m"], book.totals()).decode())


def test_counters_of_workers_never_run_backwards() -> None:
    now = [0.0]
    metrics, book = RouterMetrics("m", lambda: now[0]), CounterBook()
    second = replace(INFO, epoch="e1")

    def total() -> float:
        return page(metrics, book)["ellm_generation_tokens_total"]

    metrics.worker_report(INFO, WorkerReport(1, generation_tokens=100))
    assert total() == 100
    metrics.worker_gone(INFO)
    assert total() == 100
    metrics.worker_report(second, WorkerReport(1, generation_tokens=7))
    assert total() == 107
    metrics.worker_report(INFO, WorkerReport(2, generation_tokens=130))  # it was not dead after all
    assert total() == 137
    metrics.worker_gone(INFO, "death")
    metrics.worker_gone(second, "drain")
    found = page(metrics, book)
    assert found["ellm_generation_tokens_total"] == 137
    assert found["ellm_workers_lost_total"] == 1


def test_what_is_known_from_the_start_is_there_at_zero() -> None:
    found = values(text(DECLARED, ["m"], {}).decode())
    assert found["ellm_request_success_total{finished_reason=abort}"] == 0
    assert found["ellm_controller_absences_total{reason=controller_away}"] == 0
    assert found["ellm_time_to_first_token_seconds_count"] == 0
    assert found["ellm_workers_lost_total"] == 0


def test_every_metric_is_declared_once_and_says_what_it_is() -> None:
    names = [metric.name for metric in DECLARED]
    assert len(names) == len(set(names)) > 60
    for metric in DECLARED:
        assert metric.name.startswith("ellm_")
        assert metric.help.endswith(".")
        assert (metric.kind == "counter") == metric.name.endswith("_total"), metric.name
        assert (metric.kind == "histogram") == bool(metric.buckets)


def test_the_states_of_a_pool_add_up() -> None:
    report = WorkerReport(
        1, free_blocks=10, cached_blocks=4, num_blocks=64, parked_tokens=300, dropped_now_tokens=60
    )
    tokens = kv_tokens(INFO, report)
    assert tokens == {"running": 50 * 16 - 240, "parked": 240, "cached": 64, "free": 160}
    assert sum(tokens.values()) == 64 * 16
