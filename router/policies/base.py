"""What a routing policy sees and answers. Pure: time is an argument, chance comes from a seeded generator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

ReplicaId = str  # a worker's epoch


@dataclass(frozen=True, slots=True)
class RoutedRequest:
    """What a policy may know of a request."""

    prompt_ids: Sequence[int]
    num_sequences: int = 1
    session_id: str | None = None
    salt: str = ""


@dataclass(frozen=True, slots=True)
class Replica:
    """One worker as this router knows it: its last report, corrected for what was sent since."""

    replica_id: ReplicaId
    num_running: int
    num_waiting: int
    num_unseen: int  # sequences sent that the last report does not count yet
    headroom_tokens: int
    report_age_s: float

    @property
    def num_requests(self) -> int:
        return self.num_running + self.num_waiting + self.num_unseen


class RoutingPolicy(Protocol):
    """One object per router; it may keep state between choices."""

    def choose(self, request: RoutedRequest, replicas: Sequence[Replica], now: float) -> ReplicaId | None:
        """The worker for this request; None when none will do. `replicas` are all that may be chosen, in an
        order that stays the same from call to call."""
        ...
