"""One worker per session, by rendezvous hashing, unless it is too busy: then the session's next one.

Thaler and Ravishankar, "Using Name-Based Mappings to Increase Hit Rates" (1998); the bound on load is that of
Mirrokni et al., "Consistent Hashing with Bounded Loads" (2018). Every router finds the same worker without
a word between them. A request without a session takes the less loaded of two.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from zlib import crc32

from ellm.router.policies.base import Choice, RoutedRequest
from ellm.router.policies.candidates import STALE, candidates
from ellm.router.policies.power_of_two import less_loaded
from ellm.router.policies.replica import Replica

LOAD_BOUND = 1.25  # of the mean number of sequences
_MIX, _MASK = 0x9E3779B97F4A7C15, (1 << 64) - 1


class SessionAffinity:
    """`seed` makes the choices for requests without a session reproducible."""

    def __init__(self, seed: int | None = None) -> None:
        self._random = random.Random(seed)
        self._crc: dict[str, int] = {}  # of replica ids

    def choose(self, request: RoutedRequest, replicas: Sequence[Replica], now: float) -> Choice | None:
        there = candidates(replicas, now)
        if not there.replicas:
            return None
        if request.session_id is None:
            chosen = less_loaded(self._random, there.replicas)
            return Choice(chosen.replica_id, there.fallback or "no-session")
        chosen, reason = self._home(f"{request.salt}/{request.session_id}", there.replicas, there.fallback)
        return Choice(chosen.replica_id, there.fallback or reason)

    def _home(self, name: str, replicas: Sequence[Replica], fallback: str | None) -> tuple[Replica, str]:
        """The first in the session's order that has room; with stale reports its first, whatever they say."""
        session = crc32(name.encode())
        order = sorted(replicas, key=lambda r: self._weight(session, r.replica_id), reverse=True)
        if fallback == STALE:
            return order[0], "session"
        bound = LOAD_BOUND * (1 + sum(r.num_requests for r in replicas)) / len(replicas)
        for place, replica in enumerate(order):
            if replica.num_requests < bound or place == len(order) - 1:
                return replica, "session" if place == 0 else "session-busy"
        raise AssertionError("no replica")

    def _weight(self, session: int, replica_id: str) -> int:
        crc = self._crc.get(replica_id)
        if crc is None:
            if len(self._crc) > 4096:  # of workers long gone
                self._crc.clear()
            crc = self._crc[replica_id] = crc32(replica_id.encode())
        mixed = ((session << 32 | crc) * _MIX) & _MASK
        mixed = ((mixed ^ mixed >> 29) * _MIX) & _MASK
        return mixed ^ mixed >> 32
