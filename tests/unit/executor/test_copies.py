"""The copier: order within a direction, ends told once, failures that stay alone, steps not held up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from support.checkpoints import write_checkpoint

from ellm.worker.engine.plan import BlockCopy, StreamedBlock
from ellm.worker.executor.copies import EndedCopies, ThreadCopier
from ellm.worker.model.host_pool import MemoryHostPool
from ellm.worker.model.inspect import read_architecture
from ellm.worker.model.kv_cache import KVCache

SIZE = 1000  # bytes of a block, as far as the copier knows


class GatedPool:
    """A host pool that notes its moves, each of which waits for leave."""

    num_blocks = num_bytes = 10

    def __init__(self) -> None:
        self.gates = {"save": threading.Semaphore(0), "load": threading.Semaphore(0)}
        self.moves: list[tuple[str, int]] = []

    def save(self, block: int, host_block: int) -> None:
        self._move("save", host_block)

    def load(self, host_block: int, block: int) -> None:
        self._move("load", host_block)

    def _move(self, kind: str, host_block: int) -> None:
        self.gates[kind].acquire()
        if host_block >= self.num_blocks:
            raise IndexError(host_block)
        time.sleep(0.002)
        self.moves.append((kind, host_block))

    def stream(self, streams: Sequence[StreamedBlock], layer: int) -> None:
        raise AssertionError("a copier streams nothing")

    def close(self) -> None: ...

    def let(self, kind: str, count: int) -> None:
        self.gates[kind].release(count)


@pytest.fixture
def pool() -> GatedPool:
    return GatedPool()


@pytest.fixture
def copier(pool: GatedPool) -> Iterator[ThreadCopier]:
    made = ThreadCopier(pool, SIZE)
    yield made
    pool.let("save", 100)
    pool.let("load", 100)
    made.close()


def copies(*ids: int) -> list[BlockCopy]:
    return [BlockCopy(i, 0, i) for i in ids]


def test_the_directions_run_beside_each_other_each_in_order(pool: GatedPool, copier: ThreadCopier) -> None:
    copier.start(copies(0, 2), copies(1))
    copier.start(copies(3), copies(4, 5))
    assert copier.ended() == EndedCopies()
    pool.let("load", 3)
    seen: list[int] = []
    while len(seen) < 3:
        copier.wait_next()
        ended = copier.ended()
        assert ended.done, "nothing had ended"
        seen += ended.done
    assert seen == [1, 4, 5]
    pool.let("save", 3)
    copier.wait_all()
    ended = copier.ended()
    assert ended.done == (0, 2, 3)
    assert pool.moves == [(k, i) for k, ids in (("load", (1, 4, 5)), ("save", (0, 2, 3))) for i in ids]
    assert copier.ended() == EndedCopies(), "told twice"
    copier.wait_next()  # none is under way: returns
    copier.wait_all()


def test_what_ended_unseen_is_what_the_next_wait_was_for(pool: GatedPool, copier: ThreadCopier) -> None:
    copier.start(copies(0, 1), [])
    pool.let("save", 1)
    while not pool.moves:
        time.sleep(0.001)
    copier.wait_next()
    assert copier.ended().done == (0,)


def test_a_failed_copy_is_told_and_the_others_go_on(
    pool: GatedPool, copier: ThreadCopier, caplog: pytest.LogCaptureFixture
) -> None:
    pool.let("save", 3)
    copier.start([BlockCopy(0, 0, 1), BlockCopy(1, 0, 99), BlockCopy(2, 0, 2)], [])
    copier.wait_all()
    ended = copier.ended()
    assert (ended.done, ended.failed) == ((0, 1, 2), (1,))
    assert ended.times is not None
    assert ended.times.saved_bytes == 2 * SIZE
    assert "copy 1 failed: block 0, host block 99" in caplog.text


def test_bytes_and_seconds_are_those_of_each_direction(pool: GatedPool, copier: ThreadCopier) -> None:
    pool.let("save", 2)
    pool.let("load", 1)
    begin = time.perf_counter()
    copier.start(copies(0, 1), copies(2))
    copier.wait_all()
    passed = time.perf_counter() - begin
    times = copier.ended().times
    assert times is not None
    assert (times.saved_bytes, times.loaded_bytes) == (2 * SIZE, SIZE)
    assert 0.004 <= times.saved_s < passed
    assert 0.002 <= times.loaded_s < passed


def test_closing_ends_what_is_under_way(pool: GatedPool) -> None:
    copier = ThreadCopier(pool, SIZE)
    copier.start(copies(0, 1), copies(2))
    pool.let("save", 2)
    pool.let("load", 1)
    copier.close()
    assert len(pool.moves) == 3


@pytest.fixture
def big_pool(tmp_path: Path) -> MemoryHostPool:
    """Blocks of 64 MiB: each takes about 20 ms."""
    write_checkpoint(tmp_path, "llama")
    arch = read_architecture(tmp_path)
    return MemoryHostPool(KVCache(arch, 2, 1 << 18, torch.float32, torch.device("cpu")), 1)


def longest_pause(until: Callable[[], bool]) -> float:
    """Seconds between two turns of a loop that does nothing else."""
    last, pause = time.perf_counter(), 0.0
    while not until():
        now = time.perf_counter()
        pause, last = max(pause, now - last), now
    return pause


def test_python_goes_on_while_a_block_is_copied(big_pool: MemoryHostPool) -> None:
    """The interpreter's lock is free meanwhile. A busy machine may pause any thread: one try of ten does."""
    assert big_pool.num_bytes == 1 << 26
    copier = ThreadCopier(big_pool, big_pool.num_bytes)
    for _ in range(10):
        copier.start([BlockCopy(0, 0, 0)], [])
        ended: list[EndedCopies] = []

        def told(into: list[EndedCopies] = ended) -> bool:
            into.append(copier.ended())
            return bool(into[-1].done)

        pause = longest_pause(told)
        times = ended[-1].times
        assert times is not None
        if pause < times.saved_s / 3:
            break
    else:
        pytest.fail(f"a pause of {pause} s in a copy of {times.saved_s} s")
    copier.close()
