"""The host tier's memory, and the moves of whole blocks and of single layers between it and a KV cache.

On a CPU both lie in the same memory and a move is a copy by the thread that calls; it lets other threads run
meanwhile. On a GPU the memory is pinned, and a move is queued on the current stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from ellm.worker.engine.plan import StreamedBlock
from ellm.worker.model.kv_cache import KVCache


class HostPool(Protocol):
    """Blocks [L, 2, K, B, D] outside the device's pool. A wrong id raises IndexError."""

    num_blocks: int
    num_bytes: int

    def save(self, block: int, host_block: int) -> None:
        """Copy a block of the cache, all layers, to the host."""
        ...

    def load(self, host_block: int, block: int) -> None:
        """Copy a block of the host, all layers, to the cache."""
        ...

    def stream(self, streams: Sequence[StreamedBlock], layer: int) -> None:
        """Copy one layer of the host's blocks to the transient blocks of that layer's bank."""
        ...

    def close(self) -> None:
        """Give the memory back. No call may follow."""
        ...


class MemoryHostPool:
    """On a CPU. Bytes are copied as they are, whatever they mean."""

    def __init__(self, cache: KVCache, num_blocks: int) -> None:
        assert cache.device.type == "cpu"
        self.num_blocks = num_blocks
        first_transient = cache.num_blocks
        self._first_transient = first_transient
        self._resident = _rows(cache.resident)  # [2, L, N, bytes]
        self._banks = [_rows(cache.bank(layer)) for layer in range(2)]  # [2, T, bytes] each
        # [H, L, 2, bytes]; pages come from the system as they are first touched.
        shape = (num_blocks, cache.num_layers, 2, self._resident.shape[-1])
        self._host: npt.NDArray[Any] = np.zeros(shape, dtype=np.uint8)
        self.num_bytes = self._host.nbytes

    def save(self, block: int, host_block: int) -> None:
        assert block >= 0
        assert host_block >= 0
        np.copyto(self._host[host_block], self._resident[:, :, block].swapaxes(0, 1))

    def load(self, host_block: int, block: int) -> None:
        assert block >= 0
        assert host_block >= 0
        np.copyto(self._resident[:, :, block].swapaxes(0, 1), self._host[host_block])

    def stream(self, streams: Sequence[StreamedBlock], layer: int) -> None:
        bank = self._banks[layer % len(self._banks)]
        for entry in streams:
            assert entry.host_block >= 0
            assert entry.transient_block >= self._first_transient
            np.copyto(
                bank[:, entry.transient_block - self._first_transient], self._host[entry.host_block, layer]
            )

    def close(self) -> None:
        self._host = self._host[:0]


def _rows(blocks: torch.Tensor) -> npt.NDArray[Any]:
    """[..., K, B, D] as bytes [..., n], the same memory."""
    return blocks.flatten(-3).view(torch.uint8).numpy()
