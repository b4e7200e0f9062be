"""One self-contained HTML page: the figures and their plots as inline SVG. No script, no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

from ellm.loadtest.generator import text
from ellm.loadtest.generator.summary import percentile
from ellm.loadtest.generator.svg import Mark, Series, plot

BINS = 40
_STATES = (
    ("cached_tokens", "with KV"), ("recomputing_tokens", "recomputed"), ("streaming_tokens", "streamed"),
    ("parked_tokens", "parked"), ("free_tokens", "free"),
)  # fmt: skip
_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:1180px;padding:0 1em;color:#1e293b}
h1{font-size:1.4em;margin-bottom:.2em}h2{font-size:1.1em;margin:1.6em 0 .4em}pre{background:#f1f5f9;
padding:1em;overflow-x:auto;font-size:13px;border-radius:6px}.plots{display:grid;gap:14px;
grid-template-columns:repeat(auto-fill,minmax(480px,1fr))}
svg{width:100%;background:#fff;border:1px solid #e2e8f0;border-radius:6px}
.title{font-size:13px;font-weight:600}.tick{font-size:11px;fill:#475569}.middle{text-anchor:middle}
.end{text-anchor:end}.grid{stroke:#e2e8f0}.axis{stroke:#64748b}.mark{stroke:#64748b;stroke-dasharray:4 3}
"""
Result = Mapping[str, Any]


def run_page(result: Result) -> str:
    """One run."""
    target = result["target"]
    title = f"{target['model']} at {target['url']}"
    sections = [
        ("Figures", _pre(text.summary_lines(result))),
        ("Distributions", _plots([distribution([("", result)], *kind) for kind in DISTRIBUTIONS])),
        ("Over time", _plots(_timeline(result))),
    ]
    if result["summary"]["slo"]:
        sections.append(("Goodput against the SLO", _plots([_attainment([("", result)])])))
    if result["workers"]:
        sections.append(("Memory of the workers", _plots(_memory(result))))
    sections.append(("What was asked for", _pre(_asked(result))))
    return _page(title, f"{result['started_at']}, {target['endpoint']} {target['server']}", sections)


def sweep_page(results: Sequence[Result], highest: Mapping[str, float | None] | None = None) -> str:
    """Several rates, and what a search found."""
    ordered = sorted(results, key=lambda result: float(result["options"]["rate"]))
    rates = [float(result["options"]["rate"]) for result in ordered]

    def curve(label: str, key: str, scale: float = 1.0) -> Series:
        values = [result["summary"][key] for result in ordered]
        return Series(label, rates, [None if v is None else scale * v for v in values], "points")

    ms, rate = 1e3, "requests per second"
    plots = [
        plot("TTFT, ms", rate, [curve("p50", "ttft_p50_s", ms), curve("p99", "ttft_p99_s", ms)]),
        plot("TPOT, ms", rate, [curve("p50", "tpot_p50_s", ms), curve("p99", "tpot_p99_s", ms)]),
        plot("Requests/s", rate, [curve("completed", "completed_req_s"), curve("good", "goodput_req_s")]),
        plot("Output tokens/s", rate, [curve("all", "output_tok_s"), curve("good", "goodput_tok_s")]),
        plot(
            "Attainment, %",
            rate,
            [
                curve("mean TPOT", "slo_attainment", 100.0),
                curve("every token", "slo_attainment_strict", 100.0),
            ],
            [Mark(f"{share} %: {found:.3g}/s", x=found) for share, found in (highest or {}).items() if found],
        ),
    ]  # fmt: skip
    target = ordered[0]["target"]
    lines = text.sweep_lines(ordered)
    for share, found in (highest or {}).items():
        lines.append(
            f"{share} % attain up to {'no rate tried' if found is None else f'{found:.4g} requests/s'}"
        )
    sections = [
        ("Figures", _pre(lines)),
        ("By rate", _plots(plots)),
        ("What was asked for", _pre(_asked(ordered[0]))),
    ]
    return _page(
        f"{target['model']} at {target['url']}: {len(ordered)} rates", ordered[0]["started_at"], sections
    )


def compare_page(a: Result, b: Result, names: tuple[str, str]) -> str:
    """Two runs, A and B."""
    both = [(f"A {names[0]}", a), (f"B {names[1]}", b)]
    plots = [distribution(both, *kind) for kind in DISTRIBUTIONS]
    if a["summary"]["slo"] and b["summary"]["slo"]:
        plots.append(_attainment(both))
    sections = [("Figures", _pre(text.compare_lines(a, b, names))), ("Distributions", _plots(plots))]
    return _page(f"{names[0]} and {names[1]}", "A and B on the same scales", sections)


def _gaps(result: Result) -> list[float]:
    return [b - a for request in _done(result) for a, b in pairwise(request["chunk_offsets_s"])]


def _done(result: Result) -> list[Mapping[str, Any]]:
    return [request for request in result["requests"] if request["outcome"] == "completed"]


