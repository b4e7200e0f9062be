"""What a worker says of itself: pushed with every stream heartbeat, numbered, at least every 100 ms."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

WorkerState = Literal["loading", "ready", "draining", "failed"]


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What never changes in one incarnation of a worker."""

    worker_id: str
    epoch: str  # of this incarnation
    model: str  # the served name
    node: str
    max_model_len: int  # tokens, prompt and output together
    block_size: int  # tokens
    num_blocks: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    device: str
    dtype: str
    deterministic: bool  # STRICT
    tensor_parallel_size: int = 1
    rank_pids: tuple[int, ...] = ()
    memory: tuple[tuple[str, int], ...] = ()  # (what, bytes): how the KV pool was sized
    tpot_slo_s: float | None = None  # of requests that bring none
    ttft_slo_s: float | None = None
    grammars: bool = False  # SamplingParams.grammar is obeyed
    start_s: tuple[tuple[str, float], ...] = ()  # (phase, seconds): what its start took


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """The engine's load and totals. Totals count from the incarnation's start and never fall."""

    seq: int
    state: WorkerState = "ready"
    num_running: int = 0
    num_waiting: int = 0
    free_blocks: int = 0  # neither referenced nor cached
    cached_blocks: int = 0  # unreferenced, but their content can still be hit
    num_blocks: int = 0
    headroom_tokens: int = 0  # block_size * (free + cached - growth reserve)
    running_tokens: int = 0  # context of all admitted requests
    waiting_tokens: int = 0  # prompt tokens in the queue
    uncached_tokens: int = 0
    uncached_token_ratio: float = 0.0
    num_parked: int = 0
    recompute_debt_s: float = 0.0
    step_time_s: float = 0.0  # moving average
    cost_model_error: float = 0.0  # relative, moving average
    since_last_step_s: float = 0.0  # 0 while there is nothing to do: a stall is work without a step
    peak_memory_bytes: int = 0
    # Totals.
    num_steps: int = 0
    num_preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries: int = 0  # tokens looked up
    prefix_hits: int = 0  # tokens found
    recomputed_tokens: int = 0  # computed again after a preemption
    busy_s: float = 0.0  # time in steps
    last_submit_seq: tuple[tuple[str, int], ...] = field(default=())  # (router id, its newest submit seen)
    num_parks: int = 0
    num_restores: int = 0  # of parked requests that had given up blocks
    dropped_tokens: int = 0  # KV given up without a copy on the host
    saved_tokens: int = 0  # KV copied to the host
    loaded_tokens: int = 0  # KV copied back
    # Of this moment, again: what a router and the controller predict with.
    prefill_rate_tok_s: float = 0.0  # prompt rows per second while prompts are computed or wait; average
    parked_tokens: int = 0  # context of parked requests, cached or not
    host_tokens: int = 0  # of the uncached: they have a copy in the host tier
    dropped_now_tokens: int = 0  # of the uncached: they must be computed again
    recomputing_tokens: int = 0  # of the uncached: recomputed within each step
    streaming_tokens: int = 0  # of the uncached: streamed from the host within each step
    host_blocks_used: int = 0
    num_host_blocks: int = 0
    slack_s: tuple[float, float, float] = (0.0, 0.0, 0.0)  # least, median, most of the running
    slo_attainment: float = 1.0  # share of recently ended requests that kept theirs
    max_running: int = 0  # sequences the scheduler would run at most
    prefix_digest: bytes = b""  # of the prefix index; see worker/api/prefix_digest.py
    # Totals.
    streamed_tokens: int = 0  # KV streamed from the host within steps
    hole_tokens: int = 0  # KV recomputed within steps for holes of running requests
    # Of this moment.
    prefill_tokens: int = 0  # prompt tokens of running requests that no step has covered yet
    decode_step_s: tuple[float, float, float] = (0.0, 0.0, 0.0)  # constant, per sequence, per context token
