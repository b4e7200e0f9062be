"""What a soak sends: the same in each third of the run, so that a difference between thirds is the server's.

From a trace it takes the first third of the requests and sends them three times, at the trace's own rhythm.
Prompts differ each time: only lengths and gaps are repeated.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from ellm.loadtest.sim.traces import TraceRow

THIRDS = 3


def repeated(rows: Sequence[TraceRow], count: int, third_s: float, gather_s: float = 0.0) -> list[TraceRow]:
    """The first `count` rows three times, in `third_s` each. The row behind them says how long they took.

    gather_s: whoever comes within so many seconds comes at their end, all at once.
    """
    assert 0 < count < len(rows)
    factor = third_s / rows[count].arrival_s
    return [
        TraceRow(
            third * third_s + gathered(row.arrival_s * factor, gather_s), row.prompt_tokens, row.output_tokens
        )
        for third in range(THIRDS)
        for row in rows[:count]
    ]


def gathered(time_s: float, gather_s: float) -> float:
    return time_s if gather_s == 0.0 else (time_s // gather_s + 1.0) * gather_s


def write_thirds(rows: Sequence[TraceRow], target: Path) -> None:
    """As a file that `read_trace` reads."""
    with target.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("Timestamp", "Request tokens", "Response tokens"))
        writer.writerows((row.arrival_s, row.prompt_tokens, row.output_tokens) for row in rows)
