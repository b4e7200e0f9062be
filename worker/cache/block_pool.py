"""Which blocks of the KV pool are in use, by how many, and whose content goes first.

A block is in exactly one of three states:

    referenced  at least one sequence names it
    cached      nobody names it, but the prefix index still does: a hit revives it
    free        its content is worth nothing

Free blocks are handed out first, then cached ones, least recently released first: content is evicted only
when its room is needed. The pool knows neither tokens nor sequences.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from ellm.worker.cache.prefix_index import PrefixIndex


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens. Every operation is O(1) per block."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks > 0
        assert block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.index = PrefixIndex(num_blocks)
        self._references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: the lowest numbers leave first
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently released first

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_referenced(self) -> int:
        return self.num_blocks - self.num_available

    def references(self, block: int) -> int:
        return self._references[block]

    def num_cached_of(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` are cached, so that `reference` would take them out of `num_available`."""
        return sum(1 for block in blocks if block in self._cached)

    def allocate(self) -> int:
        """One block for new content, referenced once. The caller has seen that one is available."""
        if self._free:
            block = self._free.pop()
        else:
            assert self._cached, "allocation from a pool without an available block"
            block, _ = self._cached.popitem(last=False)
            self.index.forget(block)
        self._references[block] = 1
        return block

    def reference(self, block: int) -> None:
        """One more user of a block whose content is in the prefix index (a hit)."""
        count = self._references[block]
        if count == 0:
            del self._cached[block]
        self._references[block] = count + 1
        self.index.hit(block)

    def release(self, blocks: Sequence[int]) -> None:
        """One user fewer of each of `blocks`, a sequence's table in position order.

        The last positions are released first, so that of one prefix the tail is evicted before the head.
        """
        references = self._references
        for block in reversed(blocks):
            count = references[block] - 1
            assert count >= 0, f"block {block} released more often than referenced"
            references[block] = count
            if count == 0:
                if block in self.index:
                    self._cached[block] = None
                else:
                    self._free.append(block)

    def forget(self, blocks: Iterable[int]) -> None:
        """Nobody will look for the content of these referenced blocks: once released, they are free."""
        for block in blocks:
            assert self._references[block], f"block {block} is forgotten, and nobody uses it"
            if block in self.index:
                self.index.forget(block)

    def check(self) -> None:
        """Raise AssertionError unless every invariant holds. O(num_blocks)."""
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "pool: a block is free twice"
        assert not free & cached, "pool: a block is both free and cached"
        assert all(count >= 0 for count in self._references), "pool: a negative reference count"
        referenced = {block for block, count in enumerate(self._references) if count}
        assert not referenced & free, "pool: a referenced block is free"
        assert not referenced & cached, "pool: a referenced block is up for eviction"
        assert len(free) + len(cached) + len(referenced) == self.num_blocks, "pool: a block is lost"
        assert all(block in self.index for block in cached), "pool: a cached block is not in the index"
        assert not any(block in self.index for block in free), "pool: a free block is in the index"
        self.index.check()
