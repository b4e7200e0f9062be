"""A stretch of a running sequence that has no blocks of its own.

Its positions are filled anew, in transient blocks, in every layer of every step: those of blocks
[first, split) are recomputed, those of [split, end) are streamed from the host.
"""

from __future__ import annotations

from dataclasses import dataclass

from ellm.worker.engine.plan import PlanEntry, StreamedBlock
from ellm.worker.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Hole:
    """Block numbers of one sequence."""

    first: int
    split: int
    end: int

    def num_rows(self, block_size: int) -> int:
        """Rows that each step recomputes."""
        return (self.split - self.first) * block_size

    @property
    def num_streamed(self) -> int:
        return self.end - self.split


def recompute_entry(seq: Sequence, hole: Hole, block_size: int) -> PlanEntry:
    """The rows that fill [first, split); they see nothing behind their own end."""
    start, end = hole.first * block_size, hole.split * block_size
    tokens = tuple(seq.tokens[start:end])
    return PlanEntry(seq.seq_id, start, end - start, tokens, seq.table.block_ids, False, recompute=True)


def streamed_blocks(seq: Sequence, hole: Hole) -> list[StreamedBlock]:
    """What fills [split, end)."""
    ids = seq.table.block_ids
    return [StreamedBlock(seq.saved[i], ids[i]) for i in range(hole.split, hole.end)]
