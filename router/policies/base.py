"""What a routing policy sees and answers. Pure: time is an argument, chance comes from a seeded generator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ellm.router.policies.replica import Replica, ReplicaId

OUTPUT_TOKENS = 256  # expected, where nothing has ended yet


@dataclass(frozen=True, slots=True)
class RoutedRequest:
    """What a policy may know of a request."""

    prompt_ids: Sequence[int]
    num_sequences: int = 1
    session_id: str | None = None
    salt: str = ""
    output_tokens: float = OUTPUT_TOKENS  # that each sequence is expected to make


@dataclass(frozen=True, slots=True)
class Choice:
    """Where a request goes, and why."""

    replica_id: ReplicaId
    reason: str  # the policy's name, or what made it fall back: counted in the router's metrics
    cached_tokens: int = 0  # of the prompt, that the worker is thought to have


class RoutingPolicy(Protocol):
    """One object per router; it may keep state between choices."""

    def choose(self, request: RoutedRequest, replicas: Sequence[Replica], now: float) -> Choice | None:
        """The worker for this request; None when none will do. `replicas` are all that this router knows, in
        an order that stays the same from call to call."""
        ...
