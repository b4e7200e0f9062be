"""Each worker in turn, whatever its load: the baseline to compare with."""

from __future__ import annotations

from collections.abc import Sequence

from ellm.router.policies.base import Replica, ReplicaId, RoutedRequest


class RoundRobin:
    """Steps on by one with each choice."""

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, request: RoutedRequest, replicas: Sequence[Replica], now: float) -> ReplicaId | None:
        if not replicas:
            return None
        self._turn += 1
        return replicas[self._turn % len(replicas)].replica_id
