"""How much of one request's prompt each worker is thought to have cached."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ellm.router.policies.base import RoutedRequest
from ellm.router.policies.prompt_keys import PromptKeys, num_places
from ellm.router.policies.replica import Replica, ReplicaId


class Prefixes:
    """`tokens` leaves out those that have nothing, and those that were not looked at."""

    __slots__ = ("_by_size", "_now", "_request", "tokens")

    def __init__(self, request: RoutedRequest, now: float, replicas: Sequence[Replica] = ()) -> None:
        self._request = request
        self._now = now
        self._by_size: dict[int, PromptKeys] = {}  # by block size
        self.tokens: dict[ReplicaId, int] = {}
        self.look_at(replicas, self.beginnings(replicas))

    def beginnings(self, replicas: Iterable[Replica]) -> list[int]:
        """Indices of those that seem to have the prompt's first block."""
        found: list[int] = []
        first, size = None, 0
        for i, replica in enumerate(replicas):
            if replica.block_size != size:
                size = replica.block_size
                first = self._keys(size).key(0)
            if first is not None and (first in replica.digest.keys or first in replica.recent.by_first):
                found.append(i)
        return found

    def look_at(self, replicas: Sequence[Replica], indices: Iterable[int]) -> None:
        """At those of `replicas`, which seem to have the first block."""
        for i in indices:
            replica = replicas[i]
            keys = self._keys(replica.block_size)
            places = num_places(keys, replica.digest, replica.recent, self._now)
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
