"""A run second by second: what came, what ended, what was in flight. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ellm.loadtest.generator.record import Record

MAX_STEPS = 600  # longer runs have longer steps


def timeline(records: Sequence[Record]) -> dict[str, Any]:
    """Columns of equal length; one entry per step of `step_s` seconds, from the run's start. With the
    warm-up: what the server did then is part of what it does after."""
    end = max((max(record.end_s, record.due_s) for record in records), default=0.0)
    step = max(1.0, math.ceil(end / MAX_STEPS))
    count = max(1, math.ceil(end / step + 1e-9))

    def at(time: float) -> int:
        return min(count - 1, max(0, int(time / step)))

    due, ended, failed, tokens, flight = ([0.0] * count for _ in range(5))
    ttft: list[list[float]] = [[] for _ in range(count)]
    for record in records:
        due[at(record.due_s)] += 1 / step
        (failed if record.outcome == "failed" else ended)[at(record.end_s)] += 1 / step
        share = record.output_tokens / max(1, len(record.chunk_times))
        for time in record.chunk_times:
            tokens[at(time)] += share / step
        if record.chunk_times:
            ttft[at(record.due_s)].append(record.ttft_s)
        _overlap(flight, record.sent_s, record.end_s, step)
    return {
        "step_s": step,
        "time_s": [i * step for i in range(count)],
        "due_req_s": due,
        "ended_req_s": ended,
        "failed_req_s": failed,
        "output_tok_s": tokens,
        "in_flight": flight,
        "ttft_median_s": [sorted(values)[len(values) // 2] if values else None for values in ttft],
    }


def _overlap(flight: list[float], start: float, end: float, step: float) -> None:
    """Add the share of each step that lies between the two."""
    first, last = max(0, int(start / step)), min(len(flight) - 1, int(end / step))
    for i in range(first, last + 1):
        flight[i] += max(0.0, min(end, (i + 1) * step) - max(start, i * step)) / step
