"""What became of one request. Times are seconds since the start of the run, by one monotonic clock."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Literal

Outcome = Literal["completed", "failed", "cancelled"]


@dataclass(slots=True)
class Record:
    """Filled in by a client while its request runs; read by the summary and the reports."""

    index: int
    session: int
    turn: int
    due_s: float
    planned_prompt_tokens: int
    planned_output_tokens: int
    warmup: bool = False
    sent_s: float = 0.0  # when the request was written; 0 for one that never was
    end_s: float = 0.0
    status: int = 0  # of HTTP; 0 for gRPC and for a connection that never answered
    outcome: Outcome = "completed"
    error: str = ""
    finish_reason: str = ""
    prompt_tokens: int = 0  # as the server counted; else as planned
    output_tokens: int = 0  # as the server counted; else chunks
    cached_tokens: int = 0
    chunk_times: array[float] = field(default_factory=lambda: array("d"))  # of those that carry output
    chunk_tokens: array[int] = field(default_factory=lambda: array("i"))  # where the server says them
    text: str = ""  # kept for the next turn only

    @property
    def first_s(self) -> float:
        return self.chunk_times[0] if self.chunk_times else 0.0

    @property
    def late_s(self) -> float:
        """From when it was due to when it was written."""
        return self.sent_s - self.due_s

    @property
    def ttft_s(self) -> float:
        """From when it was due: waiting in the generator is waiting."""
        return self.first_s - self.due_s

    @property
    def e2e_s(self) -> float:
        """To the last token."""
        return self.chunk_times[-1] - self.due_s if self.chunk_times else self.end_s - self.due_s

    @property
    def tpot_s(self) -> float:
        """Mean time per token after the first; 0 for a single token."""
        if self.output_tokens < 2 or not self.chunk_times:
            return 0.0
        return (self.chunk_times[-1] - self.chunk_times[0]) / (self.output_tokens - 1)

    def token_times(self) -> list[float]:
        """When each token came. Where a chunk's tokens are not known they are shared out evenly."""
        chunks, tokens = len(self.chunk_times), max(self.output_tokens, len(self.chunk_times))
        if not chunks:
            return []
        if len(self.chunk_tokens) == chunks:
            return [
                time
                for time, count in zip(self.chunk_times, self.chunk_tokens, strict=True)
                for _ in range(count)
            ]
        return [self.chunk_times[i * chunks // tokens] for i in range(tokens)]
