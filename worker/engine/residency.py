"""Where a sequence's KV is, and every way in which that changes: start, park, release, resume, save, load.

    RUNNING --park--> PARKED: all its blocks stay until somebody needs them
    PARKED: `release_tail` gives up blocks from the end: free where the host has a copy, else to be recomputed
    PARKED --resume--> RUNNING: what is gone is loaded from the back and computed from the front (`Gap`)

The mechanism only; who is parked and when is the policy's to say. A full host tier is no error: blocks are
then dropped instead of saved.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass

from ellm.worker.cache.block_table import num_blocks_for
from ellm.worker.engine.copies import Copies
from ellm.worker.engine.gap import Gap
from ellm.worker.engine.plan import NewSequence, StepResult
from ellm.worker.engine.sequence import Sequence, SequenceState
from ellm.worker.engine.state import EngineState


@dataclass(frozen=True, slots=True)
class Found:
    """What is left of a sequence's KV behind the blocks that it holds."""

    blocks: list[int]  # of the device, directly behind: they extend the first run
    num_new: int  # blocks to allocate for all its known tokens, if there is no later run on the device
    num_taken: int  # of the pool's available blocks that starting it takes at most


class Residency:
    """One per engine."""

    def __init__(self, state: EngineState) -> None:
        self._state = state
        self._next_seq_id = 0

    def find(self, seq: Sequence) -> Found:
        """Look up the blocks behind those that `seq` holds. O(hits), plus hashing once."""
        state, held = self._state, len(seq.table)
        blocks: list[int] = []
        if state.indexes:
            num_full = seq.num_hittable // state.block_size
            blocks = state.pool.index.find(seq.hashes(num_full, state.block_size)[held:num_full])
        num_new = num_blocks_for(len(seq.tokens), state.block_size) - held - len(blocks)
        return Found(blocks, num_new, num_new + state.pool.num_cached_of(blocks))

    def start(self, seq: Sequence, found: Found, now: float) -> None:
        """Give `seq`, popped from the queue, blocks for all its known tokens, and let it run."""
        state = self._state
        self.fill(seq, found)
        held = seq.num_computed
        if seq.num_cached_tokens is None:
            seq.num_cached_tokens = min(held, seq.num_prompt)
            seq.admitted_at = now
            state.totals.prompt_tokens += seq.num_prompt
            if state.prefix_caching:
                state.totals.prefix_queries += len(seq.tokens)
                state.totals.prefix_hits += held
        self.begin_residence(seq)
        seq.since = now
        state.start(seq)

    def park(self, seq: Sequence, now: float) -> None:
        """Pause a running sequence that has no gap. Nothing is given up yet."""
        assert seq.state is SequenceState.RUNNING
        assert seq.gap is None, "a sequence is parked while it is restored"
        assert seq.hole is None, "a sequence is parked with a hole"
        state = self._state
        state.running.remove(seq)
        state.parked.append(seq)
        seq.state = SequenceState.PARKED
        seq.since = now
        seq.note("parked", now)
        state.totals.num_parks += 1

    def num_releasable(self, seq: Sequence) -> int:
        """Blocks that a parked sequence can give up now."""
        return 0 if seq.num_outstanding else len(seq.table)

    def release_tail(self, seq: Sequence, count: int) -> int:
        """Give up at least the last `count` blocks of a parked sequence that no plan names, and in any case
        what is not full. Returns how many came free: not those that are shared or still being copied."""
        assert seq.state is SequenceState.PARKED
        assert not seq.num_outstanding
        state, size = self._state, self._state.block_size
        state.end_residence(seq)
        before = state.pool.num_available
        held = min(len(seq.table) - count, seq.num_computed // size)
        dropped = seq.num_computed - max(held, seq.num_saved) * size
        state.totals.dropped_tokens += max(0, dropped)
        seq.table.cut(state.pool, len(seq.table) - held)
        seq.num_planned = seq.num_computed = held * size
        seq.num_committed = min(seq.num_committed, held)
        return state.pool.num_available - before

    def blocks_to_resume(self, seq: Sequence) -> int:
        """Blocks that `resume` would take at most, with room for one token more."""
        return num_blocks_for(len(seq.tokens) + 1, self._state.block_size) - len(seq.table)

    def resume(self, seq: Sequence, now: float) -> bool:
        """Let a parked sequence run again. False: a plan still names it, or there are not enough blocks."""
        state = self._state
        if seq.num_outstanding or len(state.running) >= state.max_num_seqs:
            return False
        gone = seq.seq_id < 0
        if gone:
            found = self.find(seq)
            if found.num_taken > state.pool.num_available:
                return False
            self.fill(seq, found)
            self.begin_residence(seq)
            state.totals.num_restores += 1
        missing = max(0, len(seq.tokens) - 1 - seq.num_computed)
        seq.note("restored" if gone else "resumed", now, missing if gone else 0)
        state.parked.remove(seq)
        seq.state = SequenceState.RUNNING
        seq.since = now
        insort(state.running, seq, key=lambda s: s.key)
        return True

    def save(self, seq: Sequence, limit: int) -> int:
        """Begin to copy at most `limit` further full blocks of `seq`, which runs or is parked, to the host;
        returns how many."""
        state, copies = self._state, self._state.copies
        assert copies is not None
        assert state.host is not None
        started = 0
        if seq.state not in (SequenceState.RUNNING, SequenceState.PARKED):
            return 0
        while started < limit and len(seq.saved) < min(seq.num_committed, len(seq.table)):
            number = len(seq.saved)
            if seq.table.block_ids[number] >= state.pool.num_blocks:
                break  # in its hole: the device does not have it
            known = state.host.index.find(seq.block_hashes[number : number + 1])
            if known and seq.num_saved == number:
                state.host.reference(known[0])
                seq.saved.append(known[0])
                seq.num_saved += 1
                continue
            if known or not state.host.num_available:
                break  # its own earlier copies first; or no room
            host_block = state.host.allocate()
            seq.saved.append(host_block)
            copies.start(seq, number, seq.table.block_ids[number], host_block, save=True)
            started += 1
        return started

    def load(self, seq: Sequence, limit: int) -> int:
        """Begin to load at most `limit` further blocks into the gap of `seq`; returns how many."""
        copies, gap, size = self._state.copies, seq.gap, self._state.block_size
        assert gap is not None
        started = 0
        while started < limit:
            claim = gap.next_load(num_blocks_for(seq.num_planned, size))
            if claim is None:
                break
            assert copies is not None
            assert self._state.host is not None
            number, host_block = claim
            copies.start(seq, number, seq.table.block_ids[number], host_block, save=False)
            self._state.host.release([host_block])  # the copy holds it now
            started += 1
        self.close_gap(seq)
        return started

    def forget_saved(self, seq: Sequence) -> None:
        """Keep no copy on the host: whoever parks `seq` again copies it anew. Loads that have begun go on.
        What others who are parked have in common with it stays theirs, under the same name."""
        state = self._state
        if not seq.saved:
            return
        assert state.host is not None
        others = []
        if state.prefix_caching:  # else nobody has anything in common
            own = set(seq.block_hashes[:1])
            others = [o for o in state.parked if o is not seq and o.saved and own & set(o.block_hashes[:1])]
        kept = {block for other in others for block in other.saved}
        state.host.forget([block for block in seq.saved if block not in kept])
        for other in others:  # a copy of the same content, made at the same time, had no name yet
            for number, block in enumerate(other.saved[: other.num_saved]):
                if block not in state.host.index:
                    state.host.index.insert(other.block_hashes[number], block)
        state.forget_saved(seq, 0)

    def forget_released(self, seq: Sequence) -> None:
        """What `seq` gives up will not be found on the device again, unless prefixes are cached there."""
        if not self._state.prefix_caching:
            self._state.pool.forget(seq.table.block_ids)

    def close_gap(self, seq: Sequence) -> None:
        """Go on behind the later run where both ends have met and every plan of the front has come back."""
        gap, size = seq.gap, self._state.block_size
        if gap is None or gap.num_loading or seq.num_computed < gap.ready * size:
            return
        if seq.state is not SequenceState.RUNNING:  # preempted: its blocks go when the last plan is back
            return
        assert seq.num_planned == seq.num_computed == gap.ready * size
        self._state.drop_gap(seq)
        seq.num_planned = seq.num_computed = gap.end * size
        seq.num_committed = gap.end
        seq.high_water = max(seq.high_water, seq.num_computed)

    def apply_copies(self, result: StepResult) -> None:
        """Take note of the copies that have ended."""
        copies = self._state.copies
        if copies is None:
            assert not result.copies_done
            return
        for copy_id in result.copies_done:
            self._end_copy(copies, copy_id, failed=copy_id in result.copies_failed)

    def _end_copy(self, copies: Copies, copy_id: int, *, failed: bool) -> None:
        state = self._state
        assert state.host is not None
        entry = copies.done(copy_id)
        seq, number, copy = entry.seq, entry.number, entry.copy
        if entry.save:
            if not failed:
                state.totals.saved_tokens += state.block_size
                if copy.host_block not in state.host.index:
                    state.host.index.insert(seq.block_hashes[number], copy.host_block)
            if number < len(seq.saved) and seq.saved[number] == copy.host_block:
                if failed:
                    state.forget_saved(seq, number)
                elif number == seq.num_saved:
                    seq.num_saved += 1
        elif seq.epoch == entry.epoch and seq.gap is not None:
            gap = seq.gap
            gap.loaded(number, failed=failed)
            if not gap.failed:
                state.totals.loaded_tokens += state.block_size
                state.pool.index.insert(seq.block_hashes[number], copy.block, number + 1)
            if failed:
                state.forget_saved(seq, number)
            self.close_gap(seq)
        copies.release(entry)

    def fill(self, seq: Sequence, found: Found) -> None:
        """Blocks for all known tokens: those found, those of a later run, fresh ones."""
        state, size = self._state, self._state.block_size
        table, pool = seq.table, state.pool
        if found.blocks:
            table.adopt(pool, found.blocks)
            seq.num_planned = seq.num_computed = len(table) * size
            seq.num_committed = len(table)
        first, later = self._later_run(seq)
        for here, there in later:  # before anything is allocated, which could evict them
            if here >= 0:
                pool.reference(here)
            else:
                assert state.host is not None
                state.host.reference(there)
        table.grow(pool, first - len(table))
        for here, _ in later:
            table.block_ids.append(here if here >= 0 else pool.allocate())
        table.grow(pool, num_blocks_for(len(seq.tokens), size) - len(table))
        if later:
            seq.gap = Gap(first, [there if here < 0 else -1 for here, there in later])

    def _later_run(self, seq: Sequence) -> tuple[int, list[tuple[int, int]]]:
        """The longest run behind the missing stretch whose content the device or the host has: the number of
        its first block, and (device block or -1, host block or -1) of each."""
        state, held = self._state, len(seq.table)
        num_full = seq.num_hittable // state.block_size
        if not state.indexes or held >= num_full:
            return held, []
        host = state.host.index if state.host is not None else None
        places: list[tuple[int, int]] = []
        best, run = (0, 0), 0
        for block_hash in seq.hashes(num_full, state.block_size)[held:num_full]:
            here = state.pool.index.get(block_hash)
            there = host.get(block_hash) if host is not None and here < 0 else -1
            places.append((here, there))
            if (here < 0 and there < 0) or (here < 0 and len(places) > 1 and places[-2][0] >= 0):
                run = len(places) - (there >= 0)  # the host's blocks come first in a run
            if len(places) - run > best[1] - best[0]:
                best = (run, len(places))
        return held + best[0], places[best[0] : best[1]]

    def begin_residence(self, seq: Sequence) -> None:
        """Give `seq` a name that the executor learns with the next plan."""
        seq.seq_id = self._next_seq_id
        self._next_seq_id += 1
        request = seq.request
        outputs = tuple(seq.tokens[seq.num_prompt :])
        self._state.new.append(
            NewSequence(seq.seq_id, request.prompt_ids, outputs, request.sampling, request.choice_index)
        )
