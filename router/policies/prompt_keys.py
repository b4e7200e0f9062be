"""Where a prompt's prefix may be cached: its chain hashes beside the digests of the workers.

A prompt is hashed as deep as some worker knows it and one step further, never as deep as it is long; once per
request, not once per worker.
"""

from __future__ import annotations

from collections.abc import Sequence

from ellm.worker.api.block_hash import hash_on, root_hash
from ellm.worker.api.prefix_digest import DigestView, Key, key_of, next_kept

_REMEMBERED = 128  # prompts sent to one worker
_REMEMBERED_S = 10.0  # by then the worker's digest knows better


class PromptKeys:
    """Keys of one prompt at the kept depths, made when they are asked for."""

    __slots__ = ("_block_size", "_depth", "_hash", "_ids", "depths", "keys")

    def __init__(self, prompt_ids: Sequence[int], block_size: int, salt: str) -> None:
        assert block_size > 0
        self._ids = prompt_ids
        self._block_size = block_size
        self._depth = 0
        self._hash = root_hash(salt)
        self.keys: list[Key] = []
        self.depths: list[int] = []  # in blocks, of each

    def key(self, place: int) -> Key | None:
        """At the `place`-th kept depth, asked for in order; None where the prompt is over."""
        keys = self.keys
        if place < len(keys):
            return keys[place]
        size, ids = self._block_size, self._ids
        depth = next_kept(self._depth)
        if depth * size > len(ids):
            return None
        self._hash = hash_on(self._hash, ids[self._depth * size : depth * size], size)
        self._depth = depth
        keys.append(key_of(self._hash))
        self.depths.append(depth)
        return keys[-1]

    def tokens(self, num_places: int) -> int:
        """Tokens that a worker need not compute if the first `num_places` kept depths are there. The last
        token always runs."""
        if not num_places:
            return 0
        return min(self.depths[num_places - 1] * self._block_size, len(self._ids) - 1)


class RecentPrompts:
    """What was sent to a worker and is not in its digest yet; of prompts that begin alike, the last.
    `by_first`: by the first key, oldest first; for looking only."""

    __slots__ = ("by_first",)

    def __init__(self) -> None:
        self.by_first: dict[Key, tuple[PromptKeys, float]] = {}

    def add(self, keys: PromptKeys, now: float) -> None:
        first = keys.key(0)
        if first is None:
            return
        sent = self.by_first
        sent.pop(first, None)
        while sent:  # a prompt is not to be held much longer than it can be of use
            oldest = next(iter(sent))
            if len(sent) < _REMEMBERED and 0.0 <= now - sent[oldest][1] < _REMEMBERED_S:
                break
            del sent[oldest]
        sent[first] = (keys, now)

    def num_places(self, keys: PromptKeys, now: float) -> int:
        """Leading kept depths that `keys` shares with a prompt sent lately."""
        first = keys.key(0)
        found = self.by_first.get(first) if first is not None else None
        if first is None or found is None:
            return 0
        other, at = found
        if not 0.0 <= now - at < _REMEMBERED_S:
            del self.by_first[first]
            return 0
        place = 1
        while (key := keys.key(place)) is not None and key == other.key(place):
            place += 1
        return place


def num_places(keys: PromptKeys, digest: DigestView, recent: RecentPrompts, now: float) -> int:
    """Leading kept depths of the prompt that the worker has or is about to have."""
    known, place = digest.keys, 0
    while (key := keys.key(place)) is not None and key in known:
        place += 1
    return max(place, recent.num_places(keys, now))
