"""What a worker says about a sequence, once per engine step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities (natural log, of the model's own distribution before any penalty or temperature)."""

    logprob: float
    rank: int  # of the token itself, 1 is the most likely
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), most likely first


@dataclass(frozen=True, slots=True)
class SequenceOutput:
    """New tokens of one sequence. `output_index` counts from the original prompt, over all attempts.

    Exactly once: a receiver accepts it when `output_index` equals the number of tokens it has, drops
    it when lower, and treats higher as a gap (a failover).
    """

    request_id: str
    attempt: int
    output_index: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the end-of-text or stop token that ended it: the last of token_ids
    logprobs: tuple[TokenLogprobs, ...] | None = None  # one per token of token_ids
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None  # once, with the first output
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache
    error: tuple[str, str] | None = None  # (code of the error tree, message), with finish_reason "error"
    retry_after_s: float | None = None  # of an error that passes
    queue_time_s: float = 0.0  # with the first output: how long it waited in this worker until it was let in
    # What has happened to it in this worker since its last output that was not usual: (what, seconds after it
    # came, tokens concerned). Park, restore, preemption; never one per token.
    events: tuple[tuple[str, float, int], ...] = ()
