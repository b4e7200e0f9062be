"""The copier of a GPU without one: what is moved at once, what a wrong copy ends, what is told of it.

Streams and events are the parts that a GPU would have; here everything has ended as soon as it is asked for.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from ellm.worker.engine.plan import BlockCopy, StreamedBlock
from ellm.worker.executor.cuda_copies import CudaCopier
from ellm.worker.model.cuda_host_pool import NUM_STAGED

SIZE, HOST_BLOCKS = 1000, 40


class Ended:
    """An event that has passed, 2 ms after any other; unless it is held."""

    made: ClassVar[list[Ended]] = []

    def __init__(self, *, enable_timing: bool, blocking: bool) -> None:
        assert enable_timing
        assert blocking, "who waits sleeps"
        self.passed = threading.Event()
        self.num_looks = 0
        self.passed.set()
        self.made.append(self)

    def record(self) -> None: ...

    def query(self) -> bool:
        self.num_looks += 1
        return self.passed.is_set()

    def synchronize(self) -> None:
        assert self.passed.wait(30)

    def elapsed_time(self, end: Ended) -> float:
        return 2.0


class Pool:
    """A host pool that notes its moves."""

    num_blocks = HOST_BLOCKS
    num_bytes = HOST_BLOCKS * SIZE

    def __init__(self) -> None:
        self.moves: list[tuple[str, list[tuple[int, int]]]] = []

    def move(self, moves: Sequence[tuple[int, int]], *, save: bool) -> None:
        if any(host_block >= HOST_BLOCKS for _, host_block in moves):
            raise IndexError(moves)
        self.moves.append(("save" if save else "load", list(moves)))

    def save(self, block: int, host_block: int) -> None:
        self.move([(block, host_block)], save=True)

    def load(self, host_block: int, block: int) -> None:
        self.move([(block, host_block)], save=False)

    def stream(self, streams: Sequence[StreamedBlock], layer: int) -> None:
        raise AssertionError("a copier streams nothing")

    def close(self) -> None: ...


@pytest.fixture
def pool() -> Pool:
    return Pool()


@pytest.fixture
def copier(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> CudaCopier:
    stream = SimpleNamespace(device=None, wait_stream=lambda _: None, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", Ended)
    return CudaCopier(pool, SIZE, torch.device("cuda"))


def copies(count: int, first: int = 0) -> list[BlockCopy]:
    return [BlockCopy(first + i, 100 + i, i) for i in range(count)]


def test_copies_that_start_together_move_together(pool: Pool, copier: CudaCopier) -> None:
    copier.start(copies(NUM_STAGED + 3), copies(1, 90))
    assert [(kind, len(moves)) for kind, moves in pool.moves] == [
        ("save", NUM_STAGED),
        ("save", 3),
        ("load", 1),
    ]
    assert [move for kind, moves in pool.moves if kind == "save" for move in moves] == [
        (100 + i, i) for i in range(NUM_STAGED + 3)
    ]
    copier.wait_next()
    copier.wait_all()
    ended = copier.ended()
    assert ended.done == (*range(NUM_STAGED + 3), 90)
    assert ended.failed == ()
    assert ended.times is not None
    assert ended.times.saved_bytes == (NUM_STAGED + 3) * SIZE
    assert ended.times.saved_s == pytest.approx(0.004)  # two batches of 2 ms
    assert ended.times.loaded_s == pytest.approx(0.002)
    assert copier.ended().done == ()


@pytest.mark.parametrize("both_ways", [False, True])
def test_who_waits_for_the_next_copy_sleeps(copier: CudaCopier, both_ways: bool) -> None:
    """Until one of either direction has ended."""
    Ended.made.clear()
    copier.start(copies(2), copies(1, 90) if both_ways else ())
    ends = Ended.made[1::2]
    for event in ends:
        event.passed.clear()
    told = threading.Event()
    waiting = threading.Thread(target=lambda: (copier.wait_next(), told.set()))
    waiting.start()
    assert not told.wait(0.05)
    ends[-1].passed.set()
    assert told.wait(30)
    waiting.join()
    assert all(event.num_looks <= 1 for event in ends)
    assert copier.ended().done == ((90,) if both_ways else (0, 1))
    ends[0].passed.set()
    copier.wait_all()
    assert copier.ended().done == ((0, 1) if both_ways else ())
    copier.close()


def test_a_wrong_copy_ends_itself_and_nobody_else(
    pool: Pool, copier: CudaCopier, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = BlockCopy(2, 7, HOST_BLOCKS)
    copier.start([*copies(2), wrong, *copies(2, 3)], [BlockCopy(9, 7, HOST_BLOCKS)])
    ended = copier.ended()
    assert ended.done == (0, 1, 2, 3, 4, 9)
    assert ended.failed == (2, 9)
    assert [len(moves) for _, moves in pool.moves] == [1, 1, 1, 1]
    assert ended.times is not None
    assert ended.times.saved_bytes == 4 * SIZE
    assert "copy 2 failed: block 7, host block 40" in caplog.text
    copier.close()
