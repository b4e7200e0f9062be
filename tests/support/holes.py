"""Hand-made plans for sequences with holes, and copies between device and host.

What a plan may not read is poisoned: freed blocks with large numbers, transient blocks before every step with
NaN.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from support.plans import PlanDriver, Track

from ellm.worker.engine.plan import BlockCopy, PlanEntry, StepResult, StreamedBlock
from ellm.worker.executor.local import LocalExecutor

POISON = 1e3


@dataclass(frozen=True)
class Hole:
    """In blocks: [first, middle) is recomputed, [middle, end) streamed."""

    first: int
    middle: int
    end: int


@dataclass
class HoleTrack(Track):
    """A sequence with a hole."""

    hole: Hole = Hole(0, 0, 0)
    streams: list[StreamedBlock] = field(default_factory=list)


class HoleDriver(PlanDriver):
    """`rows` of a step need not speak of the holes: they are filled wherever their sequence takes part."""

    def __init__(self, executor: LocalExecutor, *, feed_back: bool = True) -> None:
        super().__init__(executor, feed_back=feed_back)
        self._cache = executor.runner.cache
        limits = executor.limits
        self._free_transient = [limits.num_blocks + i for i in range(limits.num_transient_blocks)][::-1]
        self._free_host = list(range(limits.num_host_blocks))[::-1]
        self._next_copy = 0
        self.done: set[int] = set()
        self.failed: set[int] = set()
        self.moved: list[int] = [0, 0]  # bytes saved and loaded

    def step(
        self,
        rows: Mapping[int, int],
        saves: Iterable[BlockCopy] = (),
        loads: Iterable[BlockCopy] = (),
        waits: bool = False,
    ) -> StepResult:
        plan = self.plan(rows)
        holed = [t for s in rows if isinstance(t := self.tracks[s], HoleTrack)]
        entries = plan.entries + tuple(e for t in holed for e in self._recompute(t))
        plan = dataclasses.replace(
            plan,
            entries=entries,
            num_rows=sum(e.num_tokens for e in entries),
            streams=tuple(s for t in holed for s in t.streams),
            saves=tuple(saves),
            loads=tuple(loads),
            waits=waits,
        )
        for layer in range(2):
            self._cache.bank(layer).fill_(torch.nan)
        return self.run(plan)

    def punch(self, seq_id: int, new_id: int, hole: Hole, hosts: Sequence[int] = ()) -> HoleTrack:
        """Begin a new residence with a hole, whose streamed blocks are on the host."""
        old = self.tracks.pop(seq_id)
        self._released.append(seq_id)
        blocks = list(old.block_ids)
        for i in range(hole.first, hole.end):
            self._poison_and_free(blocks[i])
            blocks[i] = self._free_transient.pop()
        streams = [StreamedBlock(h, b) for h, b in zip(hosts, blocks[hole.middle : hole.end], strict=True)]
        track = HoleTrack(
            new_id, old.prompt, old.sampling, 0, old.outputs, blocks, old.computed, results=old.results
        )
        track.hole, track.streams = hole, streams
        self.tracks[new_id] = track
        return track

    def fill(self, track: HoleTrack, new_id: int, blocks: Sequence[int]) -> Track:
        """Begin a new residence without a hole: these blocks hold its tokens now."""
        del self.tracks[track.seq_id]
        self._released.append(track.seq_id)
        span = slice(track.hole.first, track.hole.end)
        self._free_transient += track.block_ids[span]
        table = list(track.block_ids)
        table[span] = blocks
        new = Track(
            new_id,
            track.prompt,
            track.sampling,
            0,
            track.outputs,
            table,
            track.computed,
            results=track.results,
        )
        self.tracks[new_id] = new
        return new

    def save(self, blocks: Iterable[int]) -> list[BlockCopy]:
        """Copies of these blocks to free ones of the host."""
        return [self.copy(block, self._free_host.pop()) for block in blocks]

    def copy(self, block: int, host_block: int) -> BlockCopy:
        copy = BlockCopy(self._next_copy, block, host_block)
        self._next_copy += 1
        return copy

    def move(self, track: Track, numbers: Iterable[int]) -> list[BlockCopy]:
        """Save blocks of a sequence, and load them into others that take their places."""
        places = list(numbers)
        saves = self.save(track.block_ids[i] for i in places)
        self.settle(self.step({}, saves=saves), saves)
        loads = []
        for place, save in zip(places, saves, strict=True):
            self._poison_and_free(save.block)
            track.block_ids[place] = self._free.pop(0)
            assert track.block_ids[place] != save.block
            loads.append(self.copy(track.block_ids[place], save.host_block))
        self.settle(self.step({}, loads=loads), loads)
        return loads

    def settle(self, result: StepResult, copies: Iterable[BlockCopy]) -> None:
        """Run empty plans until the copies have ended."""
        while True:
            if self.done >= {c.copy_id for c in copies}:
                return
            before = len(self.done)
            self.step({})
            assert len(self.done) > before, "a plan without entries did not wait for a copy"

    def run(self, plan: object) -> StepResult:
        result = super().run(plan)  # type: ignore[arg-type]
        assert set(result.copies_failed) <= set(result.copies_done)
        assert not self.done & set(result.copies_done), "a copy ended twice"
        self.done |= set(result.copies_done)
        self.failed |= set(result.copies_failed)
        if result.copy_times is not None:
            self.moved[0] += result.copy_times.saved_bytes
            self.moved[1] += result.copy_times.loaded_bytes
        return result

    def _recompute(self, track: HoleTrack) -> list[PlanEntry]:
        start, end = (self._block_size * n for n in (track.hole.first, track.hole.middle))
        if start == end:
            return []
        ids = track.tokens[start:end]
        return [PlanEntry(track.seq_id, start, end - start, ids, track.block_ids, False, recompute=True)]

    def _poison_and_free(self, block: int) -> None:
        self._cache.resident[:, :, block] = POISON
        self._free.append(block)
