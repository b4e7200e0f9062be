"""What the engine knows at one moment: who runs, who waits, which blocks are whose, and the totals so far.

EngineCore's parts share one of these and are its only writers; policies read it. It decides nothing.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter, deque
from collections.abc import Iterable
from collections.abc import Sequence as List
from dataclasses import dataclass

from ellm.worker.api.config import CacheConfig, SchedulerConfig
from ellm.worker.api.errors import ConfigError
from ellm.worker.cache.block_pool import BlockPool
from ellm.worker.engine.copies import Copies
from ellm.worker.engine.plan import ModelLimits, NewSequence
from ellm.worker.engine.sequence import Sequence, SequenceState
from ellm.worker.engine.waiting_queue import WaitingQueue


@dataclass(slots=True)
class Totals:
    """Since the engine's start; none ever falls. The fields are those of WorkerReport."""

    num_steps: int = 0
    num_preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    recomputed_tokens: int = 0
    busy_s: float = 0.0
    num_parks: int = 0
    num_restores: int = 0
    dropped_tokens: int = 0
    saved_tokens: int = 0
    loaded_tokens: int = 0
    streamed_tokens: int = 0
    hole_tokens: int = 0


def _check_config(config: SchedulerConfig) -> None:
    """Raise ConfigError for a limit that would stop the engine."""
    for name in ("max_num_seqs", "max_step_tokens", "max_waiting"):
        if getattr(config, name) < 1:
            raise ConfigError(f"{name} must be at least 1", param=f"scheduler.{name}")
    if config.pipeline_depth not in (1, 2):
        raise ConfigError("pipeline_depth must be 1 or 2", param="scheduler.pipeline_depth")
    if not 0.0 <= config.watermark < 1.0:
        raise ConfigError("watermark must be at least 0 and below 1", param="scheduler.watermark")


