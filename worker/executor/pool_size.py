"""How many KV blocks a worker takes: arithmetic on measured bytes, refusals in words."""

from __future__ import annotations

from dataclasses import dataclass

from ellm.worker.api.config import CacheConfig
from ellm.worker.api.errors import ConfigError

CPU_DEFAULT_POOL_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """What was measured before the pool is taken, in bytes."""

    available: int  # before the weights were loaded
    weights: int
    activations: int  # peak of the largest admissible plan
    block: int  # one KV block over all layers
    on_cpu: bool


@dataclass(frozen=True, slots=True)
class PoolSize:
    """The decision."""

    num_blocks: int
    max_model_len: int  # tokens; less than the checkpoint's where the pool is smaller
    memory: tuple[tuple[str, int], ...]  # (what, bytes): the reckoning, for printing


def _pool_bytes(cache: CacheConfig, budget: MemoryBudget) -> int:
    """GPU: fraction of what is free, less weights and activations. CPU: the same of half of what is free
    (other workers and the page cache want the rest), and at most `max_pool_bytes`."""
    usable = budget.available // 2 if budget.on_cpu else budget.available
    room = int(usable * cache.memory_fraction) - budget.weights - budget.activations
    limit = cache.max_pool_bytes
    if limit is None and budget.on_cpu:
        limit = CPU_DEFAULT_POOL_BYTES
    return room if limit is None else min(room, limit)


def size_pool(cache: CacheConfig, budget: MemoryBudget, max_model_len: int, *, may_shorten: bool) -> PoolSize:
    """Blocks of the pool, and the context that fits.

    `may_shorten`: the context length was not asked for, so a small pool lowers it. Raises ConfigError when
    the pool cannot hold one sequence of `max_model_len` tokens, or `num_blocks` exceeds the memory.
    """
    room = _pool_bytes(cache, budget)
    if cache.num_blocks is not None:
        num_blocks = cache.num_blocks
        free = budget.available - budget.weights - budget.activations
        if num_blocks < 1 or num_blocks * budget.block > free:
            raise ConfigError(
                f"cache.num_blocks = {num_blocks} takes {_mib(num_blocks * budget.block)} and "
                f"{_mib(max(0, free))} are left",
                param="cache.num_blocks",
            )
    else:
        num_blocks = max(0, room) // budget.block
    fits = num_blocks * cache.block_size
    if fits < max_model_len and (num_blocks == 0 or not may_shorten):
        raise ConfigError(
            f"the KV pool holds {fits} tokens ({_mib(num_blocks * budget.block)}), not one sequence of "
            f"{max_model_len}; lower model.max_model_len or give more memory "
            f"(available {_mib(budget.available)}, weights {_mib(budget.weights)}, "
            f"activations {_mib(budget.activations)})",
            param="model.max_model_len",
        )
    memory = (
        ("available at start", budget.available),
        ("weights", budget.weights),
        ("activations of the largest step", budget.activations),
        ("KV pool", num_blocks * budget.block),
        ("KV block", budget.block),
    )
    return PoolSize(num_blocks, min(max_model_len, fits), memory)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):.0f} MiB"