def _of(name: str, result: Result) -> list[float]:
    if name == "itl":
        return _gaps(result)
    return [request[f"{name}_s"] for request in _done(result) if request[f"{name}_s"] is not None]


DISTRIBUTIONS = (
    ("ttft", "Time to the first token"),
    ("tpot", "Mean time per output token"),
    ("itl", "Gaps between chunks"),
    ("e2e", "Time to the last token"),
)


def distribution(results: Sequence[tuple[str, Result]], name: str, title: str) -> str:
    """A histogram of one run, with its median and p99; of several runs the shares up to each value."""
    values = [(label, sorted(1000 * value for value in _of(name, result))) for label, result in results]
    if len(values) > 1:
        curves = []
        for label, ordered in values:
            points = [percentile(ordered, i / 2.0) for i in range(200)]  # the last half percent is all tail
            curves.append(Series(label, [p for p in points if p is not None], [i / 2.0 for i in range(200)]))
            if not ordered:
                curves.pop()
        return plot(f"{title}: % of all within", "ms", curves)
    ordered = values[0][1]
    if not ordered:
        return plot(title, "ms", [])
    low, high = ordered[0], percentile(ordered, 99.5) or 0.0
    width = max((high - low) / BINS, 1e-6)
    counts = [0] * BINS
    for value in ordered:
        if value <= high:
            counts[min(BINS - 1, int((value - low) / width))] += 1
    middle, late = percentile(ordered, 50), percentile(ordered, 99)
    marks = [Mark(f"p50 {middle:.3g}", x=middle), Mark(f"p99 {late:.3g}", x=late)]
    bars = Series(title, [low + i * width for i in range(BINS)], counts, "bars", width)
    return plot(f"{title} (count; without the slowest 0.5 %)", "ms", [bars], marks)


def _timeline(result: Result) -> list[str]:
    t = result["timeline"]
    x = t["time_s"]
    ttft = [None if value is None else 1000 * value for value in t["ttft_median_s"]]
    return [
        plot("Requests per second", "s", [
            Series("due", x, t["due_req_s"]), Series("ended", x, t["ended_req_s"]),
            Series("failed", x, t["failed_req_s"]),
        ]),
        plot("In flight", "s", [Series("in flight", x, t["in_flight"])]),
        plot("Output tokens per second", "s", [Series("tokens", x, t["output_tok_s"])]),
        plot("Median TTFT of what was due then, ms", "s", [Series("TTFT", x, ttft)]),
    ]  # fmt: skip


def _attainment(results: Sequence[tuple[str, Result]]) -> str:
    factors = [0.1 * i for i in range(1, 41)]
    curves = []
    for label, result in results:
        limits = result["summary"]["slo"]
        worst = [
            max((request[name] or 0.0) / limit for name, limit in limits.items()) for request in _done(result)
        ]
        count = max(1, result["summary"]["completed"] + result["summary"]["failed"])
        shares = [100 * sum(value <= factor for value in worst) / count for factor in factors]
        curves.append(Series(label or "attain", factors, shares))
    return plot(
        "Requests that attain, %", "the SLO times", curves, [Mark("the SLO", x=1.0), Mark("90 %", y=90.0)]
    )


def _memory(result: Result) -> list[str]:
    """A stacked area per worker: tokens of its pool by state."""
    plots = []
    for worker in sorted({row["worker"] for row in result["workers"]}):
        rows = [row for row in result["workers"] if row["worker"] == worker]
        x = [row["time_s"] for row in rows]
        areas = [Series(label, x, [row[key] for row in rows], "area") for key, label in _STATES]
        plots.append(plot(f"{worker}: tokens", "s", areas))
        lines = [
            Series(label, x, [row.get(key) for row in rows])
            for key, label in (
                ("num_running", "running"),
                ("num_waiting", "waiting"),
                ("num_parked", "parked"),
            )
        ]
        plots.append(plot(f"{worker}: requests", "s", lines))
    return plots


def _asked(result: Result) -> list[str]:
    return [f"{name:16} {value}" for name, value in result["options"].items() if value not in (None, {}, [])]


def _plots(plots: Sequence[str]) -> str:
    return f'<div class="plots">{"".join(plots)}</div>'


def _pre(lines: Sequence[str]) -> str:
    return f"<pre>{escape(chr(10).join(lines))}</pre>"


def _page(title: str, below: str, sections: Sequence[tuple[str, str]]) -> str:
    body = "".join(f"<h2>{escape(name)}</h2>{content}" for name, content in sections)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{escape(title)}</h1><p>{escape(below)}</p>{body}</body></html>\n"
    )


def page_of(title: str, below: str, texts: Sequence[tuple[str, Sequence[str]]], plots: Sequence[str]) -> str:
    """A page of text and plots made elsewhere."""
    return _page(title, below, [*((name, _pre(lines)) for name, lines in texts), ("Plots", _plots(plots))])
