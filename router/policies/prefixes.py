"""How much of one request's prompt each worker is thought to have cached."""

from __future__ import annotations

from collections.abc import Iterable

from ellm.router.policies.base import RoutedRequest
from ellm.router.policies.prompt_keys import PromptKeys, num_places
from ellm.router.policies.replica import Replica, ReplicaId


class Prefixes:
    """Looks once at every worker. `tokens` leaves out those that have nothing."""

    __slots__ = ("_by_size", "_now", "_request", "tokens")

    def __init__(self, request: RoutedRequest, replicas: Iterable[Replica], now: float) -> None:
        self._request = request
        self._now = now
        self._by_size: dict[int, PromptKeys] = {}  # by block size
        self.tokens: dict[ReplicaId, int] = {}
        keys, first, size = None, None, 0
        for replica in replicas:
            if keys is None or replica.block_size != size:
                size = replica.block_size
                keys = self._keys(size)
                first = keys.key(0)
            if first is None or (first not in replica.digest.keys and first not in replica.recent.by_first):
                continue
            places = num_places(keys, replica.digest, replica.recent, now)
            if places:
                self.tokens[replica.replica_id] = keys.tokens(places)

    def placed(self, replica: Replica) -> int:
        """The request goes to `replica`, which will have its prefix soon; returns what it has already."""
        replica.recent.add(self._keys(replica.block_size), self._now)
        return self.tokens.get(replica.replica_id, 0)

    def _keys(self, size: int) -> PromptKeys:
        keys = self._by_size.get(size)
        if keys is None:
            keys = PromptKeys(self._request.prompt_ids, size, self._request.salt)
            self._by_size[size] = keys
        return keys
