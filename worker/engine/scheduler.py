"""Which rows run in the next step: decode rows first, then chunks of prompts, then newcomers, under one
budget of rows.

Decode rows are never put off for a chunk. A sequence takes the blocks of all its known tokens when it is
admitted, so only decode rows can run short; then the last of the order gives way. The front of the order is
never preempted for another, so it always makes progress. What is admitted, how many rows chunks get and who
gives way is the policy's to say.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ellm.worker.engine.hole import Hole, recompute_entry, streamed_blocks
from ellm.worker.engine.plan import BatchPlan, PlanEntry, StreamedBlock
from ellm.worker.engine.policies.base import Policy
from ellm.worker.engine.residency import Residency
from ellm.worker.engine.sequence import Sequence, SequenceState
from ellm.worker.engine.state import EngineState


@dataclass(slots=True)
class ScheduledStep:
    """A plan, and whose its entries are."""

    plan: BatchPlan
    sequences: list[Sequence]


@dataclass(slots=True)
class _Draft:
    """A plan in the making, in its parts: decode rows, other single rows, chunks, recompute rows."""

    decode: list[PlanEntry] = field(default_factory=list)
    decode_seqs: list[Sequence] = field(default_factory=list)
    single: list[PlanEntry] = field(default_factory=list)
    single_seqs: list[Sequence] = field(default_factory=list)
    chunks: list[PlanEntry] = field(default_factory=list)
    chunk_seqs: list[Sequence] = field(default_factory=list)
    holes: list[PlanEntry] = field(default_factory=list)
    hole_seqs: list[Sequence] = field(default_factory=list)
    streams: list[StreamedBlock] = field(default_factory=list)
    num_rows: int = 0


class Scheduler:
    """Writes plans from the state; one per engine."""

    def __init__(self, state: EngineState, policy: Policy, residency: Residency) -> None:
        self._state = state
        self._policy = policy
        self._residency = residency
        self._next_step = 0

    def schedule(self, now: float, *, idle: bool) -> ScheduledStep | None:
        """The next plan, or None if no sequence can take a step now. At most one plan is outstanding; `idle`:
        none is, so that a plan may do nothing but wait for copies."""
        totals = self._state.totals
        stopped = totals.num_parks + totals.num_preemptions
        step = self._write(now, idle=idle)
        if step is None and idle and totals.num_parks + totals.num_preemptions > stopped:
            step = self._write(now, idle=idle)  # what they gave up is there now
        return step

    def _write(self, now: float, *, idle: bool) -> ScheduledStep | None:
        state, policy = self._state, self._policy
        policy.prepare(now)
        draft = _Draft()
        preemptions = state.totals.num_preemptions
        prefilling = self._plan_decode_rows(draft, now)
        num_decode = len(draft.decode)
        draft.num_rows += num_decode
        rows = min(
            state.config.max_step_tokens - draft.num_rows,
            policy.prefill_rows(state, num_decode, now),
        )
        spare = -1  # rows for those who are being restored; asked for once
        for seq in prefilling:
            if rows <= 0:
                break
            if seq.state is not SequenceState.RUNNING:  # it has given way to one before it
                continue
            if seq.first_token_at is None:
                rows -= self._plan_chunk(draft, seq, rows)
                continue
            if spare < 0:
                spare = policy.restore_rows(state, num_decode, now)
            taken = self._plan_chunk(draft, seq, min(rows, spare))
            rows -= taken
            spare -= taken
        if state.totals.num_preemptions == preemptions:
            self._admit(draft, rows, now)
        return self._seal(draft, idle=idle)

    def _plan_decode_rows(self, draft: _Draft, now: float) -> list[Sequence]:
        """A row for every running sequence that has only its newest token to compute; returns the others."""
        decodes = self._policy.decodes(self._state, now)
        block_size = self._state.block_size
        running = self._state.running
        most = self._state.config.max_step_tokens
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
            if position + 1 < known or seq.gap is not None:
                prefilling.append(seq)
                continue
            if not decodes or seq.rests or draft.num_rows + len(entries) >= most:
                continue
            block_ids = seq.table.block_ids
            if position >= len(block_ids) * block_size and not self._grow(seq, now):
                continue
            if seq.hole is not None and not self._fill_hole(draft, seq, seq.hole):
                continue
            token_ids = (seq.tokens[position],) if position < known else ()
            output_index = position + 1 - seq.num_prompt
            entries.append(PlanEntry(seq.seq_id, position, 1, token_ids, block_ids, True, output_index))
            seqs.append(seq)
            seq.num_planned = position + 1
            seq.num_outstanding += 1
        return prefilling

    def _fill_hole(self, draft: _Draft, seq: Sequence, hole: Hole) -> bool:
        """What fills the hole of `seq` in this step. False: not enough rows are left."""
        state = self._state
        rows = hole.num_rows(state.block_size)
        if draft.num_rows + len(draft.decode) + rows >= state.config.max_step_tokens:
            return False
        if rows:
            draft.holes.append(recompute_entry(seq, hole, state.block_size))
            draft.hole_seqs.append(seq)
            draft.num_rows += rows
        draft.streams.extend(streamed_blocks(seq, hole))
        return True

    def _grow(self, seq: Sequence, now: float) -> bool:
        """One more block for `seq`, taken from the parked, then from the end of the order, if need be. False:
        not in this step."""
        state, policy = self._state, self._policy
        while not state.pool.num_available:
            if state.pending_blocks or policy.blocks_coming():  # on their way back: nobody else need go
                return False
            if policy.reclaim(now):
                continue
            victim = policy.victim(state, seq)
            assert victim.key >= seq.key, "a sequence is preempted for one behind it"
            if victim is seq and len(state.running) == 1:
                # Nobody else runs: copies hold what it waits for, or parked sequences that a plan names.
                assert state.blocks_return, "a sequence that was let in does not fit alone"
                return False
            policy.evict(victim, now)
            if victim.state is SequenceState.PREEMPTED:
                victim.note("preempted", now)
            if victim is seq:
                return False
        seq.table.grow(state.pool, 1)
        return True

    def _plan_chunk(self, draft: _Draft, seq: Sequence, rows: int) -> int:
        """The next at most `rows` known tokens of `seq`; returns how many."""
        start, known = seq.num_planned, len(seq.tokens)
        count = min(rows, seq.num_ready(self._state.block_size))
        if count <= 0:  # the rest of its gap is being loaded: it goes on when the last load has ended
            return 0
        end = start + count
        samples = end == known and not seq.prefill_only
        # Not those again that a former residence has scored.
        scores = seq.prompt_logprobs is not None and len(seq.prompt_logprobs) < min(end + 1, seq.num_prompt)
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
            found = self._residency.find(seq)
            if found.num_taken > pool.num_available:
                return
            if not self._policy.may_admit(state, seq, found.num_taken, now):
                return
            state.waiting.pop()
            self._residency.start(seq, found, now)
            self._policy.admitted(seq, now)
            limit = rows
            if seq.first_token_at is not None:
                limit = min(rows, self._policy.restore_rows(state, len(draft.decode), now))
            rows -= self._plan_chunk(draft, seq, limit)

    def _seal(self, draft: _Draft, *, idle: bool) -> ScheduledStep | None:
        state, copies = self._state, self._state.copies
        if not (draft.decode or draft.single or draft.chunks) and not (
            idle and copies is not None and copies.under_way
        ):
            return None
        saves, loads = copies.take_new() if copies is not None else ((), ())
        plan = BatchPlan(
            step=self._next_step,
            entries=(*draft.decode, *draft.single, *draft.chunks, *draft.holes),
            new=tuple(state.new),
            released=tuple(state.released),
            num_rows=draft.num_rows,
            num_decode=len(draft.decode),
            saves=saves,
            loads=loads,
            streams=tuple(draft.streams),
            waits=self._policy.waits_for_copies(),
        )
        self._next_step += 1
        state.released.clear()
        state.new.clear()
        sequences = draft.decode_seqs + draft.single_seqs + draft.chunk_seqs + draft.hole_seqs
        return ScheduledStep(plan, sequences)
