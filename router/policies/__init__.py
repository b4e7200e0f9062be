"""Routing policies: pure choices of a worker for a request. One line here adds one."""

from __future__ import annotations

from collections.abc import Callable

from ellm.router.policies.base import Choice, RoutedRequest, RoutingPolicy
from ellm.router.policies.headroom import Headroom
from ellm.router.policies.least_requests import LeastRequests
from ellm.router.policies.power_of_two import PowerOfTwo
from ellm.router.policies.prefix_affinity import PrefixAffinity
from ellm.router.policies.replica import Replica, ReplicaId
from ellm.router.policies.round_robin import RoundRobin
from ellm.router.policies.session import SessionAffinity
from ellm.worker.api.errors import ConfigError

POLICIES: dict[str, Callable[[int | None], RoutingPolicy]] = {
    "headroom": Headroom,
    "least-requests": LeastRequests,
    "power-of-two": PowerOfTwo,
    "prefix-affinity": PrefixAffinity,
    "round-robin": RoundRobin,
    "session": SessionAffinity,
}


def make_policy(name: str, seed: int | None = None) -> RoutingPolicy:
    """`seed` makes its chance reproducible. Raises ConfigError for an unknown name."""
    if name not in POLICIES:
        raise ConfigError(f"no routing policy {name!r}; there are {', '.join(sorted(POLICIES))}")
    return POLICIES[name](seed)


__all__ = ["POLICIES", "Choice", "Replica", "ReplicaId", "RoutedRequest", "RoutingPolicy", "make_policy"]
