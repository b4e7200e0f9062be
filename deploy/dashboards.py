"""Grafana's dashboards, written from what they show: `python -m ellm.deploy.dashboards FOLDER`.

Every query goes by the variable `prefix`: `ellm` for the cluster's own page at /metrics, `ray_ellm` for what
Ray exports, where the same metrics are found per process.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OF = '{model_name=~"$model"}'
OF_WORKER = '{model_name=~"$model", worker=~"$worker"}'
RATE = "[$__rate_interval]"


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart: (query, legend) pairs. A `unit` is one of Grafana's."""

    title: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    stack: bool = False
    kind: str = "timeseries"
    width: int = 12
    text: str = ""


def rate(name: str, by: str = "model_name", more: str = "") -> str:
    where = OF[:-1] + (f", {more}" if more else "") + "}"
    return f"sum by ({by}) (rate(${{prefix}}_{name}_total{where}{RATE}))"


def quantiles(name: str) -> tuple[tuple[str, str], ...]:
    return tuple(
        (
            f"histogram_quantile({share}, sum by (le) (rate(${{prefix}}_{name}_bucket{OF}{RATE})))",
            f"p{round(100 * share)}",
        )
        for share in (0.5, 0.9, 0.99)
    )


def workers(name: str, legend: str = "{{worker}}") -> tuple[tuple[str, str], ...]:
    return ((f"max by (model_name, worker) (${{prefix}}_{name}{OF_WORKER})", legend),)


def attained(slo: str) -> str:
    where = f'slo="{slo}"'
    kept = rate("slo_attained", more=where)
    return f"{kept} / ({kept} + {rate('slo_missed', more=where)})"


def stat(title: str, query: str, unit: str = "short") -> Panel:
    return Panel(title, ((query, ""),), unit, kind="stat", width=4)


def memory(state: str) -> tuple[str, str]:
    where = OF_WORKER[:-1] + f', state="{state}"}}'
    return f"sum(${{prefix}}_kv_cache_tokens{where})", state


TTFT, TPOT, ITL = (
    "time_to_first_token_seconds",
    "time_per_output_token_seconds",
    "inter_token_latency_seconds",
)

DASHBOARDS: dict[str, tuple[str, tuple[Panel, ...]]] = {
    "overview": (
        "eLLM overview",
        (
            stat("Workers", f"count(${{prefix}}_num_requests_running{OF})"),
            stat("Running", f"sum(${{prefix}}_num_requests_running{OF})"),
            stat("Waiting", f"sum(${{prefix}}_num_requests_waiting{OF})"),
            stat("Parked", f"sum(${{prefix}}_parked_requests{OF})"),
            stat("Within SLO", attained("request"), "percentunit"),
            stat("Workers lost", f"sum(increase(${{prefix}}_workers_lost_total{OF}[1h])) or vector(0)"),
            Panel(
                "Tokens per second",
                (
                    (rate("generation_tokens"), "output {{model_name}}"),
                    (rate("prompt_tokens"), "prompt {{model_name}}"),
                ),
            ),
            Panel(
                "Requests ended per second",
                ((rate("request_success", "finished_reason"), "{{finished_reason}}"),),
            ),
            Panel("Time to first token", quantiles(TTFT), "s"),
            Panel("Time per output token", quantiles(TPOT), "s"),
            Panel("KV memory held", workers("kv_cache_usage_perc"), "percentunit"),
            Panel(
                "Turned away per second",
                (
                    (rate("admission_rejections", "reason"), "{{reason}}"),
                    (rate("request_errors", "code"), "error {{code}}"),
                ),
            ),
            Panel(
                "Prefix cache hits",
                ((f"{rate('prefix_cache_hits')} / {rate('prefix_cache_queries')}", "{{model_name}}"),),
                "percentunit",
            ),
            Panel("Steps", workers("step_time_seconds"), "s"),
        ),
    ),
    "memory": (
        "eLLM worker memory",
        (
            Panel(
                "KV pool by state",
                tuple(memory(state) for state in ("running", "parked", "cached", "free")),
                stack=True,
                width=24,
                text="Tokens of the device's pools. Cached blocks belong to nobody and can be hit.",
            ),
            Panel(
                "Context without KV",
                (
                    (f"sum(${{prefix}}_recomputing_tokens{OF_WORKER})", "recomputed in each step"),
                    (f"sum(${{prefix}}_streaming_tokens{OF_WORKER})", "streamed in each step"),
                    (f"sum(${{prefix}}_host_tokens{OF_WORKER})", "on the host"),
                    (f"sum(${{prefix}}_dropped_now_tokens{OF_WORKER})", "dropped"),
                ),
                stack=True,
            ),
            Panel("Uncached share of the context", workers("uncached_token_ratio"), "percentunit"),
            Panel("Headroom", workers("kv_cache_headroom_tokens")),
            Panel("Recompute debt", workers("recompute_debt_seconds"), "s"),
            Panel(
                "Tokens moved and computed again, per second",
                tuple(
                    (rate(f"{what}_tokens"), what)
                    for what in ("recomputed", "streamed", "saved", "loaded", "dropped", "hole")
                ),
            ),
            Panel(
                "Parks, restores, preemptions per second",
                tuple((rate(f"num_{what}"), what) for what in ("parks", "restores", "preemptions")),
            ),
            Panel("Host tier in use", workers("host_kv_usage_perc"), "percentunit"),
            Panel("Parked context", workers("parked_tokens")),
        ),
    ),
    "slo": (
        "eLLM SLOs",
        (
            Panel(
                "Share that got what it was promised",
                tuple(
                    (attained(slo), f"{slo} {{{{model_name}}}}")
                    for slo in ("request", "ttft", "tpot", "tpot_mean")
                ),
                "percentunit",
                width=24,
            ),
            Panel("Goodput, tokens per second", ((rate("slo_goodput_tokens"), "{{model_name}}"),)),
            Panel(
                "Time per token as a share of its SLO",
                quantiles("time_per_output_token_slo_ratio"),
                "percentunit",
            ),
            Panel("Time to first token", quantiles(TTFT), "s"),
            Panel("Of that, in the queue", quantiles("request_queue_time_seconds"), "s"),
            Panel("Of that, prefill", quantiles("request_prefill_time_seconds"), "s"),
            Panel("Time per output token", quantiles(TPOT), "s"),
            Panel("Between tokens", quantiles(ITL), "s"),
            Panel("Decode time", quantiles("request_decode_time_seconds"), "s"),
            Panel("Whole request", quantiles("e2e_request_latency_seconds"), "s"),
            Panel("Attainment as workers see it", workers("worker_slo_attainment_ratio"), "percentunit"),
        ),
    ),
    "router": (
        "eLLM router",
        (
            Panel("Choices per second", ((rate("router_decisions", "reason"), "{{reason}}"),)),
            Panel("Choices without reports or advice", ((rate("router_fallbacks", "reason"), "{{reason}}"),)),
            Panel(
                "Moved to another worker, per second", ((rate("router_failovers", "reason"), "{{reason}}"),)
            ),
            Panel(
                "Requests per router",
                ((f"sum by (router) (${{prefix}}_router_inflight_requests{OF})", "{{router}}"),),
            ),
            Panel(
                "Age of reports",
                ((f"max by (worker) (${{prefix}}_router_report_age_seconds{OF_WORKER})", "{{worker}}"),),
                "s",
            ),
            Panel("Controller followed", (("min by (router) (${prefix}_controller_seen)", "{{router}}"),)),
            Panel(
                "Without the controller's advice",
                ((f"sum by (reason) (rate(${{prefix}}_controller_absences_total{RATE}))", "{{reason}}"),),
            ),
            Panel("Prompt tokens per second of prefill", workers("prefill_rate_tokens_per_second")),
            Panel("Error of predicted step times", workers("cost_model_error_ratio"), "percentunit"),
            Panel("Queues", workers("num_requests_waiting")),
        ),
    ),
}


