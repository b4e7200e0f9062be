"""What a person sees while requests run: one line with rate, requests in flight, TTFT, TPOT and errors."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import TextIO

from ellm.loadtest.generator.record import Record

QUIET_PERIOD_S = 10.0  # where there is no terminal
MAX_SAMPLES = 500  # of a period, per process


@dataclass(slots=True)
class Progress:
    """Counts since the start, and figures of the requests that ended since the last `take`."""

    sent: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    tokens: int = 0
    cpu_s: float = 0.0
    ttft_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)

    def ended(self, record: Record) -> None:
        self.tokens += record.output_tokens
        if record.outcome == "failed":
            self.failed += 1
        elif record.outcome == "cancelled":
            self.cancelled += 1
        else:
            self.completed += 1
            if len(self.ttft_s) < MAX_SAMPLES:
                self.ttft_s.append(record.ttft_s)
                self.tpot_s.append(record.tpot_s)

    def take(self, cpu_s: float = 0.0) -> Progress:
        """A copy; the samples start anew."""
        taken = Progress(
            self.sent, self.completed, self.failed, self.cancelled, self.tokens, cpu_s,
            self.ttft_s, self.tpot_s,
        )  # fmt: skip
        self.ttft_s, self.tpot_s = [], []
        return taken


def summed(parts: Sequence[Progress]) -> Progress:
    """Of all processes."""
    total = Progress()
    for part in parts:
        total.sent += part.sent
        total.completed += part.completed
        total.failed += part.failed
        total.cancelled += part.cancelled
        total.tokens += part.tokens
        total.cpu_s += part.cpu_s
        total.ttft_s += part.ttft_s
        total.tpot_s += part.tpot_s
    return total


class LiveLine:
    """Overwritten twice a second on a terminal, written every ten seconds elsewhere."""

    def __init__(self, total: int, out: TextIO | None = None) -> None:
        self._out = sys.stderr if out is None else out
        self._tty = self._out.isatty()
        self._total = total
        self._begun = self._looked = time.monotonic()
        self._shown = self._begun
        self._sent = 0
        self._tokens = 0
        self._ttft_s: list[float] = []  # since the last line
        self._tpot_s: list[float] = []

    def show(self, now: Progress) -> None:
        """Progress of all processes, summed."""
        time_s = time.monotonic()
        self._ttft_s += now.ttft_s
        self._tpot_s += now.tpot_s
        if not self._tty and time_s - self._shown < QUIET_PERIOD_S:
            return
        span = max(1e-9, time_s - self._looked)
        now = replace(now, ttft_s=self._ttft_s, tpot_s=self._tpot_s)
        self._ttft_s, self._tpot_s = [], []
        text = line_of(now, time_s - self._begun, self._total, (now.sent - self._sent) / span,
                       (now.tokens - self._tokens) / span)  # fmt: skip
        self._looked, self._shown = time_s, time_s
        self._sent, self._tokens = now.sent, now.tokens
        if self._tty:
            width = shutil.get_terminal_size((120, 24)).columns
            self._out.write(f"\r\x1b[K{text[: width - 1]}")
        else:
            self._out.write(text + "\n")
        self._out.flush()

    def clear(self) -> None:
        if self._tty:
            self._out.write("\r\x1b[K")
            self._out.flush()


def line_of(now: Progress, elapsed_s: float, total: int, rate: float, tokens_s: float) -> str:
    """One line of at most about 120 characters."""
    running = now.sent - now.completed - now.failed - now.cancelled
    parts = [
        f"{elapsed_s:5.0f} s",
        f"sent {now.sent:,}/{total:,}",
        f"{rate:,.1f} req/s",
        f"in flight {running:,}",
        f"{tokens_s:,.0f} tok/s",
    ]
    if now.ttft_s:
        parts.append(f"TTFT {_ms(median(now.ttft_s))}  TPOT {_ms(median(now.tpot_s))}")
    if now.cancelled:
        parts.append(f"cancelled {now.cancelled:,}")
    parts.append(f"errors {now.failed:,}")
    return "  ".join(parts)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.1f} ms" if seconds < 10.0 else f"{seconds:,.1f} s"
