"""The missing stretch of a sequence's KV while it is filled from both ends.

A sequence that comes back may find a first run of its blocks, then nothing, then a later run: blocks that the
device still has, or that the host has. Rows compute the stretch from the front; the host's blocks are loaded
from the back; where they meet, the sequence goes on behind the later run. Each end claims a block before it
touches it. Blocks that the device has lie at the end of the later run: they are valid from the start. A
policy may leave the stretch to one end alone: to the front by not loading, to the back by `by_load`.

    [0 ... computed) [ to compute ... claimed) [ being loaded ... ready) [ valid ... end)
"""

from __future__ import annotations

from collections.abc import Sequence


class Gap:
    """Block numbers of one sequence. `sources[i]` says where block `first + i` of the later run is: the
    host's block, or -1 where the device has it already."""

    __slots__ = ("by_load", "claimed", "end", "failed", "first", "num_loading", "ready", "sources")

    def __init__(self, first: int, sources: Sequence[int]) -> None:
        assert sources
        self.first = first
        self.sources = list(sources)
        self.end = first + len(sources)
        self.claimed = self.end  # blocks from here on belong to the loading end
        self.ready = self.end  # blocks from here on are valid
        self.num_loading = 0
        self.failed = False
        self.by_load = False  # the front stops where the later run begins, as long as no load fails
        while self.ready > first and self.sources[self.ready - first - 1] < 0:
            self.ready -= 1
        self.claimed = self.ready

    def next_load(self, computed: int) -> tuple[int, int] | None:
        """Claim the next block from the back that has to be loaded, as (its number, the host's block).
        `computed`: blocks that are computed or are being computed, rounded up. None: the two ends have met,
        or a load failed."""
        if self.failed or self.claimed <= max(self.first, computed):
            return None
        self.claimed -= 1
        self.num_loading += 1
        source = self.sources[self.claimed - self.first]
        assert source >= 0, "a block of the device before one of the host"
        return self.claimed, source

    def front_end(self, computed: int) -> int:
        """The block before which the front has to stop. `computed` as for `next_load`."""
        if self.by_load and not self.failed:
            return min(self.claimed, max(self.first, computed))
        return self.claimed

    def loaded(self, number: int, *, failed: bool) -> None:
        """A load has ended. After a failure the front computes all that is not valid."""
        assert self.num_loading > 0
        self.num_loading -= 1
        self.failed = self.failed or failed
        if not self.failed:
            assert number == self.ready - 1, "loads end in the order in which they began"
            self.ready = number
        elif not self.num_loading:
            for i in range(self.claimed - self.first, self.ready - self.first):
                self.sources[i] = -1  # their copies have let go of the host's blocks
            self.claimed = self.ready
