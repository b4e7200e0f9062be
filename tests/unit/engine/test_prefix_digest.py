"""The prefix digest: what is cached is found, what is gone is not, and reports stay small."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from ellm.router.policies.prompt_keys import PromptKeys, RecentPrompts, num_places
from ellm.worker.api.block_hash import block_hashes
from ellm.worker.api.prefix_digest import (
    MAX_ENTRIES,
    NUM_PAGES,
    VERSION,
    DigestView,
    is_kept,
    key_of,
    next_kept,
    pack_pages,
)
from ellm.worker.cache.block_pool import BlockPool
from ellm.worker.cache.digest_maker import LEAST_REFRESHED, MAX_BYTES, REFRESHED, SLOT_S, DigestMaker

ROUND = NUM_PAGES // REFRESHED  # slots until every page has come round


def add(maker: DigestMaker, prompt: list[int], salt: str = "") -> None:
    for depth, block_hash in enumerate(block_hashes(prompt, 16, salt), 1):
        maker.add(block_hash, depth)


def found(view: DigestView, prompt: list[int], salt: str = "") -> int:
    keys = PromptKeys(prompt, 16, salt)
    return keys.tokens(num_places(keys, view, RecentPrompts(), 0.0))


def caught_up(maker: DigestMaker, view: DigestView, start: float = 0.0, slots: int = ROUND) -> float:
    for slot in range(slots):
        view.update(maker.packed(start + slot * SLOT_S * 1.001))
    return start + slots * SLOT_S * 1.001


def test_kept_depths_are_four_per_octave() -> None:
    kept = [depth for depth in range(200) if is_kept(depth)]
    assert kept[:14] == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24]
    walked = [0]
    while walked[-1] < kept[-1]:
        walked.append(next_kept(walked[-1]))
    assert walked[1:] == kept
    assert all(after <= 1.25 * before for before, after in pairwise(kept) if before >= 4)


def test_what_is_cached_is_found_to_a_fifth() -> None:
    maker, view = DigestMaker(), DigestView()
    prompts = [[number] * length for number, length in enumerate((15, 16, 100, 640, 3000, 16_000))]
    for prompt in prompts:
        add(maker, prompt)
    caught_up(maker, view)
    for prompt in prompts:
        full = len(prompt) // 16 * 16
        assert 0.8 * full - 1 <= found(view, prompt) <= full
        assert found(view, prompt, "another tenant") == 0
        assert found(view, [*prompt[:50], -1, *prompt[51:]]) <= 48


def test_what_is_gone_is_gone_everywhere_after_a_round() -> None:
    maker, view, late = DigestMaker(), DigestView(), DigestView()
    prompt = list(range(320))
    add(maker, prompt)
    now = caught_up(maker, view)
    assert found(view, prompt) == 319
    for block_hash in reversed(block_hashes(prompt, 16)[8:]):
        maker.discard(block_hash)
    view.update(maker.packed(now))
    assert found(view, prompt) == 128
    caught_up(maker, late, now + 1.0)  # a router that has just come
    assert found(late, prompt) == 128
    assert view.keys == late.keys


def test_lost_reports_are_made_good() -> None:
    chance, maker, view = random.Random(3), DigestMaker(), DigestView()
    now = 0.0
    for number in range(300):
        add(maker, [number] * 400)
        if number > 100:
            for block_hash in block_hashes([number - 100] * 400, 16):
                maker.discard(block_hash)
        packed = maker.packed(now)
        now += SLOT_S * 1.001
        if chance.random() < 0.5:
            view.update(packed)
    caught_up(maker, view, now)
    whole = DigestView()
    caught_up(maker, whole, now + 100.0)
    assert view.keys == whole.keys
    assert len(whole.keys) == len(maker)


def test_a_report_is_bounded_and_equal_within_a_slot() -> None:
    maker = DigestMaker()
    for number in range(2000):
        add(maker, [number] * 640)
    assert len(maker) == MAX_ENTRIES
    sizes = []
    for slot in range(3 * ROUND):
        packed = maker.packed(slot * SLOT_S * 1.001)
        assert maker.packed(slot * SLOT_S * 1.001 + 0.5 * SLOT_S) == packed
        sizes.append(len(packed))
    assert max(sizes) <= MAX_BYTES
    assert sizes[-1] < 450  # nothing changes: only the pages that come round
    maker.packed(-5.0)  # the clock has jumped
    assert maker.packed(-5.0 + 1.1 * SLOT_S) != b""


def test_pages_come_round_where_more_changes_than_a_report_holds() -> None:
    maker, view, chance = DigestMaker(), DigestView(), random.Random(5)
    stays = [number << 16 | 7 for number in range(NUM_PAGES)]
    for key in stays:
        maker.add(key.to_bytes(3, "big") + bytes(29), 1)
    caught_up(maker, DigestView())  # nobody that listens later has heard of those
    for slot in range(1000, 1000 + NUM_PAGES // LEAST_REFRESHED):
        for _ in range(600):  # the lower half of the pages changes every time, the upper one never
            maker.add(bytes((chance.randrange(NUM_PAGES // 2),)) + chance.randbytes(31), 1)
        for key in stays:
            maker.touch(key.to_bytes(3, "big") + bytes(29))
        packed = maker.packed(slot * SLOT_S * 1.001)
        assert len(packed) <= MAX_BYTES
        view.update(packed)
    assert view.keys.issuperset(stays)


def test_the_least_recently_used_are_left_out() -> None:
    maker, view = DigestMaker(max_entries=64), DigestView()
    old = [[number] * 80 for number in range(12)]  # five entries each
    for prompt in old:
        add(maker, prompt)
    for block_hash in block_hashes(old[0], 16):
        maker.touch(block_hash)
    for number in range(100, 108):
        add(maker, [number] * 80)
    caught_up(maker, view)
    assert found(view, old[0]) == 79
    assert found(view, old[1]) == 0
    assert len(maker) == 64


def test_false_hits_are_as_rare_as_is_said() -> None:
    maker, view = DigestMaker(), DigestView()
    for number in range(1500):
        add(maker, [number] * 64)
    caught_up(maker, view)
    chance = random.Random(1)
    trials = 400_000
    hits = sum(chance.randrange(1 << 24) in view.keys for _ in range(trials))
    assert hits <= 3 * trials * MAX_ENTRIES / (1 << 24)


@pytest.mark.parametrize("packed", [b"", b"\x09\x01\x01ab", bytes((VERSION, 7, 200, 1)), bytes((VERSION, 7))])
def test_what_cannot_be_read_is_left_alone(packed: bytes) -> None:
    view = DigestView()
    view.update(pack_pages({3: [3 << 16 | 5]}))
    view.update(packed)
    assert view.keys == {3 << 16 | 5}


def test_the_pool_keeps_its_digest() -> None:
    """Through every path by which a block's content comes, is hit and goes."""
    pool = BlockPool(8, 16)
    hashes = block_hashes(list(range(128)), 16)
    blocks = [pool.allocate() for _ in range(8)]
    for depth, (block_hash, block) in enumerate(zip(hashes, blocks, strict=True), 1):
        pool.index.insert(block_hash, block, depth)
    pool.release(blocks)
    assert len(pool.index.digest) == 8
    pool.reference(blocks[0])
    for _ in range(3):
        pool.allocate()
    view = DigestView()
    caught_up(pool.index.digest, view)
    assert {key_of(block_hash) for block_hash in hashes[:5]} == view.keys
