"""One step as data: what the brain tells an executor, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass

from ellm.worker.api.cost_model import StepFeatures
from ellm.worker.api.output import TokenLogprobs
from ellm.worker.api.request import SamplingParams


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What an executor decided at start; the brain plans within it."""

    num_blocks: int
    block_size: int  # tokens
    max_model_len: int  # tokens
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    memory: tuple[tuple[str, int], ...] = ()  # (what, bytes): how the pool was sized, for printing


@dataclass(frozen=True, slots=True)
class NewSequence:
    """Sent once per sequence and residence, with the first plan that names it: what the sampler must know."""

    seq_id: int
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]  # known before this residence (failover); counted by penalties
    sampling: SamplingParams
    choice_index: int


@dataclass(slots=True)
class PlanEntry:
    """Consecutive tokens of one sequence: a decode row (one token) or a prefill chunk.

    The tokens are those at positions [start, start + num_tokens). `token_ids` is empty when the single
    input token is the one sampled for this sequence by the plan before (not yet read back).
    `block_ids` covers positions [0, start + num_tokens); it may be longer. It is the sequence's live table:
    an executor reads it during `execute` only.
    """

    seq_id: int
    start: int
    num_tokens: int
    token_ids: tuple[int, ...]
    block_ids: list[int]
    samples: bool  # the last row's logits give the sequence's next token
    output_index: int = 0  # of the sampled token; the noise depends on it
    prompt_logprobs: bool = False  # every row keeps the LM head


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """One step. Entries with a single token come first (decode rows), then chunks, each in FCFS order."""

    step: int  # numbered from 0, no gaps
    entries: tuple[PlanEntry, ...]
    new: tuple[NewSequence, ...]  # sequences whose first entry is in this plan
    released: tuple[int, ...]  # seq_ids that no later plan names: their sampler state may go
    num_rows: int  # sum of num_tokens
    num_decode: int  # entries with one token that sample


@dataclass(frozen=True, slots=True)
class StepResult:
    """What an executor gives back for a plan."""

    step: int
    token_ids: tuple[int, ...]  # one per entry that samples, in the plan's order
    elapsed_s: float
    logprobs: dict[int, TokenLogprobs] | None = None  # seq_id -> of the sampled token, where asked for
    # seq_id -> one per row of the chunk: entry i scores the prompt token at position start + i + 1
    # (rows whose next token is not a prompt token give nothing).
    prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]] | None = None


def step_features(plan: BatchPlan) -> StepFeatures:
    """What the cost model needs to know of a plan. A decode row's pairs are its context, counted once as KV
    tokens; a chunk of n tokens after s has n * s + n * (n + 1) / 2 pairs."""
    kv_tokens = pairs = logits_rows = 0
    for entry in plan.entries:
        start, n = entry.start, entry.num_tokens
        kv_tokens += start + n
        if n > 1:
            pairs += n * start + n * (n + 1) // 2
        logits_rows += n if entry.prompt_logprobs else entry.samples
    return StepFeatures(plan.num_rows, plan.num_decode, kv_tokens, pairs, logits_rows)
