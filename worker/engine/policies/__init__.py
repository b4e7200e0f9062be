"""Scheduling policies of the engine, chosen by one setting (`policy: ...`)."""

from __future__ import annotations

from collections.abc import Callable

from ellm.worker.api.config import SchedulerConfig
from ellm.worker.api.errors import ConfigError
from ellm.worker.engine.policies.base import Policy
from ellm.worker.engine.policies.full_chunked import FullChunked

__all__ = ["POLICIES", "Policy", "make_policy"]

POLICIES: dict[str, Callable[[SchedulerConfig], Policy]] = {
    "full-chunked": lambda config: FullChunked(),
}


def make_policy(config: SchedulerConfig) -> Policy:
    """The policy that `config` names. Raises ConfigError for a name that is not registered."""
    factory = POLICIES.get(config.policy)
    if factory is None:
        known = ", ".join(sorted(POLICIES))
        raise ConfigError(f"unknown policy {config.policy!r}; known: {known}", param="scheduler.policy")
    return factory(config)