class EngineState:
    """Sequences and blocks. `running` is sorted by `Sequence.key`: the oldest of the best priority first.
    `parked` is in no order. The blocks of both are referenced; `host` holds copies of full blocks."""

    def __init__(self, limits: ModelLimits, config: SchedulerConfig, cache: CacheConfig) -> None:
        _check_config(config)
        self.limits = limits
        self.config = config
        self.prefix_caching = cache.prefix_caching
        self.indexes = cache.prefix_caching  # whether full blocks are named; who parks needs it, too
        self.block_size = limits.block_size
        self.pool = BlockPool(limits.num_blocks, limits.block_size)
        first = limits.num_blocks
        self.transient = list(range(first + limits.num_transient_blocks - 1, first - 1, -1))  # free ones
        self.host: BlockPool | None = None
        self.copies: Copies | None = None
        if limits.num_host_blocks:
            self.host = BlockPool(limits.num_host_blocks, limits.block_size)
            self.copies = Copies(self.pool, self.host)
        # Rounded up: a share of a small pool still leaves a block to grow into.
        self.watermark_blocks = -int(-config.watermark * limits.num_blocks // 1)
        # Every running sequence gets at least one row of each step.
        self.max_num_seqs = min(config.max_num_seqs, config.max_step_tokens)
        self.running: list[Sequence] = []
        self.parked: list[Sequence] = []
        self.waiting = WaitingQueue(config.max_waiting)
        self.live: dict[str, Sequence] = {}  # request id -> sequence, until it is finished
        self.pending_blocks = 0  # of sequences that run no more, held until no plan names them
        self.new: list[NewSequence] = []  # residences that the executor has not been told of
        self.released: list[int] = []  # seq_ids that the executor has not been told of
        self.totals = Totals()
        # When those ended that had a promise, and whether it was kept; the last of them.
        self.kept: deque[tuple[float, bool]] = deque(maxlen=256)

    @property
    def max_total_tokens(self) -> int:
        """Prompt and output together that one sequence may reach: the model's context or the whole pool."""
        return min(self.limits.max_model_len, self.limits.num_blocks * self.block_size)

    @property
    def blocks_return(self) -> bool:
        """Blocks come free by themselves: a copy holds them, or a parked sequence that a plan still names."""
        copies = self.copies is not None and bool(self.copies.under_way)
        return copies or bool(self.pending_blocks) or any(seq.num_outstanding for seq in self.parked)

    def start(self, seq: Sequence) -> None:
        """`seq`, just popped from the queue, runs from now on."""
        seq.state = SequenceState.RUNNING
        insort(self.running, seq, key=lambda s: s.key)

    def preempt(self, seq: Sequence) -> None:
        """Back to the queue. Outputs stay; KV goes, though hashed blocks can be hit until evicted."""
        self._leave(seq)
        seq.state = SequenceState.PREEMPTED
        self.forget_saved(seq, 0)
        self.waiting.push(seq)
        self.totals.num_preemptions += 1

    def finish(self, seq: Sequence) -> None:
        """No token of `seq` is of interest any more."""
        del self.live[seq.request.request_id]
        if seq.state is SequenceState.RUNNING or seq.state is SequenceState.PARKED:
            self._leave(seq)
            seq.state = SequenceState.FINISHED
            self.forget_saved(seq, 0)
        else:
            seq.state = SequenceState.FINISHED
            self.waiting.discard(seq)

    def plan_returned(self, seq: Sequence) -> None:
        """One plan fewer names `seq`, which does not run: its blocks go with the last, or stay if parked."""
        if seq.num_outstanding == 0 and seq.state is not SequenceState.PARKED:
            self.pending_blocks -= len(seq.table)
            self._release(seq)

    def _leave(self, seq: Sequence) -> None:
        holders = self.parked if seq.state is SequenceState.PARKED else self.running
        if holders[-1] is seq:
            holders.pop()
        else:
            holders.remove(seq)
        self.end_residence(seq)
        if seq.num_outstanding:
            self.pending_blocks += len(seq.table)
        else:
            self._release(seq)

    def end_residence(self, seq: Sequence) -> None:
        """The executor forgets it; it gets a new name when it comes back."""
        if seq.seq_id < 0:
            return
        told = [new for new in self.new if new.seq_id != seq.seq_id]
        if len(told) == len(self.new):
            self.released.append(seq.seq_id)
        self.new = told  # it never ran, if it was among these
        seq.seq_id = -1

    def forget_saved(self, seq: Sequence, keep: int) -> None:
        """Let go of the host's copies from block `keep` on; the host may still be asked for them by hash."""
        if len(seq.saved) > keep:
            assert self.host is not None
            self.host.release(seq.saved[keep:])
            del seq.saved[keep:]
            seq.num_saved = min(seq.num_saved, keep)

    def drop_gap(self, seq: Sequence) -> None:
        """Nothing more is loaded for `seq`. Loads under way end by themselves."""
        gap, seq.gap = seq.gap, None
        if gap is not None:
            sources = gap.sources[: gap.claimed - gap.first]
            assert self.host is not None or all(source < 0 for source in sources)
            if self.host is not None:
                self.host.release([source for source in sources if source >= 0])

    def drop_hole(self, seq: Sequence) -> None:
        """Its transient blocks are free; what is in their place in the table is the caller's to see to."""
        hole, seq.hole = seq.hole, None
        if hole is not None:
            self.transient.extend(seq.table.block_ids[hole.first : hole.end])

    def _release(self, seq: Sequence) -> None:
        self.drop_gap(seq)
        self.drop_hole(seq)
        seq.rests = False
        seq.table.clear(self.pool)
        seq.epoch += 1
        seq.num_planned = seq.num_computed = seq.num_committed = 0

    def check(self, outstanding: List[List[Sequence]]) -> None:
        """Raise AssertionError unless every invariant holds; `outstanding` are the sequences of each plan
        that has not come back. O(blocks + sequences)."""
        self.pool.check()
        self.waiting.check()
        self._check_sequences(outstanding)
        named = {id(seq): seq for seqs in outstanding for seq in seqs}  # twice, with a hole
        holders = {id(seq): seq for seq in (*self.running, *self.parked)} | named
        counted = Counter(block for seq in holders.values() for block in seq.table.block_ids)
        self._check_host(holders.values(), counted)
        self._check_transient(holders.values(), counted)
        for block in range(self.pool.num_blocks):
            assert counted[block] == self.pool.references(block), f"block {block}: wrong reference count"
        stays = (SequenceState.RUNNING, SequenceState.PARKED)
        pending = [seq for seq in named.values() if seq.state not in stays]
        assert sum(len(seq.table) for seq in pending) == self.pending_blocks, "wrong number of pending blocks"

    def _check_transient(self, holders: Iterable[Sequence], counted: Counter[int]) -> None:
        first, count = self.pool.num_blocks, self.limits.num_transient_blocks
        counted.update(self.transient)
        assert all(counted[block] == 1 for block in range(first, first + count)), "transient: wrong count"
        for seq in holders:
            ids = seq.table.block_ids
            places = [i for i, block in enumerate(ids) if block >= first]
            hole = range(seq.hole.first, seq.hole.end) if seq.hole is not None else range(0)
            assert places == list(hole), "a hole and its table disagree"

    def _check_host(self, holders: Iterable[Sequence], counted: Counter[int]) -> None:
        """Add to `counted` the pool's blocks that copies hold; check the host's blocks."""
        if self.host is None or self.copies is None:
            return
        self.host.check()
        self.copies.check()
        blocks, host_blocks = self.copies.count()
        counted.update(blocks)
        for seq in holders:
            host_blocks.update(seq.saved)
            assert seq.num_saved <= len(seq.saved)
            if seq.gap is not None:
                unclaimed = seq.gap.sources[: seq.gap.claimed - seq.gap.first]
                host_blocks.update(source for source in unclaimed if source >= 0)
        for block in range(self.host.num_blocks):
            assert host_blocks[block] == self.host.references(block), f"host block {block}: wrong count"

    def _check_sequences(self, outstanding: List[List[Sequence]]) -> None:
        keys = [seq.key for seq in self.running]
        assert keys == sorted(set(keys)), "running sequences are out of order"
        assert len(self.running) <= self.max_num_seqs, "too many sequences run"
        plans = Counter(name for seqs in outstanding for name in {id(seq) for seq in seqs})
        present = {id(seq) for seq in (*self.running, *self.waiting, *self.parked)}
        assert present == {id(seq) for seq in self.live.values()}, "a live sequence neither runs nor waits"
        for seq in self.waiting:
            assert len(seq.table) == 0 or plans[id(seq)], "a waiting sequence holds blocks"
        for seq in self.parked:
            assert seq.state is SequenceState.PARKED
            assert seq.gap is None
            assert seq.num_outstanding == plans[id(seq)], "wrong number of plans of a parked sequence"
            assert seq.seq_id >= 0 or seq.num_computed == len(seq.table) * self.block_size
        for seq in self.running:
            assert seq.state is SequenceState.RUNNING
            assert seq.num_outstanding == plans[id(seq)], "wrong number of plans of a sequence"
            assert len(seq.table) * self.block_size >= seq.num_planned >= seq.num_computed
            assert seq.num_planned <= len(seq.tokens) + seq.num_outstanding - (seq.num_outstanding > 0)
            assert seq.num_planned < seq.max_total or seq.prefill_only, "planned past the last token"
