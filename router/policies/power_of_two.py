"""Two workers at random, the less loaded one of them: with many routers and old reports it does not herd.

Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing" (1996).
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from ellm.router.policies.base import Replica, ReplicaId, RoutedRequest


class PowerOfTwo:
    """`seed` makes its choices reproducible."""

    def __init__(self, seed: int | None = None) -> None:
        self._random = random.Random(seed)

    def choose(self, request: RoutedRequest, replicas: Sequence[Replica], now: float) -> ReplicaId | None:
        if not replicas:
            return None
        if len(replicas) == 1:
            return replicas[0].replica_id
        first, second = self._random.sample(replicas, 2)
        return (first if first.num_requests <= second.num_requests else second).replica_id
