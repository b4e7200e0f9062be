"""Each worker in turn, whatever its load: the baseline to compare with."""

from __future__ import annotations

from collections.abc import Sequence

from ellm.router.policies.base import Choice, RoutedRequest
from ellm.router.policies.candidates import candidates
from ellm.router.policies.replica import Replica


class RoundRobin:
    """Steps on by one with each choice. Its age limit falls back to nothing else: it looks at no report."""

    def __init__(self, seed: int | None = None) -> None:
        self._turn = 0 if seed is None else seed

    def choose(self, request: RoutedRequest, replicas: Sequence[Replica], now: float) -> Choice | None:
        there = candidates(replicas, now)
        if not there.replicas:
            return None
        self._turn += 1
        chosen = there.replicas[self._turn % len(there.replicas)]
        return Choice(chosen.replica_id, there.fallback or "round-robin")
