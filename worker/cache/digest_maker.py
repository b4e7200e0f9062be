"""Keeps the digest of a prefix index up to date and cuts it into reports (worker/api/prefix_digest.py).

The index tells it of every block that comes, is hit and goes: O(1) each, and nothing at all for depths that
are not kept. Beyond MAX_ENTRIES the least recently used entry is left out, though its block is still there.
"""

from __future__ import annotations

from collections import OrderedDict

from ellm.worker.api.block_hash import BlockHash
from ellm.worker.api.prefix_digest import (
    MAX_ENTRIES,
    MAX_PER_PAGE,
    NUM_PAGES,
    Key,
    is_kept,
    key_of,
    pack_pages,
)

SLOT_S = 0.1  # reports within one slot carry the same pages
REFRESHED = 8  # pages per slot that come round without having changed: all of them in 3.2 s
REPEATS = 2  # slots that carry a page once it has changed
LEAST_REFRESHED = 2  # of them even where everything changes: all in 12.8 s
MAX_BYTES = 1024  # of one report


class DigestMaker:
    """Time is the caller's, in seconds of a clock that need not be monotonic."""

    def __init__(self, max_entries: int = MAX_ENTRIES) -> None:
        assert max_entries > 0
        self._max_entries = max_entries
        self._recent: OrderedDict[Key, None] = OrderedDict()  # least recently used first
        self._pages: list[set[Key]] = [set() for _ in range(NUM_PAGES)]
        self._changed: OrderedDict[int, int] = OrderedDict()  # page -> slots that must still carry it
        self._next = 0  # page to come round
        self._slot_at: float | None = None
        self._packed = b""

    def __len__(self) -> int:
        return len(self._recent)

    def add(self, block_hash: BlockHash, depth: int) -> None:
        """The index has block number `depth` (from 1) of some prefix now."""
        if not is_kept(depth):
            return
        key = key_of(block_hash)
        page = self._pages[key >> 16]
        if key in page:
            self._recent.move_to_end(key)
        elif len(page) < MAX_PER_PAGE:
            if len(self._recent) >= self._max_entries:
                self._drop(next(iter(self._recent)))
            self._recent[key] = None
            page.add(key)
            self._changed[key >> 16] = REPEATS

    def touch(self, block_hash: BlockHash) -> None:
        """A hit."""
        key = key_of(block_hash)
        if key in self._recent:
            self._recent.move_to_end(key)

    def discard(self, block_hash: BlockHash) -> None:
        """The index has it no more."""
        key = key_of(block_hash)
        if key in self._recent:
            self._drop(key)

    def packed(self, now: float) -> bytes:
        """What a report of `now` carries: two pages that come round, those that changed, the longest due
        first, then more that come round. O(MAX_BYTES)."""
        if self._slot_at is None or not 0.0 <= now - self._slot_at < SLOT_S:
            self._slot_at = now
            self._packed = self._pack()
        return self._packed

    def _pack(self) -> bytes:
        pages: dict[int, set[Key]] = {}
        room = self._refresh(pages, LEAST_REFRESHED, MAX_BYTES - 1)
        for number in list(self._changed):
            size = 0 if number in pages else 2 + 2 * len(self._pages[number])
            if size > room:
                break
            room -= size
            pages[number] = self._pages[number]
            left = self._changed.pop(number) - 1
            if left:
                self._changed[number] = left
        self._refresh(pages, REFRESHED - LEAST_REFRESHED, room)
        return pack_pages(pages)

    def _refresh(self, pages: dict[int, set[Key]], most: int, room: int) -> int:
        """Add up to `most` of the pages that come round, as far as `room` bytes go; returns the room left.
        One page always fits into a report, and two unless a hash is far from even."""
        for _ in range(most):
            size = 0 if self._next in pages else 2 + 2 * len(self._pages[self._next])
            if size > room:
                break
            room -= size
            pages[self._next] = self._pages[self._next]
            self._next = (self._next + 1) % NUM_PAGES
        return room

    def _drop(self, key: Key) -> None:
        del self._recent[key]
        self._pages[key >> 16].discard(key)
        self._changed[key >> 16] = REPEATS
