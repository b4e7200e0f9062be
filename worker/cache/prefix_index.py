"""Which block holds which prefix: chain hash -> block.

A chain hash stands for all tokens from the first position on, the tenant's salt included, so a run of hits
from the front is a prefix that can be shared. The index does not know who uses a block; the pool decides
when a block's content is gone and says so with `forget`.
"""

from __future__ import annotations

from collections.abc import Iterable

from ellm.worker.api.block_hash import BlockHash
from ellm.worker.cache.digest_maker import DigestMaker


class PrefixIndex:
    """One to one between hashes and blocks; every operation is O(1) per hash."""

    def __init__(self, num_blocks: int) -> None:
        self.digest = DigestMaker()  # of the blocks whose depth was told
        self._block_of: dict[BlockHash, int] = {}
        self._hash_of: list[BlockHash | None] = [None] * num_blocks

    def __len__(self) -> int:
        return len(self._block_of)

    def __contains__(self, block: int) -> bool:
        return self._hash_of[block] is not None

    def find(self, hashes: Iterable[BlockHash]) -> list[int]:
        """Blocks of the longest run of known hashes from the first on."""
        blocks: list[int] = []
        block_of = self._block_of
        for block_hash in hashes:
            block = block_of.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def get(self, block_hash: BlockHash) -> int:
        """The block that holds this content, or -1."""
        return self._block_of.get(block_hash, -1)

    def insert(self, block_hash: BlockHash, block: int, depth: int = 0) -> bool:
        """Name a full block of accepted tokens, number `depth` of its prefix (from 1; 0: the digest is not
        told). False if another block already stands for this content."""
        assert self._hash_of[block] is None, f"block {block} is already indexed"
        if block_hash in self._block_of:
            return False
        self._block_of[block_hash] = block
        self._hash_of[block] = block_hash
        self.digest.add(block_hash, depth)
        return True

    def hit(self, block: int) -> None:
        """The block has one more user."""
        block_hash = self._hash_of[block]
        if block_hash is not None:
            self.digest.touch(block_hash)

    def forget(self, block: int) -> None:
        """The block's content is about to be overwritten."""
        block_hash = self._hash_of[block]
        assert block_hash is not None, f"block {block} is not indexed"
        del self._block_of[block_hash]
        self._hash_of[block] = None
        self.digest.discard(block_hash)

    def check(self) -> None:
        """Raise AssertionError unless both directions agree."""
        named = {block: h for block, h in enumerate(self._hash_of) if h is not None}
        assert len(named) == len(self._block_of), "index: a block or a hash without its partner"
        for block, block_hash in named.items():
            assert self._block_of.get(block_hash) == block, f"index: block {block} and its hash disagree"
