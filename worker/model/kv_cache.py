"""The KV pool's tensors: keys and values apart, each block [kv_heads, block_size, head_dim].

Every layer has `num_blocks` blocks of its own. Behind those of the last layer lie the transient blocks, which
all layers share in two banks: even layers use one, odd layers the other, so that the next layer's can be
filled while this one computes. Which block belongs to whom is the block pool's business; every block, 0
included, is usable.

    keys:   layer 0: N blocks | layer 1: N blocks | ... | bank 0: T blocks | bank 1: T blocks
    values: the same
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ellm.worker.model.architecture import Architecture

NUM_BANKS = 2


class KVCache:
    """One allocation, seen per layer."""

    def __init__(
        self,
        arch: Architecture,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        num_transient: int = 0,
    ) -> None:
        self.num_layers = arch.num_layers
        self.num_blocks = num_blocks
        self.num_transient = num_transient  # blocks of one bank
        self.block_size = block_size
        self._num_resident = arch.num_layers * num_blocks
        total = self._num_resident + NUM_BANKS * num_transient
        assert total < 1 << 31, "block tables are int32"
        # [2, L * N + 2 * T, K, B, D]
        self.pool = _zeros((2, total, arch.num_kv_heads, block_size, arch.head_dim), dtype, device)
        self.num_bytes = self.pool.numel() * self.pool.element_size()
        own = self.resident
        self.layers: list[tuple[Tensor, Tensor]] = [(own[0, i], own[1, i]) for i in range(arch.num_layers)]

    @property
    def device(self) -> torch.device:
        return self.pool.device

    @property
    def resident(self) -> Tensor:
        """[2, L, N, K, B, D]: what the layers have of their own."""
        own = self.pool[:, : self._num_resident]
        return own.view(2, self.num_layers, self.num_blocks, *own.shape[2:])

    def bank(self, layer: int) -> Tensor:
        """[2, T, K, B, D]: the transient blocks that `layer` uses."""
        first = self._num_resident + layer % NUM_BANKS * self.num_transient
        return self.pool[:, first : first + self.num_transient]

    def from_layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values from the first block of `layer` to the end of the pool. In this view the ids of a
        layer's own blocks are what they are, and a transient id is too low by `transient_shift`."""
        first = layer * self.num_blocks
        return self.pool[0, first:], self.pool[1, first:]

    def transient_shift(self, layer: int) -> int:
        """What an id of [N, N + T) lacks to name its block of this layer's bank in `from_layer`."""
        return (self.num_layers - 1 - layer) * self.num_blocks + layer % NUM_BANKS * self.num_transient


def block_bytes(arch: Architecture, block_size: int, dtype: torch.dtype) -> int:
    """Bytes that one block takes over all layers."""
    return arch.kv_elements_per_token * block_size * dtype.itemsize


def transient_bytes(arch: Architecture, block_size: int, dtype: torch.dtype) -> int:
    """Bytes that one transient block takes in all banks."""
    return NUM_BANKS * block_bytes(arch, block_size, dtype) // arch.num_layers


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeroed memory: a body may read slots past a sequence's end before it masks them, and 0 * NaN is NaN.

    On a CPU pages come zeroed from the system as they are first touched; torch.zeros would touch them all.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)
