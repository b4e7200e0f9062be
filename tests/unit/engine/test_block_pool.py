"""The block pool: a long random walk against a plain model, eviction order, a check that notices damage."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest

from ellm.worker.api.block_hash import block_hashes
from ellm.worker.cache.block_pool import BlockPool
from ellm.worker.cache.block_table import BlockTable, num_blocks_for


class Walker:
    """Holders that take, index, share and release blocks at random, and what the pool must then look like."""

    def __init__(self, num_blocks: int, seed: int) -> None:
        self.pool = BlockPool(num_blocks, 16)
        self.rng = Random(seed)
        self.held: list[list[int]] = []  # tables
        self.names: dict[int, bytes] = {}  # indexed blocks, as they should be
        self.cached: list[int] = []  # least recently released first
        self.next_name = 0
        self.num_evictions = 0
        self.num_revivals = 0

    def step(self) -> None:
        if len(self.held) > max(1, self.pool.num_blocks // 4):  # enough is held: let others have it
            self.release()
        self.rng.choice((self.take, self.name, self.share, self.release))()

    def take(self) -> None:
        count = self.rng.randint(1, min(4, self.pool.num_blocks))
        if count > self.pool.num_available:
            return
        table = []
        for _ in range(count):
            evicts = self.pool.num_free == 0
            block = self.pool.allocate()
            if evicts:
                assert block == self.cached.pop(0), "not the least recently released"
                self.num_evictions += 1
                del self.names[block]
            assert block not in self.names
            table.append(block)
        self.held.append(table)

    def name(self) -> None:
        if not self.held:
            return
        block = self.rng.choice(self.rng.choice(self.held))
        if block not in self.names:
            self.next_name += 1
            self.names[block] = self.next_name.to_bytes(16, "big")
            assert self.pool.index.insert(self.names[block], block)

    def share(self) -> None:
        if not self.names:
            return
        block = self.rng.choice(sorted(self.names))
        assert self.pool.index.find([self.names[block]]) == [block]
        self.pool.reference(block)
        if block in self.cached:
            self.cached.remove(block)
            self.num_revivals += 1
        self.held.append([block])

    def release(self) -> None:
        if not self.held:
            return
        table = self.held.pop(self.rng.randrange(len(self.held)))
        if self.rng.random() < 0.1:
            self.pool.forget(table)
            for block in table:
                self.names.pop(block, None)
        self.pool.release(table)
        for block in reversed(table):
            if block in self.names and not any(block in other for other in self.held):
                self.cached.append(block)

    def agree(self) -> None:
        self.pool.check()
        counts = [sum(table.count(block) for table in self.held) for block in range(self.pool.num_blocks)]
        assert counts == [self.pool.references(block) for block in range(self.pool.num_blocks)]
        assert self.pool.num_cached == len(self.cached)
        assert self.pool.num_referenced == sum(1 for count in counts if count)
        assert len(self.pool.index) == len(self.names)


@pytest.mark.parametrize(("num_blocks", "steps"), [(1, 5_000), (7, 25_000), (60, 70_000)])
def test_a_random_walk_keeps_every_invariant(num_blocks: int, steps: int) -> None:
    walker = Walker(num_blocks, seed=num_blocks)
    for i in range(steps):
        walker.step()
        if i % 500 == 0:
            walker.agree()
    while walker.held:
        walker.release()
    walker.agree()
    assert walker.pool.num_available == num_blocks
    assert walker.num_evictions > steps / 50
    assert walker.num_revivals > steps / 50


def pool_in_use() -> BlockPool:
    """Blocks 0 and 1 referenced (1 indexed), 2 cached, the rest free."""
    pool = BlockPool(6, 16)
    for _ in range(3):
        pool.allocate()
    pool.index.insert(b"one", 1)
    pool.index.insert(b"two", 2)
    pool.release([2])
    pool.check()
    return pool


DAMAGE: dict[str, Callable[[BlockPool], object]] = {
    "free though referenced": lambda pool: pool._free.append(0),
    "free twice": lambda pool: pool._free.append(pool._free[0]),
    "lost": lambda pool: pool._free.pop(),
    "reference lost": lambda pool: pool._references.__setitem__(0, 0),
    "negative count": lambda pool: pool._references.__setitem__(5, -1),
    "cached though referenced": lambda pool: pool._cached.__setitem__(1, None),
    "cached and free": lambda pool: pool._free.append(2),
    "cached without a hash": lambda pool: pool.index.forget(2),
    "free with a hash": lambda pool: pool.index.insert(b"five", 5),
    "hash of another block": lambda pool: pool.index._block_of.__setitem__(b"two", 1),
    "hash without a block": lambda pool: pool.index._block_of.__setitem__(b"three", 3),
    "block without a hash": lambda pool: pool.index._block_of.pop(b"one"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_the_check_notices_damage(damage: Callable[[BlockPool], object]) -> None:
    pool = pool_in_use()
    damage(pool)
    with pytest.raises(AssertionError):
        pool.check()


def test_a_second_release_is_refused() -> None:
    pool = BlockPool(2, 16)
    block = pool.allocate()
    pool.release([block])
    with pytest.raises(AssertionError, match="more often"):
        pool.release([block])


def test_of_one_prefix_the_tail_is_evicted_first_and_of_two_the_older_one() -> None:
    pool = BlockPool(4, 16)
    tables = [[pool.allocate(), pool.allocate()] for _ in range(2)]
    for i, block in enumerate(tables[0] + tables[1]):
        pool.index.insert(bytes([i]), block)
    pool.release(tables[1])
    pool.release(tables[0])
    assert [pool.allocate() for _ in range(4)] == [*reversed(tables[1]), *reversed(tables[0])]


def test_a_hit_saves_a_block_from_eviction() -> None:
    pool = BlockPool(2, 16)
    first, second = pool.allocate(), pool.allocate()
    pool.index.insert(b"a", first)
    pool.index.insert(b"b", second)
    pool.release([first])
    pool.release([second])
    pool.reference(first)
    assert pool.allocate() == second
    assert pool.num_available == 0
    assert pool.index.find([b"a"]) == [first]


def test_hits_end_at_the_first_block_that_is_missing() -> None:
    pool = BlockPool(4, 2)
    hashes = block_hashes(range(8), 2)
    blocks = [pool.allocate() for _ in hashes]
    for i in (0, 1, 3):
        pool.index.insert(hashes[i], blocks[i])
    assert pool.index.find(hashes) == blocks[:2]
    assert pool.index.find(block_hashes(range(8), 2, salt="other")) == []


def test_the_first_block_of_a_content_keeps_its_name() -> None:
    pool = BlockPool(2, 16)
    first, second = pool.allocate(), pool.allocate()
    assert pool.index.insert(b"a", first)
    assert not pool.index.insert(b"a", second)
    pool.release([second])
    pool.check()
    assert pool.num_free == 1


def test_a_table_gives_back_what_it_took() -> None:
    pool = BlockPool(4, 16)
    table, other = BlockTable(), BlockTable()
    table.grow(pool, 3)
    live = table.block_ids
    pool.index.insert(b"a", live[0])
    other.adopt(pool, live[:1])
    table.clear(pool)
    assert (len(table), len(live)) == (0, 3)  # a plan may still read the old list
    assert pool.num_referenced == 1
    other.clear(pool)
    pool.check()
    assert pool.num_available == 4


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2)])
def test_blocks_for_tokens(tokens: int, blocks: int) -> None:
    assert num_blocks_for(tokens, 16) == blocks
