"""A copy is done when every rank has made its part, and has failed when any part has."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from random import Random
from typing import Any

import pytest
from support.group_threads import ranks

from ellm.worker.engine.plan import BlockCopy
from ellm.worker.executor.copies import EndedCopies, ThreadCopier
from ellm.worker.parallel.copies import GroupCopier
from ellm.worker.parallel.group import Group

BLOCK_BYTES = 1000


class SlowHost:
    """A host tier that copies nothing, at its own pace, and fails where it is told to."""

    num_blocks = 100
    num_bytes = 0

    def __init__(self, seed: int, failing: frozenset[int] = frozenset(), most_s: float = 0.004) -> None:
        self._rng = Random(seed)
        self._failing = failing
        self._most_s = most_s

    def save(self, block: int, host_block: int) -> None:
        self._copy(host_block)

    def load(self, host_block: int, block: int) -> None:
        self._copy(host_block)

    def _copy(self, host_block: int) -> None:
        time.sleep(self._rng.uniform(0, self._most_s))
        if host_block in self._failing:
            raise OSError("no")

    def stream(self, streams: object, layer: int) -> None: ...

    def close(self) -> None: ...


def copies(first: int, count: int) -> tuple[BlockCopy, ...]:
    return tuple(BlockCopy(i, i, i) for i in range(first, first + count))


def play(group: Group, failing: frozenset[int]) -> list[EndedCopies]:
    """Steps in which copies are started, looked at and waited for; all ranks do the same."""
    copier = GroupCopier(group, ThreadCopier(SlowHost(group.rank, failing), BLOCK_BYTES), BLOCK_BYTES)
    rng, found, started = Random(7), [], 0
    for _ in range(12):
        saves, loads = copies(started, rng.randint(0, 3)), copies(started + 3, rng.randint(0, 2))
        started += 5
        if saves or loads:
            copier.start(saves, loads)
        act = rng.random()
        if act < 0.3:
            copier.wait_next()
        elif act < 0.4:
            copier.wait_all()
        found.append(copier.ended())
    copier.wait_all()
    found.append(copier.ended())
    assert copier.ended() == EndedCopies()
    copier.close()
    return found


def expected_ids() -> set[int]:
    rng, ids, started = Random(7), set(), 0
    for _ in range(12):
        saves, loads = copies(started, rng.randint(0, 3)), copies(started + 3, rng.randint(0, 2))
        ids |= {copy.copy_id for copy in (*saves, *loads)}
        started += 5
        rng.random()
    return ids


@pytest.mark.parametrize("size", [2, 3])
def test_all_ranks_see_the_same_copies_end_once(size: int) -> None:
    fails = {1: frozenset({5, 13, 21}), 2: frozenset({13, 28})}  # by rank, on the host's blocks

    def act(group: Group) -> list[EndedCopies]:
        return play(group, fails.get(group.rank, frozenset()))

    with ranks(size, act) as (group, others):
        mine = act(group)
        theirs: list[Future[Any]] = others
        for other in theirs:
            assert other.result(30) == mine
    ids = expected_ids()
    done = [copy_id for ended in mine for copy_id in ended.done]
    assert sorted(done) == sorted(ids)
    wanted = ids & frozenset().union(*(fails[rank] for rank in range(1, size)))
    assert wanted
    assert {copy_id for ended in mine for copy_id in ended.failed} == wanted
    times = [ended.times for ended in mine if ended.times is not None]
    moved = sum(t.saved_bytes + t.loaded_bytes for t in times)
    assert moved == BLOCK_BYTES * (len(ids) - len(wanted))
    assert sum(t.saved_s + t.loaded_s for t in times) > 0.0


def test_a_slow_rank_is_waited_for() -> None:
    may_copy = threading.Event()

    class Held(SlowHost):
        def _copy(self, host_block: int) -> None:
            assert may_copy.wait(10)

    def act(group: Group) -> list[Sequence[int]]:
        host = Held(0) if group.rank else SlowHost(0, most_s=0.0)
        copier = GroupCopier(group, ThreadCopier(host, BLOCK_BYTES), BLOCK_BYTES)
        copier.start(copies(0, 2), ())
        time.sleep(0.1)
        found: list[Sequence[int]] = [copier.ended().done]
        if group.rank == 0:
            may_copy.set()
        copier.wait_next()
        found.append(copier.ended().done)
        copier.wait_all()
        found.append(copier.ended().done)
        copier.close()
        return found

    with ranks(2, act) as (group, others):
        mine = act(group)
        assert mine == others[0].result(10)
    assert mine[0] == ()
    assert mine[1]
    assert tuple(copy for done in mine for copy in done) == (0, 1)
