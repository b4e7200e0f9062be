"""What a router counts, declared as in worker/api/metrics.py."""

from __future__ import annotations

from ellm.router.histogram import E2E_BUCKETS, ITL_BUCKETS, TTFT_BUCKETS
from ellm.router.policies import POLICIES
from ellm.router.policies.candidates import FALLBACKS
from ellm.worker.api.metrics import PREFIX, STATES, Metric, counter, gauge

_M = "model_name"
RATIO_BUCKETS = (0.1, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)
SLOS = ("request", "tpot", "tpot_mean", "ttft")


def _one(*values: str) -> tuple[tuple[str, ...], ...]:
    return tuple((value,) for value in values)


def _histogram(
    name: str, text: str, buckets: tuple[float, ...] = E2E_BUCKETS, unit: str = "seconds"
) -> Metric:
    return Metric(PREFIX + name, "histogram", text, (_M,), unit, buckets)


TTFT = _histogram("time_to_first_token_seconds", "From arrival to the first token.", TTFT_BUCKETS)
ITL = _histogram("inter_token_latency_seconds", "Between two outputs of a sequence.", ITL_BUCKETS)
TPOT = _histogram("time_per_output_token_seconds", "Mean time per token after the first.", ITL_BUCKETS)
E2E = _histogram("e2e_request_latency_seconds", "From arrival to the last token.")
QUEUE = _histogram("request_queue_time_seconds", "In a worker's queue.")
PREFILL = _histogram(
    "request_prefill_time_seconds", "From arrival to the first token, but for the worker's queue."
)
DECODE = _histogram("request_decode_time_seconds", "From the first token to the last.")
SLO_RATIO = _histogram(
    "time_per_output_token_slo_ratio",
    "Mean time per output token, as a share of its SLO.",
    RATIO_BUCKETS,
    "ratio",
)
HISTOGRAMS = (TTFT, ITL, TPOT, E2E, QUEUE, PREFILL, DECODE, SLO_RATIO)

SUCCESS = counter(
    *("request_success", "Sequences by how they ended.", _M, "finished_reason"),
    known=_one("stop", "length", "abort", "error"),
)
ERRORS = counter(
    *("request_errors", "Requests answered with an error.", _M, "code"),
    known=_one("internal_error", "worker_failed", "deadline_exceeded"),
)
REJECTIONS = counter(
    *("admission_rejections", "Requests that were not admitted.", _M, "reason"),
    known=_one("queue_full", "rate_limit_exceeded", "unavailable"),
)
FAILOVERS = counter(
    *("router_failovers", "Sequences moved to another worker.", _M, "reason"),
    known=_one("death", "drain", "full", "gap", "lag"),
)
DECISIONS = counter(
    *("router_decisions", "Choices of a worker, by policy or by why it fell back.", _M, "reason"),
    known=_one(*POLICIES),
)
FALLBACK_CHOICES = counter(
    *("router_fallbacks", "Choices that could not go by reports, or by the controller's advice."),
    *(_M, "reason"),
    known=_one(*FALLBACKS),
)
LOST = counter(
    *("workers_lost", "Workers that died or fell silent without a word.", _M),
)  # counted once for all routers: a series of the worker, not of those who see it
ATTAINED = counter(
    *("slo_attained", "Sequences that got what they were promised.", _M, "slo"), known=_one(*SLOS)
)
MISSED = counter(
    *("slo_missed", "Sequences that did not get what they were promised.", _M, "slo"), known=_one(*SLOS)
)
GOODPUT = counter(*("slo_goodput_tokens", "Tokens of sequences that attained their SLOs.", _M), unit="tokens")
ATTAINMENT = gauge(
    *("slo_attainment_ratio", "Share of each router's last 256 sequences with an SLO that attained it."),
    *(_M, "slo"),
    unit="ratio",
)
TENANT_REQUESTS = counter("tenant_requests", "Sequences of an API key.", _M, "tenant", "finished_reason")
TENANT_PROMPT = counter("tenant_prompt_tokens", "Prompt tokens of an API key.", _M, "tenant", unit="tokens")
TENANT_OUTPUT = counter(
    "tenant_generation_tokens", "Output tokens of an API key.", _M, "tenant", unit="tokens"
)
ABSENCES = counter(
    *("controller_absences", "Times a router had to do without advice.", "reason"),
    known=_one("controller_away", "guidance_lapsed"),
)
SEEN = gauge("controller_seen", "1 while the router follows the controller's advice.", "router")
INFLIGHT = gauge("router_inflight_requests", "Sequences that a router has let in.", _M, "router")
REPORT_AGE = gauge(
    *("router_report_age_seconds", "Age of a worker's last report at a router.", _M, "worker", "router"),
    unit="seconds",
)
KEYS = gauge("api_keys", "API keys that a router knows.", "router")
KEY_RELOADS = counter(
    *(
        "api_key_reloads",
        "Times a changed file of API keys was read, or could not be and the old stayed.",
    ),
    "outcome",
    known=_one("loaded", "failed"),
)
KEY_FILE_BROKEN = gauge(
    *("api_key_file_broken", "1 while a router cannot read the file of API keys; those known before count."),
    "router",
)
AUDIT_LINES = counter(
    *("audit_lines", "Audit lines by what became of them.", "outcome"), known=_one("written", "lost")
)
WORKERS = gauge("workers", f"Workers by state: {', '.join(STATES)}.", _M, "state")
ROUTERS = gauge("routers", "Routers that this page speaks for.")
COMPLETE = gauge("metrics_complete", "1 where this page speaks for all routers, 0 where nobody adds them up.")

COUNTERS = (
    *(SUCCESS, ERRORS, REJECTIONS, FAILOVERS, DECISIONS, FALLBACK_CHOICES, LOST),
    *(ATTAINED, MISSED, GOODPUT, TENANT_REQUESTS, TENANT_PROMPT, TENANT_OUTPUT, ABSENCES),
    *(KEY_RELOADS, AUDIT_LINES),
)
GAUGES = (ATTAINMENT, SEEN, INFLIGHT, REPORT_AGE, KEYS, KEY_FILE_BROKEN, WORKERS, ROUTERS, COMPLETE)
DECLARED = (*HISTOGRAMS, *COUNTERS, *GAUGES)
# Of the last sequences with an SLO, how many there were and kept it: what the ratio of all is made of.
RECENT, RECENT_KEPT = PREFIX + "_slo_recent", PREFIX + "_slo_recent_kept"
