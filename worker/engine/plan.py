"""One step as data: what the brain tells an executor, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ellm.worker.api.cost_model import StepFeatures
from ellm.worker.api.output import TokenLogprobs
from ellm.worker.api.request import SamplingParams

# How rows of holes run beside the others of their step: in launches of attention of their own; in one launch
# with decode rows; one layer ahead of all other rows.
HoleWay = Literal["apart", "fused", "ahead"]
HOLE_WAYS: tuple[HoleWay, ...] = ("apart", "fused", "ahead")


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What an executor decided at start; the brain plans within it."""

    num_blocks: int
    block_size: int  # tokens
    max_model_len: int  # tokens
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    memory: tuple[tuple[str, int], ...] = ()  # (what, bytes): how the pool was sized, for printing
    num_host_blocks: int = 0  # of the host tier; 0: there is none
    # Blocks that all layers share, with ids [num_blocks, num_blocks + num_transient_blocks).
    num_transient_blocks: int = 0
    block_bytes: int = 0  # one block over all layers: what a copy moves; 0 where there is no host tier
    hole_ways: tuple[HoleWay, ...] = ()  # from which the brain chooses; fewer than two: nothing to choose


@dataclass(frozen=True, slots=True)
class NewSequence:
    """Sent once per sequence and residence, with the first plan that names it: what the sampler must know."""

    seq_id: int
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]  # known before this residence (failover); counted by penalties
    sampling: SamplingParams
    choice_index: int


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """One block's content, all layers, between the device's pool and the host's. Neither block is written,
    freed or given to another by the brain until a result says that the copy is done."""

    copy_id: int  # numbered from 0, no gaps
    block: int  # of the device's pool
    host_block: int


@dataclass(frozen=True, slots=True)
class StreamedBlock:
    """A block that is on the host only and is loaded for one step, layer by layer, into a transient block."""

    host_block: int
    transient_block: int  # in [num_blocks, num_blocks + num_transient_blocks)


@dataclass(slots=True)
class PlanEntry:
    """Consecutive tokens of one sequence: a decode row (one token), a prefill chunk, or recompute rows.

    Ids at and above `ModelLimits.num_blocks` in `block_ids` are transient blocks: they hold the positions
    of a hole, and are filled anew in every layer of every step that names them, by the recompute rows of the
    same sequence in the same plan or by `BatchPlan.streams`. A recompute entry covers whole transient blocks,
    never samples, and sees nothing past its own end. A sequence has at most one entry of each kind.

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
    recompute: bool = False  # rows of a hole: their KV goes to transient blocks, their hidden states nowhere


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """One step. Entries with a single token come first (decode rows), then chunks, each in FCFS order, then
    recompute entries.

    Copies are started with the step and run beside this one and later ones, in the order given, each
    direction on its own; nothing in a plan reads a block that is still being loaded. A plan without entries
    waits for the next copy to end (`StepResult.copies_done`). With `waits` set the step begins when all
    copies, its own included, have ended: this is what a blocking swap does.
    """

    step: int  # numbered from 0, no gaps
    entries: tuple[PlanEntry, ...]
    new: tuple[NewSequence, ...]  # sequences whose first entry is in this plan
    released: tuple[int, ...]  # seq_ids that no later plan names: their sampler state may go
    num_rows: int  # sum of num_tokens
    num_decode: int  # entries with one token that sample
    saves: tuple[BlockCopy, ...] = ()  # device to host
    loads: tuple[BlockCopy, ...] = ()  # host to device
    streams: tuple[StreamedBlock, ...] = ()
    waits: bool = False
    way: HoleWay | None = None  # of the rows of holes; None: the executor's own


@dataclass(frozen=True, slots=True)
class CopyTimes:
    """What the link did since the last result: bytes, and seconds in which it moved them."""

    saved_bytes: int = 0
    saved_s: float = 0.0
    loaded_bytes: int = 0
    loaded_s: float = 0.0


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
    copies_done: tuple[int, ...] = ()  # ids of saves and loads that have ended since the last result
    copies_failed: tuple[
        int, ...
    ] = ()  # of them, those that moved nothing: the target's content is undefined
    copy_times: CopyTimes | None = None
    # seq_id -> why it cannot go on, of sequences that have an entry; what they sampled means nothing.
    errors: dict[int, str] | None = None


def step_features(plan: BatchPlan) -> StepFeatures:
    """What the cost model needs to know of a plan. A decode row's pairs are its context, counted once as KV
    tokens; a chunk of n tokens after s has n * s + n * (n + 1) / 2 pairs."""
    kv_tokens = pairs = logits_rows = 0
    for entry in plan.entries:
        start, n = entry.start, entry.num_tokens
        kv_tokens += start + n
        if n > 1 or entry.recompute:
            pairs += n * start + n * (n + 1) // 2
        logits_rows += n if entry.prompt_logprobs else entry.samples
    return StepFeatures(plan.num_rows, plan.num_decode, kv_tokens, pairs, logits_rows)
