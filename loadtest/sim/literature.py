"""Policies that are known from papers and serve for comparison here alone: no engine offers them.

`hcache` keeps hidden states on the host instead of KV (Gao et al., HCache, EuroSys 2025): a layer's input of
`hidden` numbers per token, from which keys and values are projected anew at restore. Against KV that is half
the bytes with multi-head attention, and 2 to 4 times as many with grouped-query attention. Otherwise it does
what `full-offload` does: writes through while the link is idle, restores beside the steps. `slsqp` is in a
file of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ellm.loadtest.sim.device import Device
from ellm.loadtest.sim.presets import BYTES, ModelPreset
from ellm.loadtest.sim.slsqp import Slsqp
from ellm.worker.api.config import SchedulerConfig
from ellm.worker.api.errors import ConfigError
from ellm.worker.engine.plan import ModelLimits
from ellm.worker.engine.policies import POLICIES, Policy, resolve_config
from ellm.worker.engine.policies.full_offload import FullOffload
from ellm.worker.engine.policies.spec import bind, override, parse_spec

STAND_IN = "full-chunked"  # what a config names where the policy is given as an object


class HCache(FullOffload):
    """Decides as `full-offload`; what the host holds, and what a restore costs, is the device's to say."""


LITERATURE: dict[str, Callable[..., Policy]] = {"hcache": HCache, "slsqp": Slsqp}


def make_policy(config: SchedulerConfig) -> tuple[SchedulerConfig, Policy | None]:
    """`config` as an engine can take it, and the policy object where it names one of this file. Raises
    ConfigError for a policy that nobody knows, and for parameters that it cannot take."""
    spec = parse_spec(config.policy)
    factory = LITERATURE.get(spec.name)
    if factory is not None:
        resolved, named = override(config, spec)
        return replace(resolved, policy=STAND_IN), factory(**bind(factory, spec, named))
    if spec.name not in POLICIES:
        known = ", ".join(sorted({*POLICIES, *LITERATURE}))
        raise ConfigError(f"unknown policy {spec.name!r}; known: {known}", param="scheduler.policy")
    resolve_config(config)
    return config, None


def host_limits(limits: ModelLimits, name: str, device: Device) -> ModelLimits:
    """`limits` with a host tier of what policy `name` keeps there."""
    if name != "hcache":
        return limits
    block_bytes = device.block_size * hidden_token_bytes(device.model)
    return replace(limits, block_bytes=block_bytes, num_host_blocks=int(device.host_bytes // block_bytes))


def load_block_s(name: str, device: Device) -> float:
    """Seconds of computing that a block costs when it has been loaded, under policy `name`."""
    if name != "hcache":
        return 0.0
    return device.block_size * projection_flop(device.model) / (device.tp * device.gpu.flop_per_s)


def hidden_token_bytes(model: ModelPreset) -> int:
    """The inputs of all layers, one token."""
    return BYTES * model.num_layers * model.hidden


def projection_flop(model: ModelPreset) -> float:
    """Keys and values of one token from its hidden states, all layers: two operations per weight."""
    return 2.0 * model.num_layers * model.hidden * 2 * model.num_kv_heads * model.head_dim
