"""How many KV blocks a worker takes, on the device and on the host: arithmetic on measured bytes, refusals in
words."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    transient: int = 0  # the transient blocks, all banks
    host_buffers: int = 0  # of the device, for copies to and from the host
    host_available: int = 0  # before the weights were loaded; on a CPU the same memory as `available`
    num_ranks: int = 1  # of the worker
    graphs: int = 0  # recorded steps

    @property
    def fixed(self) -> int:
        """All of the device's memory that is not the pool's."""
        return self.weights + self.activations + self.graphs + self.transient + self.host_buffers


@dataclass(frozen=True, slots=True)
class PoolSize:
    """The decision."""

    num_blocks: int
    max_model_len: int  # tokens; less than the checkpoint's where the pool is smaller
    memory: tuple[tuple[str, int], ...]  # (what, bytes): the reckoning, for printing
    num_host_blocks: int = 0


def share_of_rank(cache: CacheConfig, size: int) -> CacheConfig:
    """Bytes are those of a worker: each of its `size` ranks has its share. Blocks are the same on all."""
    limit = cache.max_pool_bytes
    return replace(
        cache,
        max_pool_bytes=None if limit is None else limit // size,
        host_bytes=cache.host_bytes // size,
    )


def _pool_bytes(cache: CacheConfig, budget: MemoryBudget) -> int:
    """GPU: fraction of what is free, less weights and activations. CPU: the same of half of what is free
    (other workers and the page cache want the rest), and at most `max_pool_bytes`."""
    usable = budget.available // 2 if budget.on_cpu else budget.available
    room = int(usable * cache.memory_fraction) - budget.fixed
    limit = cache.max_pool_bytes
    if limit is None and budget.on_cpu:
        limit = CPU_DEFAULT_POOL_BYTES // budget.num_ranks
    return room if limit is None else min(room, limit)


def size_pool(cache: CacheConfig, budget: MemoryBudget, max_model_len: int, *, may_shorten: bool) -> PoolSize:
    """Blocks of the pool and of the host tier, and the context that fits.

    On a CPU the bytes of the host tier are more blocks of the pool, unless it is to be `copied`: KV in the
    host's memory is where attention reads it already, and a copy would hold it twice.

    `may_shorten`: the context length was not asked for, so a small pool lowers it. Raises ConfigError when
    the pool cannot hold one sequence of `max_model_len` tokens, or `num_blocks` or `host_bytes` exceeds the
    memory.
    """
    room = _pool_bytes(cache, budget)
    if cache.num_blocks is not None:
        num_blocks = cache.num_blocks
        free = budget.available - budget.fixed
        if num_blocks < 1 or num_blocks * budget.block > free:
            raise ConfigError(
                f"cache.num_blocks = {num_blocks} takes {mib(num_blocks * budget.block)} and "
                f"{mib(max(0, free))} are left",
                param="cache.num_blocks",
            )
    else:
        num_blocks = max(0, room) // budget.block
    num_host_blocks = _host_blocks(cache, budget, num_blocks)
    if budget.on_cpu and cache.host_tier == "auto":
        num_blocks, num_host_blocks = num_blocks + num_host_blocks, 0
    fits = num_blocks * cache.block_size
    if fits < max_model_len and (num_blocks == 0 or not may_shorten):
        raise ConfigError(
            f"the KV pool holds {fits} tokens ({mib(num_blocks * budget.block)}), not one sequence of "
            f"{max_model_len}; lower model.max_model_len or give more memory "
            f"(available {mib(budget.available)}, weights {mib(budget.weights)}, "
            f"activations {mib(budget.activations)})",
            param="model.max_model_len",
        )
    memory = [
        ("available at start", budget.available),
        ("weights", budget.weights),
        ("activations of the largest step", budget.activations),
        ("KV pool", num_blocks * budget.block),
        ("KV block", budget.block),
    ]
    if budget.graphs:
        memory.append(("CUDA graphs", budget.graphs))
    if budget.transient:
        memory.append(("transient KV blocks", budget.transient))
    if num_host_blocks:
        memory.append(("host KV pool", num_host_blocks * budget.block))
    return PoolSize(num_blocks, min(max_model_len, fits), tuple(memory), num_host_blocks)


def check_transient(cache: CacheConfig, budget: MemoryBudget) -> None:
    """Before they are allocated. Raises ConfigError where the transient blocks alone exceed the memory."""
    free = budget.available - budget.fixed + budget.transient
    if budget.transient > free:
        raise ConfigError(
            f"cache.transient_blocks = {cache.transient_blocks} takes {mib(budget.transient)} and "
            f"{mib(max(0, free))} are left",
            param="cache.transient_blocks",
        )


def _host_blocks(cache: CacheConfig, budget: MemoryBudget, num_blocks: int) -> int:
    """Whole blocks of the host tier. Raises ConfigError for one that does not fit, or holds no block."""
    if not cache.host_bytes:
        return 0
    free = budget.host_available
    if budget.on_cpu:
        free -= budget.fixed + num_blocks * budget.block
    if cache.host_bytes > free:
        raise ConfigError(
            f"cache.host_bytes = {mib(cache.host_bytes)} and {mib(max(0, free))} are left on the host",
            param="cache.host_bytes",
        )
    if cache.host_bytes < budget.block:
        raise ConfigError(
            f"cache.host_bytes = {cache.host_bytes} holds no KV block, which takes {budget.block} bytes",
            param="cache.host_bytes",
        )
    return cache.host_bytes // budget.block


def mib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):.0f} MiB"
