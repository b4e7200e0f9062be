"""One request inside the engine: its tokens, how far it is computed, and where it stands.

    waiting --admit--> running --finish--> finished
       ^                  |  ^
       +--- preempted <---+  +---> parked       (any live state) --abort, finish--> finished

Up to two plans may name a sequence at once. `num_planned` counts positions that some plan covers,
`num_computed` those whose plan has come back; a position at or above `len(tokens)` is planned while its token
is still being sampled.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from ellm.worker.api.block_hash import BlockHash, next_hash, root_hash
from ellm.worker.api.output import TokenLogprobs
from ellm.worker.api.request import EngineRequest
from ellm.worker.cache.block_table import BlockTable, num_blocks_for
from ellm.worker.engine.gap import Gap

if TYPE_CHECKING:
    from ellm.worker.engine.hole import Hole


MAX_EVENTS = 32  # that wait for an output


class SequenceState(Enum):
    WAITING = "waiting"  # never ran
    RUNNING = "running"  # holds blocks, may be named by plans
    PARKED = "parked"  # paused; holds the blocks that nobody has needed yet
    PREEMPTED = "preempted"  # waiting again; its blocks go once no plan names them
    FINISHED = "finished"


class Sequence:
    """Owned by EngineCore alone; nothing outside the engine holds one."""

    __slots__ = (
        "admitted_at",
        "arrived_at",
        "block_hashes",
        "epoch",
        "events",
        "first_index",
        "first_token_at",
        "gap",
        "high_water",
        "hole",
        "late",
        "max_total",
        "min_total",
        "num_cached_tokens",
        "num_committed",
        "num_computed",
        "num_outstanding",
        "num_planned",
        "num_prompt",
        "num_saved",
        "order",
        "prompt_logprobs",
        "redone",
        "request",
        "rests",
        "salt",
        "saved",
        "seq_id",
        "since",
        "state",
        "stop_ids",
        "table",
        "tokens",
        "tpot_slo_s",
        "ttft_slo_s",
    )

    def __init__(self, request: EngineRequest, order: int, eos_token_ids: frozenset[int]) -> None:
        sampling = request.sampling
        self.request = request
        self.salt = request.salt  # of its block hashes: blocks are shared within one salt only
        self.order = order  # of arrival; never changes, so a preempted sequence keeps its place
        self.seq_id = -1  # of this residence: the executor's name for it while it runs
        self.epoch = 0  # counts how often its blocks went, whole or in part
        self.since = 0.0  # when it was last admitted, parked or resumed
        self.state = SequenceState.WAITING
        self.tokens: list[int] = [*request.prompt_ids, *request.output_ids]
        self.num_prompt = len(request.prompt_ids)
        self.max_total = self.num_prompt + sampling.max_tokens
        self.min_total = self.num_prompt + sampling.min_tokens
        eos = frozenset[int]() if sampling.ignore_eos else eos_token_ids
        self.stop_ids = eos.union(sampling.stop_token_ids) if sampling.stop_token_ids else eos
        self.table = BlockTable()
        self.gap: Gap | None = None
        self.hole: Hole | None = None
        self.rests = False  # no decode row for now: something is to be done once no plan names it
        self.saved: list[int] = []  # the host's blocks that hold, or will hold, its leading blocks
        self.num_saved = 0  # of them, those that hold them
        self.num_planned = 0
        self.num_computed = 0
        self.num_outstanding = 0  # plans that name it and have not come back
        self.num_committed = 0  # leading blocks that were offered to the prefix index in this residence
        self.high_water = 0  # positions that were computed once, in any residence
        self.block_hashes: list[BlockHash] = []
        self.first_token_at: float | None = None  # the first that this engine made
        self.first_index = self.num_prompt  # its position
        self.arrived_at = 0.0
        self.admitted_at = 0.0  # for the first time
        self.tpot_slo_s = request.tpot_slo_s
        self.ttft_slo_s = request.ttft_slo_s
        self.events: list[tuple[str, float, int]] = []  # to go out with its next output
        self.redone = 0  # tokens computed again in this residence
        self.late = False  # a token came after its deadline, the first among them
        self.num_cached_tokens: int | None = None  # of the prompt, at the first admission
        # [None, score of token 1, score of token 2, ...] as they come in; None: not asked for. A request that
        # resumes has had its first output, and these with it.
        wanted = sampling.prompt_logprobs is not None and not request.output_ids
        self.prompt_logprobs: list[TokenLogprobs | None] | None = [None] if wanted else None

    @property
    def key(self) -> tuple[int, int]:
        """The one order of the engine: lower runs first and is preempted last."""
        return (self.request.priority, self.order)

    @property
    def prefill_only(self) -> bool:
        """Asked for no token (max_tokens 0): it ends when its prompt is scored."""
        return self.max_total == self.num_prompt

    @property
    def num_hittable(self) -> int:
        """Leading tokens that need not run again if their KV is found: not the last, whose logits are needed,
        and none whose logits a prompt score still needs."""
        if self.prompt_logprobs is not None and len(self.prompt_logprobs) < self.num_prompt:
            return len(self.prompt_logprobs) - 1
        return len(self.tokens) - 1

    def num_ready(self, block_size: int) -> int:
        """Known tokens that rows can compute from here on: up to those that are being loaded."""
        limit = len(self.tokens)
        if self.gap is not None:
            computed = num_blocks_for(self.num_planned, block_size)
            limit = min(limit, self.gap.front_end(computed) * block_size)
        return limit - self.num_planned

    def note(self, what: str, now: float, tokens: int = 0) -> None:
        """Something that its router should know of. Bounded: nobody reads on and on."""
        if len(self.events) < MAX_EVENTS:
            self.events.append((what, max(0.0, now - self.arrived_at), tokens))

    def take_events(self) -> tuple[tuple[str, float, int], ...]:
        events, self.events = tuple(self.events), []
        return events

    def hashes(self, num_blocks: int, block_size: int) -> list[BlockHash]:
        """Chain hashes of at least the first `num_blocks` full blocks; computed once."""
        hashes, tokens = self.block_hashes, self.tokens
        while len(hashes) < num_blocks:
            start = len(hashes) * block_size
            parent = hashes[-1] if hashes else root_hash(self.salt)
            hashes.append(next_hash(parent, tokens[start : start + block_size]))
        return hashes