def dashboard(name: str) -> dict[str, Any]:
    """As Grafana imports it."""
    title, panels = DASHBOARDS[name]
    return {
        "uid": f"ellm-{name}",
        "title": title,
        "tags": ["ellm"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": _variables()},
        "panels": _placed(panels),
    }


def _variables() -> list[dict[str, Any]]:
    source = {"type": "prometheus", "uid": "${datasource}"}

    def found(name: str, query: str) -> dict[str, Any]:
        return {
            "name": name,
            "type": "query",
            "datasource": source,
            "query": {"query": query, "refId": name},
            "refresh": 2,
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
            "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        }

    prefixes = ("ellm", "ray_ellm")
    return [
        {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"},
        {
            "name": "prefix",
            "type": "custom",
            "label": "Metrics of",
            "query": ",".join(prefixes),
            "current": {"text": prefixes[0], "value": prefixes[0]},
            "options": [{"text": p, "value": p, "selected": p == prefixes[0]} for p in prefixes],
        },
        found("model", "label_values(${prefix}_num_requests_running, model_name)"),
        found("worker", 'label_values(${prefix}_num_requests_running{model_name=~"$model"}, worker)'),
    ]


def _placed(panels: tuple[Panel, ...]) -> list[dict[str, Any]]:
    made, x, y, row = [], 0, 0, 0
    for number, panel in enumerate(panels, 1):
        height = 4 if panel.kind == "stat" else 8
        if x + panel.width > 24:
            x, y, row = 0, y + row, 0
        place = {"x": x, "y": y, "w": panel.width, "h": height}
        x, row = x + panel.width, max(row, height)
        made.append(_panel(number, panel, place))
    return made


def _panel(number: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    custom: dict[str, Any] = {"fillOpacity": 30 if panel.stack else 8, "lineWidth": 1, "showPoints": "never"}
    if panel.stack:
        custom["stacking"] = {"mode": "normal"}
    defaults = {"unit": panel.unit, "min": 0} | ({"custom": custom} if panel.kind == "timeseries" else {})
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "gridPos": place,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + i), "expr": query, "legendFormat": legend}
            for i, (query, legend) in enumerate(panel.queries)
        ],
    }


def text(name: str) -> str:
    return json.dumps(dashboard(name), indent=1) + "\n"


if __name__ == "__main__":
    for name in DASHBOARDS:
        (Path(sys.argv[1]) / f"{name}.json").write_text(text(name))
