"""The host tier of a GPU: pinned memory, and its layers streamed beside the computation by a copy stream.

All moves are queued and return at once. Whole blocks go through a buffer on the device, one per direction
(`staged_moves`); single layers go straight to their bank, by the copy engine or by a kernel that reads pinned
memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ellm.kernels.ops import Ops
from ellm.worker.api.errors import ConfigError
from ellm.worker.engine.plan import StreamedBlock
from ellm.worker.model.host_pool import HostPool
from ellm.worker.model.kv_cache import NUM_BANKS, KVCache
from ellm.worker.model.staged_moves import Move, StagedMoves, pairs_tensor

NUM_STAGED = 8  # blocks that one direction moves at a time
NUM_BUFFERS = 2 * NUM_STAGED  # blocks of the device that a pool takes


class PinnedHostPool:
    """Moves are queued on the current stream; saves on one stream, loads on another, streams on a third."""

    def __init__(self, cache: KVCache, num_blocks: int, ops: Ops, *, streams_by_kernel: bool = False) -> None:
        """Raises ConfigError where the system does not let so much memory be pinned."""
        self.num_blocks = num_blocks
        self._ops = ops
        self._by_kernel = streams_by_kernel
        self._first_transient = cache.num_blocks
        self._banks = [cache.bank(layer) for layer in range(NUM_BANKS)]
        self._host = _pinned((num_blocks, cache.num_layers, 2, *cache.pool.shape[2:]), cache.pool.dtype)
        self.num_bytes = self._host.numel() * self._host.element_size()
        resident = cache.resident.transpose(0, 1)  # [L, 2, N, K, B, D]
        self._saves = StagedMoves(ops, resident, self._host, NUM_STAGED)
        self._loads = StagedMoves(ops, resident, self._host, NUM_STAGED)
        self._device = cache.device
        self._streamed: Sequence[StreamedBlock] | None = None  # whose pairs are known
        self._pairs: Tensor | None = None

    def save(self, block: int, host_block: int) -> None:
        self._saves.save([(block, host_block)])

    def load(self, host_block: int, block: int) -> None:
        self._loads.load([(block, host_block)])

    def move(self, moves: Sequence[Move], *, save: bool) -> None:
        """Several at once."""
        if save:
            self._saves.save(moves)
        else:
            self._loads.load(moves)

    def stream(self, streams: Sequence[StreamedBlock], layer: int) -> None:
        bank = self._banks[layer % NUM_BANKS]
        if self._by_kernel:
            if self._streamed is not streams:
                pairs = [(s.host_block, s.transient_block - self._first_transient) for s in streams]
                self._streamed, self._pairs = streams, pairs_tensor(pairs, self._device)
            assert self._pairs is not None
            source = self._host[:, layer : layer + 1].permute(1, 2, 0, 3, 4, 5)
            self._ops.kv_copy(source, bank.unsqueeze(0), self._pairs)
            return
        for entry in streams:
            place, source = entry.transient_block - self._first_transient, self._host[entry.host_block, layer]
            bank[0, place].copy_(source[0], non_blocking=True)
            bank[1, place].copy_(source[1], non_blocking=True)

    def close(self) -> None:
        torch.cuda.synchronize(self._device)
        _runtime().cudaHostUnregister(self._host.data_ptr())
        del self._saves, self._loads  # they hold the memory, too
        self._host = self._host[:0]


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _pinned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory of just this size: torch's own pinned allocator may round it up to a power of two."""
    num_bytes = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    memory = torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8))
    status = _runtime().cudaHostRegister(memory.data_ptr(), num_bytes, 0)
    if int(status) != 0:
        raise ConfigError(
            f"cache.host_bytes: {num_bytes >> 20} MiB cannot be pinned (CUDA error {int(status)})",
            param="cache.host_bytes",
        )
    return memory.view(dtype).view(shape)


class CudaLayerLoads:
    """By a copy stream; events say when a bank is full and when it has been read."""

    def __init__(self, host: HostPool, cache: KVCache) -> None:
        self._host = host
        self._num_layers = cache.num_layers
        self._device = cache.device
        self._stream = torch.cuda.Stream(cache.device)  # type: ignore[no-untyped-call]
        self._streams: Sequence[StreamedBlock] = ()
        self._loaded: list[torch.cuda.Event] = []

    def begin(self, streams: Sequence[StreamedBlock]) -> None:
        self._streams = streams
        self._loaded.clear()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))  # both banks have been read
        for _ in range(NUM_BANKS):
            self._load_next()

    def ready(self, layer: int) -> None:
        compute = torch.cuda.current_stream(self._device)
        if layer:
            self._stream.wait_stream(compute)
            self._load_next()
        compute.wait_event(self._loaded[layer])

    def close(self) -> None:
        self._stream.synchronize()

    def _load_next(self) -> None:
        layer = len(self._loaded)
        if layer < self._num_layers:
            with torch.cuda.stream(self._stream):
                self._host.stream(self._streams, layer)
                self._loaded.append(self._stream.record_event())
