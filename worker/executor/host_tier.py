"""The host tier's parts for one device: its memory, what streams from it, what copies to and from it."""

from __future__ import annotations

from dataclasses import dataclass

from ellm.kernels.ops import Ops
from ellm.worker.executor.copies import Copier, ThreadCopier
from ellm.worker.executor.cuda_copies import CudaCopier
from ellm.worker.model.cuda_host_pool import CudaLayerLoads, PinnedHostPool
from ellm.worker.model.host_pool import HostPool, MemoryHostPool
from ellm.worker.model.kv_cache import KVCache
from ellm.worker.model.transient import LayerLoads, ThreadLoads


@dataclass(frozen=True, slots=True)
class HostTier:
    """They share the pool's memory and close together."""

    pool: HostPool
    loads: LayerLoads
    copier: Copier

    def close(self) -> None:
        """What is under way ends first. No call may follow."""
        self.copier.close()
        self.loads.close()
        self.pool.close()


def make_host_tier(cache: KVCache, num_blocks: int, block_bytes: int, ops: Ops) -> HostTier:
    """Raises ConfigError where the memory cannot be had."""
    if cache.device.type == "cpu":
        memory = MemoryHostPool(cache, num_blocks)
        loads = ThreadLoads(memory, cache.num_layers)
        return HostTier(memory, loads, ThreadCopier(memory, block_bytes))
    pinned = PinnedHostPool(cache, num_blocks, ops)
    return HostTier(pinned, CudaLayerLoads(pinned, cache), CudaCopier(pinned, block_bytes, cache.device))
