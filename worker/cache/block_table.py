"""Which blocks hold a sequence's positions.

Entry i of `block_ids` holds positions [i * block_size, (i + 1) * block_size). A paused sequence may give up
its last blocks; what is missing when it comes back has blocks again, whose content is then filled in.
"""

from __future__ import annotations

from collections.abc import Sequence

from ellm.worker.cache.block_pool import BlockPool


def num_blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that `num_tokens` positions need."""
    return -(-num_tokens // block_size)


class BlockTable:
    """One sequence's blocks in position order. The list is live: plans refer to it, and while they do it only
    grows."""

    __slots__ = ("block_ids",)

    def __init__(self) -> None:
        self.block_ids: list[int] = []

    def __len__(self) -> int:
        return len(self.block_ids)

    def adopt(self, pool: BlockPool, hits: Sequence[int]) -> None:
        """Append blocks found in the prefix index."""
        for block in hits:
            pool.reference(block)
        self.block_ids.extend(hits)

    def grow(self, pool: BlockPool, count: int) -> None:
        """Append `count` fresh blocks; the caller has seen that they are available."""
        for _ in range(count):
            self.block_ids.append(pool.allocate())

    def cut(self, pool: BlockPool, count: int) -> None:
        """Give the last `count` blocks back. No plan that names the list is outstanding."""
        assert 0 < count <= len(self.block_ids)
        pool.release(self.block_ids[-count:])
        self.block_ids = self.block_ids[:-count]

    def replace(self, pool: BlockPool, first: int, transient: Sequence[int]) -> None:
        """From block `first` on, put transient ids in the place of blocks, which are given back unless they
        are transient themselves. The list itself is left to the plans that hold it."""
        end = first + len(transient)
        former = [block for block in self.block_ids[first:end] if block < pool.num_blocks]
        self.block_ids = [*self.block_ids[:first], *transient, *self.block_ids[end:]]
        pool.release(former)

    def clear(self, pool: BlockPool) -> None:
        """Give every block back. The list itself is left to the plans that hold it."""
        pool.release([block for block in self.block_ids if block < pool.num_blocks])
        self.block_ids = []
