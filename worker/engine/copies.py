"""Copies between the device's pool and the host's: which are new, which are on their way.

Each holds a reference to both of its blocks, so that neither goes to another while it runs, whatever becomes
of the sequence.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ellm.worker.cache.block_pool import BlockPool
from ellm.worker.engine.plan import BlockCopy
from ellm.worker.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Copy:
    """One copy under way, and whose it is: block `number` of `seq` in its residence `epoch`."""

    copy: BlockCopy
    seq: Sequence
    number: int
    epoch: int
    save: bool


class Copies:
    """One per engine with a host tier."""

    def __init__(self, pool: BlockPool, host: BlockPool) -> None:
        self._pool = pool
        self._host = host
        self._next_id = 0
        self.under_way: dict[int, Copy] = {}
        self.num_saves = 0  # under way
        self.num_loads = 0
        self._new_saves: list[BlockCopy] = []
        self._new_loads: list[BlockCopy] = []

    def start(self, seq: Sequence, number: int, block: int, host_block: int, *, save: bool) -> None:
        """Begin with the next plan. The caller has seen to it that nobody writes either block meanwhile."""
        copy = BlockCopy(self._next_id, block, host_block)
        self._next_id += 1
        self._pool.reference(block)
        self._host.reference(host_block)
        self.under_way[copy.copy_id] = Copy(copy, seq, number, seq.epoch, save)
        if save:
            self._new_saves.append(copy)
            self.num_saves += 1
        else:
            self._new_loads.append(copy)
            self.num_loads += 1

    def take_new(self) -> tuple[tuple[BlockCopy, ...], tuple[BlockCopy, ...]]:
        """Saves and loads for the plan that is being written."""
        saves, loads = tuple(self._new_saves), tuple(self._new_loads)
        self._new_saves.clear()
        self._new_loads.clear()
        return saves, loads

    @property
    def any_new(self) -> bool:
        return bool(self._new_saves or self._new_loads)

    def done(self, copy_id: int) -> Copy:
        """The copy has ended. The caller may name the blocks in an index before it calls `release`."""
        entry = self.under_way.pop(copy_id)
        if entry.save:
            self.num_saves -= 1
        else:
            self.num_loads -= 1
        return entry

    def release(self, entry: Copy) -> None:
        """Let go of both blocks."""
        self._pool.release([entry.copy.block])
        self._host.release([entry.copy.host_block])

    def abandon(self) -> None:
        """No result will come any more: let go of everything."""
        for copy_id in list(self.under_way):
            self.release(self.done(copy_id))
        self._new_saves.clear()
        self._new_loads.clear()

    def count(self) -> tuple[Counter[int], Counter[int]]:
        """References held on blocks of the pool and of the host."""
        copies = [entry.copy for entry in self.under_way.values()]
        return Counter(c.block for c in copies), Counter(c.host_block for c in copies)

    def check(self) -> None:
        """Raise AssertionError unless the counters agree."""
        saves = sum(entry.save for entry in self.under_way.values())
        assert (saves, len(self.under_way) - saves) == (self.num_saves, self.num_loads), "copies: miscounted"
