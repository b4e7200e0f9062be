"""What a person sees of a simulation: a line per policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_COLUMNS = (  # (title, key, format)
    ("tok/s", "throughput_tok_s", "{:.0f}"),
    ("goodput", "goodput_tok_s", "{:.0f}"),
    ("of bound", "goodput_of_bound", "{:.3f}"),
    ("SLO", "slo_attainment", "{:.3f}"),
    ("strict goodput", "goodput_strict_tok_s", "{:.0f}"),
    ("strict SLO", "slo_attainment_strict", "{:.3f}"),
    ("TTFT mean", "ttft_mean_s", "{:.3g} s"),
    ("p50", "ttft_p50_s", "{:.3g} s"),
    ("p99", "ttft_p99_s", "{:.3g} s"),
    ("TPOT mean", "tpot_mean_s", "{:.3f} s"),
    ("p99", "tpot_p99_s", "{:.3f} s"),
    ("gap p99", "gap_p99_s", "{:.3f} s"),
    ("preempt.", "preemptions", "{:.0f}"),
    ("recomp./tok", "recomputed_per_output_token", "{:.3f}"),
    ("uncached", "uncached_ratio_mean", "{:.3f}"),
)


def table(policies: dict[str, dict[str, Any]]) -> list[str]:
    """Lines, a title first."""
    rows = [["policy", *(title for title, _, _ in _COLUMNS)]]
    rows += [
        [name, *(form.format(figures[key]) for _, key, form in _COLUMNS)]
        for name, figures in policies.items()
    ]
    return align(rows)


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def in_bytes(count: float) -> str:
    """Memory as people say it: decimal units."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"


def headline(result: dict[str, Any]) -> list[str]:
    """What was simulated, and the numbers that every result must stand beside."""
    s = result["setting"]
    gpus = s["gpu"] if s["tp"] == 1 else f"{s['tp']} x {s['gpu']}"
    count, seeds = len(result["requests"]["output_tokens"]), ", ".join(map(str, result["seeds"]))
    lines = [
        f"{s['model']} on {gpus}, {s['workload']}: {count} requests at {result['rate']:.3g} req/s, "
        f"load {result['load']:.3g} of capacity, cv {s['cv']:g}, seeds {seeds}",
        f"SLO {s['tpot_slo_ms']:g} ms = {result['slo_over_full_step']:.2f} x a step at full memory "
        f"({1e3 * result['full_step_s']:.1f} ms); KV pool {result['capacity_tokens']:,} tokens = "
        f"{result['pool_over_weights']:.3g} x the weights; host {s['host_gb']:g} GB",
        f"bound {result['bound_tok_s']:.0f} tok/s; where a policy names no others: max_num_seqs "
        f"{s['max_num_seqs']}, watermark {s['watermark']:g}, steps of {s['max_step_tokens']} tokens",
    ]
    if result["left_out"]:
        lines.append(f"{result['left_out']} requests of the trace are longer than the pool and were left out")
    return lines
