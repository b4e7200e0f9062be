"""The KV pool's tensors: per layer keys and values, each [num_blocks, kv_heads, block_size, head_dim].

Which block belongs to whom is the block pool's business; every block, 0 included, is usable.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ellm.worker.model.architecture import Architecture


class KVCache:
    """One allocation, seen per layer."""

    def __init__(
        self, arch: Architecture, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        shape = (arch.num_layers, 2, num_blocks, arch.num_kv_heads, block_size, arch.head_dim)
        pool = _zeros(shape, dtype, device)
        self.num_bytes = pool.numel() * pool.element_size()
        self.layers: list[tuple[Tensor, Tensor]] = [(layer[0], layer[1]) for layer in pool]


def block_bytes(arch: Architecture, block_size: int, dtype: torch.dtype) -> int:
    """Bytes that one block takes over all layers."""
    return arch.kv_elements_per_token * block_size * dtype.itemsize


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeroed memory: a body may read slots past a sequence's end before it masks them, and 0 * NaN is NaN.

    On a CPU pages come zeroed from the system as they are first touched; torch.zeros would touch them all.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)
