"""Records -> figures. Definitions are those of `vllm bench serve` and DistServe; docs/bench.md states them.

Pure: no clock, no I/O.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

from ellm.loadtest.generator.options import Slo
from ellm.loadtest.generator.record import Record

GRACE_TOKENS = 4  # of the strict attainment: token i is due at t_first + SLO * (i + 4)
PERCENTILES = (50, 90, 95, 99)


def summarise(records: Sequence[Record], slo: Slo) -> dict[str, Any]:
    """The figures of all that are not warm-up. Seconds, tokens, shares; means of nothing are None.

    Time runs from when the first was due to when the last ended.
    """
    measured = [record for record in records if not record.warmup]
    done = [record for record in measured if record.outcome == "completed"]
    failed = [record for record in measured if record.outcome == "failed"]
    begin = min((record.due_s for record in measured), default=0.0)
    duration = max((record.end_s for record in measured), default=0.0) - begin
    per_s = 1.0 / duration if duration > 0.0 else 0.0
    last_due = max((record.due_s for record in measured), default=0.0)
    tokens = sum(record.output_tokens for record in done)
    prompts = sum(record.prompt_tokens for record in done)
    good = [record for record in done if attains(record, slo)]
    counted = len(done) + len(failed)
    share = 1.0 / counted if counted else 0.0
    strict = sum(attains_strictly(record, slo) for record in done)
    return {
        "completed": len(done),
        "failed": len(failed),
        "cancelled": len(measured) - counted,
        "duration_s": duration,
        "offered_req_s": (len(measured) - 1) / (last_due - begin) if last_due > begin else None,
        "completed_req_s": len(done) * per_s,
        "input_tokens": prompts,
        "cached_tokens": sum(record.cached_tokens for record in done),
        "output_tokens": tokens,
        "output_tok_s": tokens * per_s,
        "total_tok_s": (tokens + prompts) * per_s,
        **spread("ttft", [record.ttft_s for record in done]),
        **spread("tpot", [record.tpot_s for record in done if record.output_tokens > 1]),
        **spread("itl", gaps(done)),
        **spread("e2e", [record.e2e_s for record in done]),
        "goodput_req_s": len(good) * per_s if slo else None,
        "goodput_tok_s": sum(record.output_tokens for record in good) * per_s if slo else None,
        "slo_attainment": len(good) * share if slo else None,
        "slo_attainment_strict": strict * share if slo else None,
        "slo": slo.named(),
        **spread("send_late", [record.late_s for record in measured if record.sent_s]),
        "ttft_from_send_mean_s": mean([record.first_s - record.sent_s for record in done]),
        "max_in_flight": max_in_flight(measured),
        "errors": dict(Counter(record.error for record in failed).most_common()),
    }


def attains(record: Record, slo: Slo) -> bool:
    """Whether every limit that is set is kept by the request's own figure (one token has a TPOT of 0)."""
    return all(getattr(record, name) <= limit for name, limit in slo.named().items())


def attains_strictly(record: Record, slo: Slo) -> bool:
    """The same with the TPOT limit on each token: token i comes by t_first + SLO * (i + 4)."""
    if slo.tpot_s is None:
        return attains(record, slo)
    if not attains(record, Slo(slo.ttft_s, None, slo.e2e_s)):
        return False
    first = record.first_s
    return all(time - first <= slo.tpot_s * (i + GRACE_TOKENS) for i, time in enumerate(record.token_times()))


def gaps(records: Sequence[Record]) -> list[float]:
    """Between chunks of one answer that carry output, of all answers."""
    return [later - earlier for record in records for earlier, later in pairwise(record.chunk_times)]


def spread(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """Mean, deviation, percentiles and the largest, in seconds."""
    ordered = sorted(values)
    middle = mean(ordered)
    figures: dict[str, float | None] = {f"{name}_mean_s": middle, f"{name}_std_s": None}
    if middle is not None:
        figures[f"{name}_std_s"] = math.sqrt(fmean((value - middle) ** 2 for value in ordered))
    for percent in PERCENTILES:
        figures[f"{name}_p{percent}_s"] = percentile(ordered, percent)
    figures[f"{name}_max_s"] = ordered[-1] if ordered else None
    return figures


def mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def percentile(ordered: Sequence[float], percent: float) -> float | None:
    """Linear between the two nearest ranks, as numpy's; None of nothing."""
    if not ordered:
        return None
    place = (len(ordered) - 1) * percent / 100.0
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def max_in_flight(records: Sequence[Record]) -> int:
    """Requests between their sending and their end, at most."""
    changes = sorted(
        [(record.sent_s, 1) for record in records if record.sent_s]
        + [(record.end_s, -1) for record in records if record.sent_s]
    )
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def attainment_over_slo(
    records: Sequence[Record], slo: Slo, factors: Sequence[float]
) -> list[tuple[float, float]]:
    """(factor, share that attains the SLO times the factor): how far the limits are from what was served."""
    measured = [r for r in records if not r.warmup and r.outcome != "cancelled"]
    limits = slo.named().items()
    worst = [
        max((getattr(r, name) / limit for name, limit in limits), default=0.0)
        if r.outcome == "completed"
        else math.inf
        for r in measured
    ]
    return [(factor, sum(w <= factor for w in worst) / max(1, len(worst))) for factor in factors]
