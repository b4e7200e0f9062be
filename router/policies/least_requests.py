"""The worker with the fewest sequences; among equals in turn."""

from __future__ import annotations

from collections.abc import Sequence

from ellm.router.policies.base import Choice, RoutedRequest
from ellm.router.policies.candidates import candidates
from ellm.router.policies.replica import Replica


class LeastRequests:
    """Counts running, waiting, parked and sent-but-unseen sequences alike. `seed`: where the turns begin."""

    def __init__(self, seed: int | None = None) -> None:
        self._turn = 0 if seed is None else seed

    def choose(self, request: RoutedRequest, replicas: Sequence[Replica], now: float) -> Choice | None:
        there = candidates(replicas, now)
        if not there.replicas:
            return None
        fewest = min(replica.num_requests for replica in there.replicas)
        equals = [replica for replica in there.replicas if replica.num_requests == fewest]
        self._turn += 1
        chosen = equals[self._turn % len(equals)]
        return Choice(chosen.replica_id, there.fallback or "least-requests")
