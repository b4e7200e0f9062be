"""Routing policies: pure choices of a worker for a request. One line here adds one."""

from __future__ import annotations

from collections.abc import Callable

from ellm.router.policies.base import Replica, ReplicaId, RoutedRequest, RoutingPolicy
from ellm.router.policies.least_requests import LeastRequests
from ellm.router.policies.power_of_two import PowerOfTwo
from ellm.router.policies.round_robin import RoundRobin
from ellm.worker.api.errors import ConfigError

POLICIES: dict[str, Callable[[], RoutingPolicy]] = {
    "least-requests": LeastRequests,
    "power-of-two": PowerOfTwo,
    "round-robin": RoundRobin,
}


def make_policy(name: str) -> RoutingPolicy:
    """Raises ConfigError for an unknown name."""
    if name not in POLICIES:
        raise ConfigError(f"no routing policy {name!r}; there are {', '.join(sorted(POLICIES))}")
    return POLICIES[name]()


__all__ = ["POLICIES", "Replica", "ReplicaId", "RoutedRequest", "RoutingPolicy", "make_policy"]
