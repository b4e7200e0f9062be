"""The missing stretch of a sequence, filled from both ends."""

from __future__ import annotations

from random import Random

import pytest

from ellm.worker.engine.gap import Gap


def test_the_back_claims_downwards_until_it_meets_the_front() -> None:
    gap = Gap(4, [10, 11, 12, 13])
    assert gap.next_load(4) == (7, 13)
    assert gap.next_load(4) == (6, 12)
    assert gap.claimed == 6
    assert gap.ready == 8
    assert gap.next_load(6) is None  # the front has computed up to there
    gap.loaded(7, failed=False)
    gap.loaded(6, failed=False)
    assert (gap.claimed, gap.ready, gap.num_loading) == (6, 6, 0)


def test_blocks_of_the_device_are_valid_from_the_start() -> None:
    gap = Gap(2, [20, 21, -1, -1])
    assert (gap.claimed, gap.ready, gap.end) == (4, 4, 6)
    assert gap.next_load(2) == (3, 21)


def test_the_front_computes_all_that_was_not_loaded_after_a_failure() -> None:
    gap = Gap(0, [30, 31, 32, 33])
    for _ in range(3):
        gap.next_load(0)
    gap.loaded(3, failed=False)
    gap.loaded(2, failed=True)
    assert gap.next_load(0) is None  # nothing more is loaded
    assert gap.claimed == 1  # block 1 is still being written
    gap.loaded(1, failed=False)
    assert gap.claimed == gap.ready == 3
    assert gap.sources[:3] == [30, -1, -1]  # what the copies held is not let go of twice


def test_the_front_stops_before_the_later_run_where_it_is_left_to_the_back() -> None:
    gap = Gap(2, [30, 31, 32])
    gap.by_load = True
    assert gap.front_end(0) == 2  # the stretch before it nobody has
    assert gap.front_end(3) == 3  # a block that it has begun it ends
    gap.next_load(3)
    gap.next_load(3)
    assert gap.next_load(3) is None
    gap.loaded(4, failed=True)
    assert gap.front_end(3) == gap.claimed == 3
    gap.loaded(3, failed=False)
    assert gap.front_end(3) == 5  # all of it after a failure


@pytest.mark.parametrize("seed", range(50))
def test_every_block_is_filled_once(seed: int) -> None:
    """From the front, from the back, or there from the start; never by two of them."""
    rng = Random(seed)
    first, size, on_device = rng.randint(0, 3), rng.randint(1, 12), rng.randint(0, 4)
    gap = Gap(first, [100 + i for i in range(size)] + [-1] * on_device)
    computed, filled = 0, list[int]()
    loading: list[int] = []
    while computed < gap.ready or gap.num_loading:
        choice = rng.random()
        gap.by_load = rng.random() < 0.3  # whoever says so may think again
        if choice < 0.4 and (claim := gap.next_load(computed)) is not None:
            assert claim[1] == 100 + claim[0] - first
            loading.append(claim[0])
        elif choice < 0.7 and loading:
            number = loading.pop(0)
            failed = gap.failed or rng.random() < 0.1
            gap.loaded(number, failed=failed)
            if not failed:
                filled.append(number)
        elif computed < gap.front_end(computed):
            filled.append(computed)
            computed += 1
    assert sorted(filled) == list(range(first + size))
