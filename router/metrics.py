"""What this router counts, and what its workers report, as Prometheus text under the field's names.

A router's own counts are plain numbers that cost well under a microsecond to raise; workers' totals come with
their reports. A counter never runs backwards: totals are kept per incarnation of a worker, a dead one's too.
Families are made only when somebody asks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from ellm.router.attainment import Attainment
from ellm.router.histogram import E2E_BUCKETS, ITL_BUCKETS, TTFT_BUCKETS, Histogram
from ellm.router.policies.candidates import FALLBACKS
from ellm.router.sequence import Sequence as LiveSequence
from ellm.router.usage import Usage
from ellm.worker.api.errors import EllmError
from ellm.worker.api.output import FinishReason
from ellm.worker.api.report import WorkerInfo, WorkerReport

CONTENT_TYPE = CONTENT_TYPE_LATEST
FORGET_S = 3600.0
# Report field -> (name, help): totals of an incarnation.
TOTALS = {
    "num_preemptions": ("ellm_num_preemptions", "Sequences put back into the queue for want of blocks."),
    "prompt_tokens": ("ellm_prompt_tokens", "Prompt tokens processed."),
    "generation_tokens": ("ellm_generation_tokens", "Tokens generated."),
    "prefix_queries": ("ellm_prefix_cache_queries", "Prompt tokens looked up in the prefix cache."),
    "prefix_hits": ("ellm_prefix_cache_hits", "Prompt tokens found in the prefix cache."),
    "recomputed_tokens": ("ellm_recomputed_tokens", "Tokens computed again after a preemption."),
    "num_steps": ("ellm_steps", "Engine steps."),
    "busy_s": ("ellm_busy_seconds", "Time in engine steps."),
    "num_parks": ("ellm_num_parks", "Sequences set aside while ahead of their deadlines."),
    "num_restores": ("ellm_num_restores", "Sequences brought back that had given up blocks."),
    "dropped_tokens": ("ellm_dropped_tokens", "Tokens whose KV was given up without a copy on the host."),
    "saved_tokens": ("ellm_saved_tokens", "Tokens whose KV was copied to the host."),
    "loaded_tokens": ("ellm_loaded_tokens", "Tokens whose KV was copied back from the host."),
    "streamed_tokens": ("ellm_streamed_tokens", "Tokens whose KV was streamed from the host within a step."),
    "hole_tokens": ("ellm_hole_tokens", "Tokens recomputed within a step, for holes of running requests."),
}
GAUGES: dict[str, tuple[str, str, Callable[[WorkerReport], float]]] = {
    "running": ("ellm_num_requests_running", "Sequences in the batch.", lambda r: r.num_running),
    "waiting": ("ellm_num_requests_waiting", "Sequences in the queue.", lambda r: r.num_waiting),
    "usage": (
        "ellm_kv_cache_usage_perc",
        "Share of KV blocks that running sequences hold, 0 to 1.",
        lambda r: 1 - (r.free_blocks + r.cached_blocks) / r.num_blocks if r.num_blocks else 0.0,
    ),
    "headroom": (
        "ellm_kv_cache_headroom_tokens", "Tokens that fit without evicting.", lambda r: r.headroom_tokens
    ),
    "uncached": ("ellm_uncached_tokens", "Context without KV.", lambda r: r.uncached_tokens),
    "ratio": (
        "ellm_uncached_token_ratio", "Share of admitted context without KV.", lambda r: r.uncached_token_ratio
    ),
    "recomputing": (
        "ellm_recomputing_tokens", "Uncached: recomputed in each step.", lambda r: r.recomputing_tokens
    ),
    "streaming": (
        "ellm_streaming_tokens", "Uncached: streamed from the host in each step.",
        lambda r: r.streaming_tokens,
    ),
    "host": ("ellm_host_tokens", "Uncached: to be brought back from the host.", lambda r: r.host_tokens),
    "dropped": ("ellm_dropped_now_tokens", "Uncached: to be computed again.", lambda r: r.dropped_now_tokens),
    "host_usage": (
        "ellm_host_kv_usage_perc",
        "Share of the host tier's blocks in use, 0 to 1.",
        lambda r: r.host_blocks_used / r.num_host_blocks if r.num_host_blocks else 0.0,
    ),
    "debt": (
        "ellm_recompute_debt_seconds",
        "Predicted extra time of a step for holes, and to bring back what waits for it.",
        lambda r: r.recompute_debt_s,
    ),
    "prefill": (
        "ellm_prefill_rate_tokens_per_second", "Prompt tokens per second of steps with any.",
        lambda r: r.prefill_rate_tok_s,
    ),
    "kept": (
        "ellm_worker_slo_attainment_ratio",
        "Share of requests that ended within the last minute and kept what they were promised.",
        lambda r: r.slo_attainment,
    ),
    "parked_tokens": ("ellm_parked_tokens", "Context of parked sequences.", lambda r: r.parked_tokens),
    "parked": ("ellm_parked_requests", "Sequences set aside for a while.", lambda r: r.num_parked),
    "step": ("ellm_step_time_seconds", "Moving average of a step's time.", lambda r: r.step_time_s),
    "error": (
        "ellm_cost_model_error_ratio", "Relative error of predicted step times.", lambda r: r.cost_model_error
    ),
    "memory": (
        "ellm_worker_peak_memory_bytes", "Peak resident memory of a worker.", lambda r: r.peak_memory_bytes
    ),
}  # fmt: skip


class RouterMetrics(Collector):
    """One per router. It is the dispatcher's observer, and a collector of one registry."""

    def __init__(self, model: str, clock: Callable[[], float]) -> None:
        self._model = model
        self._clock = clock
        self._histograms = {
            "ellm_time_to_first_token_seconds": (Histogram(TTFT_BUCKETS), "From arrival to the first token."),
            "ellm_inter_token_latency_seconds": (Histogram(ITL_BUCKETS), "Between two outputs."),
            "ellm_time_per_output_token_seconds": (
                Histogram(ITL_BUCKETS), "Mean time per token after the first."
            ),
            "ellm_e2e_request_latency_seconds": (Histogram(E2E_BUCKETS), "From arrival to the last token."),
            "ellm_request_queue_time_seconds": (Histogram(E2E_BUCKETS), "In a worker's queue."),
            "ellm_request_prefill_time_seconds": (
                Histogram(E2E_BUCKETS), "From arrival to the first token, but for the worker's queue."
            ),
            "ellm_request_decode_time_seconds": (Histogram(E2E_BUCKETS), "From the first token to the last."),
        }  # fmt: skip
        self.token_interval = self._histograms["ellm_inter_token_latency_seconds"][0].observe
        self.finished: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.rejections: Counter[str] = Counter()
        self.failovers: Counter[str] = Counter()
        self.decisions: Counter[str] = Counter()
        self._gone: dict[str, tuple[WorkerReport, float]] = {}  # epoch -> last report, and when it was lost
        self._folded: Counter[str] = Counter()  # totals of those that do not come back
        self._reports: dict[str, tuple[WorkerInfo, WorkerReport, float]] = {}
        self._attainment = Attainment()
        self._usage = Usage()
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def text(self) -> bytes:
        """All families in Prometheus' text format."""
        return generate_latest(self._registry)

    def refused(self, error: EllmError) -> None:
        """A request was answered with an error and no output."""
        self.errors[error.code] += 1
        if error.status in (429, 503):
            self.rejections[error.code] += 1

    # DispatchObserver

    def sequence_ended(self, sequence: LiveSequence, reason: FinishReason) -> None:
        self.finished[reason] += 1
        self._attainment.ended(sequence, reason)
        self._usage.ended(sequence, reason)
        if reason not in ("stop", "length") or not sequence.first_token_at:
            return
        now = self._clock()
        first_token_s = sequence.first_token_at - sequence.arrived_at
        self._observe("ellm_time_to_first_token_seconds", first_token_s)
        self._observe("ellm_request_queue_time_seconds", sequence.queue_time_s)
        prefill_s = max(0.0, first_token_s - sequence.queue_time_s)
        self._observe("ellm_request_prefill_time_seconds", prefill_s)
        self._observe("ellm_e2e_request_latency_seconds", now - sequence.arrived_at)
        decode_s = sequence.token_at - sequence.first_token_at
        self._observe("ellm_request_decode_time_seconds", decode_s)
        if len(sequence.output_ids) > 1:
            self._observe("ellm_time_per_output_token_seconds", decode_s / (len(sequence.output_ids) - 1))

    def failover(self, reason: str) -> None:
        self.failovers[reason] += 1

    def decision(self, reason: str) -> None:
        self.decisions[reason] += 1

    def worker_report(self, info: WorkerInfo, report: WorkerReport) -> None:
        self._reports[info.epoch] = (info, report, self._clock())

    def worker_gone(self, info: WorkerInfo) -> None:
        """Keep its totals: a new stream to the same incarnation may go on from them, for an hour."""
        now = self._clock()
        entry = self._reports.pop(info.epoch, None)
        if entry is not None:
            self._gone[info.epoch] = (entry[1], now)
        for epoch, (report, since) in list(self._gone.items()):
            if now - since > FORGET_S and epoch not in self._reports:
                del self._gone[epoch]
                self._folded.update({name: getattr(report, name) for name in TOTALS})

    # Collector

    def collect(self) -> Iterator[Metric]:
        labels = ["model_name"]
        for name, (histogram, text) in self._histograms.items():
            buckets, total = histogram.samples()
            family = HistogramMetricFamily(name, text, labels=labels)
            family.add_metric([self._model], buckets=buckets, sum_value=total)
            yield family
        yield self._counter(
            "ellm_request_success", "Sequences by how they ended.", "finished_reason", self.finished
        )
        yield self._counter("ellm_request_errors", "Requests answered with an error.", "code", self.errors)
        yield self._counter(
            "ellm_admission_rejections", "Requests that were not admitted.", "reason", self.rejections
        )
        yield self._counter(
            "ellm_router_failovers", "Sequences moved to another worker.", "reason", self.failovers
        )
        yield self._counter("ellm_router_decisions", "Choices of a worker.", "reason", self.decisions)
        fallbacks = Counter({reason: self.decisions[reason] for reason in FALLBACKS})
        what = "Choices that could not go by reports, or by the controller's advice."
        yield self._counter("ellm_router_fallbacks", what, "reason", fallbacks)
        yield from self._attainment.families(self._model)
        yield from self._usage.families(self._model)
        yield from self._of_workers()

    def _observe(self, name: str, value: float) -> None:
        self._histograms[name][0].observe(value)

    def _counter(self, name: str, text: str, label: str, counts: Counter[str]) -> Metric:
        family = CounterMetricFamily(name, text, labels=["model_name", label])
        for key, count in sorted(counts.items()):
            family.add_metric([self._model, key], count)
        return family

    def _of_workers(self) -> Iterator[Metric]:
        for field, (name, text) in TOTALS.items():
            family = CounterMetricFamily(name, text, labels=["model_name"])
            family.add_metric([self._model], self._total(field))
            yield family
        # A worker and its successor may both be there: a gauge has one sample for each worker id.
        by_id = {info.worker_id: (info, report, at) for info, report, at in self._reports.values()}
        newest = list(by_id.values())
        for name, text, value in GAUGES.values():
            gauge = GaugeMetricFamily(name, text, labels=["model_name", "worker"])
            for info, report, _ in newest:
                gauge.add_metric([self._model, info.worker_id], value(report))
            yield gauge
        age = GaugeMetricFamily(
            "ellm_router_report_age_seconds",
            "Age of a worker's last report.",
            labels=["model_name", "worker"],
        )
        for info, _, at in newest:
            age.add_metric([self._model, info.worker_id], self._clock() - at)
        yield age

    def _total(self, field: str) -> float:
        """Over all incarnations ever seen, each at its newest known value."""
        gone = sum(getattr(r, field) for epoch, (r, _) in self._gone.items() if epoch not in self._reports)
        live = sum(getattr(report, field) for _, report, _ in self._reports.values())
        return float(self._folded[field] + gone + live)
