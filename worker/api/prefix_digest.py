"""The prefix digest: which prompt prefixes a worker has cached, in a few hundred bytes per report.

A prefix of `depth` blocks is known by the chain hash of its last block (block_hash.py; the tenant's salt is
in it). Of all depths four per octave are kept (1 to 8, 10, 12, 14, 16, 20, ...), so that what is found is at
most a fifth short; of each hash the first 24 bits. The first byte names one of 256 pages, a report carries a
few whole pages, and the newest copy of a page replaces the one before: a lost report is made good when its
pages come round again, and a router that has just come knows all after one round.

    bytes    version, then for each page: its number, count n, n times two bytes

With n entries in all, a prefix that is not there is taken for present with probability n / 2^24: 1 in 4,096
at the bound of 4,096 entries. It costs a wrong guess of one depth, for the next one is missing again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ellm.worker.api.block_hash import BlockHash

VERSION = 1
NUM_PAGES = 256
MAX_PER_PAGE = 255
MAX_ENTRIES = 4096
Key = int  # 24 bits of a chain hash


def key_of(block_hash: BlockHash) -> Key:
    return int.from_bytes(block_hash[:3], "big")


def is_kept(depth: int) -> bool:
    """Whether prefixes of `depth` blocks (from 1) are in digests."""
    shift = depth.bit_length() - 3
    return depth > 0 and (shift <= 0 or depth & ((1 << shift) - 1) == 0)


def next_kept(depth: int) -> int:
    """The least kept depth above `depth`, itself 0 or kept."""
    return depth + (1 << max(0, depth.bit_length() - 3))


def pack_pages(pages: Mapping[int, Iterable[Key]]) -> bytes:
    """The named pages, with all their keys; at most MAX_PER_PAGE of each."""
    packed = bytearray((VERSION,))
    for number, keys in pages.items():
        low = [key & 0xFFFF for key in keys][:MAX_PER_PAGE]
        packed += bytes((number, len(low)))
        for value in low:
            packed += value.to_bytes(2, "big")
    return bytes(packed)


class DigestView:
    """What a router has put together of one worker's pages. `keys` may be looked into at any time."""

    __slots__ = ("_pages", "keys")

    def __init__(self) -> None:
        self.keys: set[Key] = set()
        self._pages: list[bytes] = [b""] * NUM_PAGES  # as they came

    def update(self, packed: bytes) -> None:
        """Take the pages of a report. O(their bytes). Anything that this version does not read is left
        alone: without a digest a worker is merely chosen by its load."""
        if not packed or packed[0] != VERSION:
            return
        at, end = 1, len(packed)
        while at + 2 <= end:
            number, count = packed[at], packed[at + 1]
            body = packed[at + 2 : at + 2 + 2 * count]
            if len(body) < 2 * count:
                return
            if body != self._pages[number]:
                page = _keys(number, body)
                self.keys.difference_update(_keys(number, self._pages[number]) - page)
                self.keys |= page
                self._pages[number] = body
            at += 2 + 2 * count


def _keys(number: int, body: bytes) -> set[Key]:
    high = number << 16
    return {high | body[i] << 8 | body[i + 1] for i in range(0, len(body), 2)}
