"""Two workers at random, the less loaded one of them: with many routers and old reports it does not herd.

Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing" (1996).
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from ellm.router.policies.base import Choice, RoutedRequest
from ellm.router.policies.candidates import candidates
from ellm.router.policies.replica import Replica


def less_loaded(chance: random.Random, replicas: Sequence[Replica]) -> Replica:
    """Of two at random the one with fewer sequences; `replicas` is not empty."""
    if len(replicas) == 1:
        return replicas[0]
    first, second = chance.sample(replicas, 2)
    return first if first.num_requests <= second.num_requests else second


class PowerOfTwo:
    """`seed` makes its choices reproducible."""

    def __init__(self, seed: int | None = None) -> None:
        self._random = random.Random(seed)

    def choose(self, request: RoutedRequest, replicas: Sequence[Replica], now: float) -> Choice | None:
        there = candidates(replicas, now)
        if not there.replicas:
            return None
        chosen = less_loaded(self._random, there.replicas)
        return Choice(chosen.replica_id, there.fallback or "power-of-two")
