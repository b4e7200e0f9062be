"""The worker with the fewest sequences; among equals in turn."""

from __future__ import annotations

from collections.abc import Sequence

from ellm.router.policies.base import Replica, ReplicaId, RoutedRequest


class LeastRequests:
    """Counts running, waiting and sent-but-unseen sequences alike."""

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, request: RoutedRequest, replicas: Sequence[Replica], now: float) -> ReplicaId | None:
        if not replicas:
            return None
        fewest = min(replica.num_requests for replica in replicas)
        equals = [replica for replica in replicas if replica.num_requests == fewest]
        self._turn += 1
        return equals[self._turn % len(equals)].replica_id
