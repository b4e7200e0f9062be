"""Whole blocks between a KV pool and host memory, several at a time through a buffer on the device.

A block's layers lie apart in the pool and together on the host: one launch gathers or scatters them, and each
run of neighbouring host blocks is one transfer. Everything is queued on the current stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ellm.kernels.ops import Ops
from ellm.worker.model.staging import to_device

Move = tuple[int, int]  # block of the pool, block of the host


class StagedMoves:
    """One direction's buffer. Moves of one instance follow each other on one stream."""

    def __init__(self, ops: Ops, resident: Tensor, host: Tensor, num_staged: int) -> None:
        """resident [L, 2, N, K, B, D], a view of the pool; host [H, L, 2, K, B, D]; num_staged: blocks of the
        buffer."""
        assert num_staged > 0
        self._ops = ops
        self._resident = resident
        self._host = host
        self._stage = resident.new_empty((num_staged, *host.shape[1:]))
        self._staged = self._stage.permute(1, 2, 0, 3, 4, 5)  # as the pool is seen

    def save(self, moves: Sequence[Move]) -> None:
        """Copy blocks of the pool to the host. Raises IndexError for an id that does not exist, before any
        moves."""
        for part in self._parts(moves):
            pairs = pairs_tensor([(b, i) for i, (b, _) in enumerate(part)], self._resident.device)
            self._ops.kv_copy(self._resident, self._staged, pairs)
            for place, host_block, count in runs([host_block for _, host_block in part]):
                target = self._host[host_block : host_block + count]
                target.copy_(self._stage[place : place + count], non_blocking=True)

    def load(self, moves: Sequence[Move]) -> None:
        """Copy blocks of the host to the pool. Raises IndexError as `save`."""
        for part in self._parts(moves):
            for place, host_block, count in runs([host_block for _, host_block in part]):
                source = self._host[host_block : host_block + count]
                self._stage[place : place + count].copy_(source, non_blocking=True)
            pairs = pairs_tensor([(i, b) for i, (b, _) in enumerate(part)], self._resident.device)
            self._ops.kv_copy(self._staged, self._resident, pairs)

    def _parts(self, moves: Sequence[Move]) -> Iterator[list[Move]]:
        """As many as the buffer holds, in order of their host blocks."""
        for block, host_block in moves:
            if not (0 <= block < self._resident.shape[2] and 0 <= host_block < len(self._host)):
                raise IndexError(f"block {block}, host block {host_block}")
        ordered = sorted(moves, key=lambda move: move[1])
        for first in range(0, len(ordered), len(self._stage)):
            yield ordered[first : first + len(self._stage)]


def runs(rising: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(index of the first, the first, count) of each run of consecutive numbers."""
    first = 0
    for i in range(1, len(rising) + 1):
        if i == len(rising) or rising[i] != rising[i - 1] + 1:
            yield first, rising[first], i - first
            first = i


def pairs_tensor(pairs: Sequence[Move], device: torch.device) -> Tensor:
    """[n, 2] int64 on the device."""
    return to_device(np.array(pairs, dtype=np.int64).reshape(-1, 2), device)
