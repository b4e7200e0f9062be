"""Scheduling policies of the engine, chosen by one setting (`policy: NAME` or `NAME(param=value, ...)`)."""

from __future__ import annotations

from collections.abc import Callable

from ellm.worker.api.config import SchedulerConfig
from ellm.worker.api.errors import ConfigError
from ellm.worker.engine.policies.adaptive import Adaptive
from ellm.worker.engine.policies.base import Policy
from ellm.worker.engine.policies.full_chunked import FullChunked
from ellm.worker.engine.policies.full_offload import FullOffload
from ellm.worker.engine.policies.full_predictive import FullPredictive
from ellm.worker.engine.policies.full_recompute import FullRecompute
from ellm.worker.engine.policies.full_swap import FullSwap
from ellm.worker.engine.policies.literal import Literal
from ellm.worker.engine.policies.spec import Value, bind, override, parse_spec, split_specs

__all__ = ["POLICIES", "Policy", "make_policy", "resolve_config", "split_specs"]

# By name; the constructor's parameters, annotated int, float, bool or str, are those of the setting.
POLICIES: dict[str, Callable[..., Policy]] = {
    "adaptive": Adaptive,
    "full-chunked": FullChunked,
    "full-offload": FullOffload,
    "full-predictive": FullPredictive,
    "full-recompute": FullRecompute,
    "full-swap": FullSwap,
    "literal": Literal,
}


def resolve_config(config: SchedulerConfig) -> tuple[SchedulerConfig, str, dict[str, Value]]:
    """`config` with the limits that its policy setting replaces, the policy's name, and the arguments of its
    constructor. The setting itself stays as it was written, so that resolving again changes nothing.

    Raises ConfigError for a policy that is not registered, and for parameters that it cannot take.
    """
    spec = parse_spec(config.policy)
    factory = POLICIES.get(spec.name)
    if factory is None:
        known = ", ".join(sorted(POLICIES))
        raise ConfigError(f"unknown policy {spec.name!r}; known: {known}", param="scheduler.policy")
    resolved, named = override(config, spec)
    return resolved, spec.name, bind(factory, spec, named)


def make_policy(config: SchedulerConfig) -> Policy:
    """The policy that `config` names. Raises ConfigError as `resolve_config` does."""
    _, name, arguments = resolve_config(config)
    return POLICIES[name](**arguments)
