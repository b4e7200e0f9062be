"""Which rows run in the next step: decode rows first, then chunks of prompts, then newcomers, under one
budget of rows.

Decode rows are never put off for a chunk. A sequence takes the blocks of all its known tokens when it is
admitted, so only decode rows can run short; then the last of the order gives way. The front of the order is
never preempted for another, so it always makes progress. What is admitted, how many rows chunks get and who
gives way is the policy's to say.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ellm.worker.cache.block_table import num_blocks_for
from ellm.worker.engine.plan import BatchPlan, NewSequence, PlanEntry
from ellm.worker.engine.policies import Policy
from ellm.worker.engine.sequence import Sequence
from ellm.worker.engine.state import EngineState


@dataclass(slots=True)
class ScheduledStep:
    """A plan, and whose its entries are."""

    plan: BatchPlan
    sequences: list[Sequence]


@dataclass(slots=True)
class _Draft:
    """A plan in the making, in its three parts: decode rows, other single rows, chunks."""

    decode: list[PlanEntry] = field(default_factory=list)
    decode_seqs: list[Sequence] = field(default_factory=list)
    single: list[PlanEntry] = field(default_factory=list)
    single_seqs: list[Sequence] = field(default_factory=list)
    chunks: list[PlanEntry] = field(default_factory=list)
    chunk_seqs: list[Sequence] = field(default_factory=list)
    new: list[NewSequence] = field(default_factory=list)
    num_rows: int = 0


class Scheduler:
    """Writes plans from the state; one per engine."""

    def __init__(self, state: EngineState, policy: Policy) -> None:
        self._state = state
        self._policy = policy
        self._next_step = 0
        self._next_seq_id = 0

    def schedule(self, now: float) -> ScheduledStep | None:
        """The next plan, or None if no sequence can take a step now. At most one plan is outstanding."""
        state = self._state
        draft = _Draft()
        preemptions = state.totals.num_preemptions
        prefilling = self._plan_decode_rows(draft)
        num_decode = draft.num_rows = len(draft.decode)
        rows = min(
            state.config.max_step_tokens - num_decode,
            self._policy.prefill_rows(state, num_decode, now),
        )
        for seq in prefilling:
            if rows <= 0:
                break
            rows -= self._plan_chunk(draft, seq, rows)
        if state.totals.num_preemptions == preemptions:
            self._admit(draft, rows, now)
        return self._seal(draft)

    def _plan_decode_rows(self, draft: _Draft) -> list[Sequence]:
        """A row for every running sequence that has only its newest token to compute; returns the others."""
        block_size = self._state.block_size
        running = self._state.running
        entries, seqs, prefilling = draft.decode, draft.decode_seqs, []
        index = 0
        while index < len(running):  # its tail may be preempted on the way
            seq = running[index]
            index += 1
            position, known = seq.num_planned, len(seq.tokens)
            if position + 1 >= seq.max_total:  # its last token is being sampled
                if position < known and seq.prefill_only:
                    prefilling.append(seq)
                continue
            if position + 1 < known:
                prefilling.append(seq)
                continue
            block_ids = seq.table.block_ids
            if position >= len(block_ids) * block_size and not self._grow(seq):
                continue
            token_ids = (seq.tokens[position],) if position < known else ()
            output_index = position + 1 - seq.num_prompt
            entries.append(PlanEntry(seq.seq_id, position, 1, token_ids, block_ids, True, output_index))
            seqs.append(seq)
            seq.num_planned = position + 1
            seq.num_outstanding += 1
        return prefilling

    def _grow(self, seq: Sequence) -> bool:
        """One more block for `seq`, taken from the end of the order if need be. False: not in this step."""
        state = self._state
        while not state.pool.num_available:
            if state.pending_blocks:  # on their way back: nobody else need go
                return False
            victim = self._policy.victim(state, seq)
            assert victim.key >= seq.key, "a sequence is preempted for one behind it"
            assert victim is not seq or len(state.running) > 1, (
                "a sequence that was let in does not fit alone"
            )
            state.preempt(victim)
            if victim is seq:
                return False
        seq.table.grow(state.pool, 1)
        return True

    def _plan_chunk(self, draft: _Draft, seq: Sequence, rows: int) -> int:
        """The next at most `rows` known tokens of `seq`; returns how many."""
        start, known = seq.num_planned, len(seq.tokens)
        count = min(rows, known - start)
        end = start + count
        samples = end == known and not seq.prefill_only
        scores = seq.prompt_logprobs is not None and start < seq.num_prompt - 1
        token_ids = tuple(seq.tokens[start:end])
        output_index = known - seq.num_prompt if samples else 0
        entry = PlanEntry(
            seq.seq_id, start, count, token_ids, seq.table.block_ids, samples, output_index, scores
        )
        if count > 1:
            draft.chunks.append(entry)
            draft.chunk_seqs.append(seq)
        elif samples:
            draft.decode.append(entry)
            draft.decode_seqs.append(seq)
        else:
            draft.single.append(entry)
            draft.single_seqs.append(seq)
        draft.num_rows += count
        seq.num_planned = end
        seq.num_outstanding += 1
        return count

    def _admit(self, draft: _Draft, rows: int, now: float) -> None:
        """Start waiting sequences, strictly in order, while there are rows, places and blocks."""
        state = self._state
        pool = state.pool
        while rows > 0 and len(state.running) < state.max_num_seqs and pool.num_available:
            seq = state.waiting.peek()
            if seq is None or seq.num_outstanding:
                return
            hits = self._find_hits(seq)
            num_new = num_blocks_for(len(seq.tokens), state.block_size) - len(hits)
            num_taken = num_new + pool.num_cached_of(hits)
            if num_taken > pool.num_available:
                return
            if not self._policy.may_admit(state, seq, num_taken, now):
                return
            state.waiting.pop()
            self._start(draft, seq, hits, num_new)
            rows -= self._plan_chunk(draft, seq, rows)

    def _find_hits(self, seq: Sequence) -> list[int]:
        """Blocks of the longest cached prefix of `seq` that it may use."""
        state = self._state
        if not state.prefix_caching:
            return []
        num_blocks = seq.num_hittable // state.block_size
        return state.pool.index.find(seq.hashes(num_blocks, state.block_size)[:num_blocks])

    def _start(self, draft: _Draft, seq: Sequence, hits: list[int], num_new_blocks: int) -> None:
        """Give `seq` its blocks and a place among those who run; the executor learns of it with this plan."""
        state = self._state
        seq.table.adopt(state.pool, hits)
        seq.table.grow(state.pool, num_new_blocks)
        found = len(hits) * state.block_size
        seq.num_planned = seq.num_computed = found
        seq.num_committed = len(hits)
        if seq.num_cached_tokens is None:
            seq.num_cached_tokens = min(found, seq.num_prompt)
            state.totals.prompt_tokens += seq.num_prompt
            if state.prefix_caching:
                state.totals.prefix_queries += len(seq.tokens)
                state.totals.prefix_hits += found
        seq.seq_id = self._next_seq_id
        self._next_seq_id += 1
        state.start(seq)
        request = seq.request
        outputs = tuple(seq.tokens[seq.num_prompt :])
        draft.new.append(
            NewSequence(seq.seq_id, request.prompt_ids, outputs, request.sampling, request.choice_index)
        )

    def _seal(self, draft: _Draft) -> ScheduledStep | None:
        if not (draft.decode or draft.single or draft.chunks):
            return None
        state = self._state
        plan = BatchPlan(
            step=self._next_step,
            entries=(*draft.decode, *draft.single, *draft.chunks),
            new=tuple(draft.new),
            released=tuple(state.released),
            num_rows=draft.num_rows,
            num_decode=len(draft.decode),
        )
        self._next_step += 1
        state.released.clear()
        return ScheduledStep(plan, draft.decode_seqs + draft.single_seqs + draft.chunk_seqs)
