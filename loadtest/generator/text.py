"""Results as tables of text: one run, several rates, two runs side by side. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SPREADS = (("ttft", "TTFT"), ("tpot", "TPOT"), ("itl", "ITL"), ("e2e", "E2E"), ("send_late", "sent late"))
COMPARED = (
    "completed", "failed", "completed_req_s", "output_tok_s", "ttft_mean_s", "ttft_p50_s", "ttft_p99_s",
    "tpot_mean_s", "tpot_p99_s", "itl_p99_s", "e2e_mean_s", "e2e_p99_s", "goodput_req_s", "slo_attainment",
)  # fmt: skip
HIGHER_IS_BETTER = {"completed", "completed_req_s", "output_tok_s", "goodput_req_s", "slo_attainment"}
LATE_S = 0.01  # beyond this the generator itself is worth a word


def summary_lines(result: Mapping[str, Any]) -> list[str]:
    """One run, as a person reads it."""
    s = result["summary"]
    lines = [
        f"{s['completed']:,} completed, {s['failed']:,} failed, {s['cancelled']:,} cancelled in "
        f"{s['duration_s']:.1f} s; at most {s['max_in_flight']:,} in flight",
        f"requests/s {_number(s['completed_req_s'])} (offered {_number(s['offered_req_s'])})   "
        f"output tokens/s {_number(s['output_tok_s'])}   all tokens/s {_number(s['total_tok_s'])}",
        "",
        *table([("ms", "mean", "p50", "p90", "p99", "max"), *_spread_rows(s)]),
    ]
    if s["slo_attainment"] is not None:
        limits = ", ".join(f"{name[:-2].upper()} {1000 * x:g} ms" for name, x in s["slo"].items())
        lines += [
            "",
            f"goodput {_number(s['goodput_req_s'])} requests/s, {_number(s['goodput_tok_s'])} tokens/s: "
            f"{100 * s['slo_attainment']:.1f} % keep {limits} "
            f"({100 * s['slo_attainment_strict']:.1f} % with every token in time)",
        ]
    lines += [f"error, {count:,} times: {error}" for error, count in s["errors"].items()]
    if (s["send_late_p99_s"] or 0.0) > LATE_S:
        lines.append(
            f"The generator was late itself (p99 {1000 * s['send_late_p99_s']:.1f} ms): TTFT and E2E count "
            "from when a request was due. More --processes or a free core help."
        )
    if result.get("interrupted"):
        lines.append("Interrupted: the figures are of what had ended, what ran counts as failed.")
    return lines


def _spread_rows(s: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (name, *(_ms(s[f"{key}_{column}_s"]) for column in ("mean", "p50", "p90", "p99", "max")))
        for key, name in SPREADS
    ]


def sweep_lines(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """One row per rate."""
    head = ("rate", "completed/s", "output tok/s", "TTFT mean ms", "TTFT p99 ms", "TPOT mean ms",
            "ITL p99 ms", "failed", "goodput/s", "attained")  # fmt: skip
    rows: list[tuple[str, ...]] = [head]
    for result in sorted(results, key=lambda result: float(result["options"]["rate"])):
        s = result["summary"]
        attained = s["slo_attainment"]
        rows.append(
            (
                f"{float(result['options']['rate']):.4g}",
                _number(s["completed_req_s"]),
                _number(s["output_tok_s"]),
                *(_ms(s[name]) for name in ("ttft_mean_s", "ttft_p99_s", "tpot_mean_s", "itl_p99_s")),
                f"{s['failed']:,}",
                _number(s["goodput_req_s"]),
                "-" if attained is None else f"{100 * attained:.1f} %",
            )
        )
    return table(rows)


def compare_lines(a: Mapping[str, Any], b: Mapping[str, Any], names: tuple[str, str]) -> list[str]:
    """Figures of both, B / A, and which of the two is better."""
    rows: list[tuple[str, ...]] = [("", *names, "B / A", "better")]
    for key in COMPARED:
        left, right = a["summary"].get(key), b["summary"].get(key)
        shown = _ms if key.endswith("_s") and not key.endswith(("req_s", "tok_s")) else _number
        ratio = right / left if left and right is not None else None
        better = ""
        if ratio is not None and ratio != 1.0:
            better = "B" if (ratio > 1.0) == (key in HIGHER_IS_BETTER) else "A"
        label = key.removesuffix("_s") + " ms" if shown is _ms else key
        rows.append((label, shown(left), shown(right), "-" if ratio is None else f"{ratio:.3f}", better))
    lines = table(rows)
    for what, x, y in differences(a, b):
        lines.append(f"not the same: {what}: {x} and {y}")
    return lines


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """What was asked for differently; without it a comparison compares two workloads."""
    one, other = a.get("options", {}), b.get("options", {})
    ignored = {"url", "headers", "processes", "timeout_s", "model"}
    return [
        (name, one.get(name), other.get(name))
        for name in sorted((set(one) | set(other)) - ignored)
        if one.get(name) != other.get(name)
    ]


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns wide enough for their cells; the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:,.2f}"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"
