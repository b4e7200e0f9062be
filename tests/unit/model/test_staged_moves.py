"""Whole blocks through a buffer: bits, neighbours, batches larger than the buffer, ids that do not exist."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ellm.kernels.reference import TorchOps
from ellm.worker.model.staged_moves import StagedMoves, runs

LAYERS, BLOCKS, HOST_BLOCKS = 3, 7, 9


class CountingOps(TorchOps):
    """Counts launches."""

    def __init__(self) -> None:
        self.num_copies = 0

    def kv_copy(self, source: Tensor, target: Tensor, pairs: Tensor) -> None:
        self.num_copies += 1
        super().kv_copy(source, target, pairs)


@pytest.fixture
def arrays() -> tuple[Tensor, Tensor]:
    """A pool [L, 2, N, K, B, D] as it lies in memory, and host memory; random bits, NaN among them."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        bits = torch.randint(-(1 << 15), 1 << 15, shape, generator=generator, dtype=torch.int16)
        return bits.view(torch.bfloat16)

    pool = drawn(2, LAYERS, BLOCKS, 2, 4, 6).transpose(0, 1)
    return pool, drawn(HOST_BLOCKS, LAYERS, 2, 2, 4, 6)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.int16), b.contiguous().view(torch.int16))


@pytest.mark.parametrize("num_staged", [1, 2, 8])
def test_blocks_go_there_and_back_and_no_other_is_touched(
    arrays: tuple[Tensor, Tensor], num_staged: int
) -> None:
    pool, host = arrays
    old_pool, old_host = pool.clone(), host.clone()
    ops = CountingOps()
    moves = StagedMoves(ops, pool, host, num_staged)
    there = [(6, 0), (0, 8), (3, 1), (1, 5), (2, 4)]
    moves.save(there)
    assert ops.num_copies == -(-len(there) // num_staged)
    for block, host_block in there:
        assert same(host[host_block], old_pool[:, :, block])
    untouched = [i for i in range(HOST_BLOCKS) if i not in {h for _, h in there}]
    assert same(host[untouched], old_host[untouched])
    assert same(pool, old_pool)
    back = [(5, 8), (6, 4), (0, 0), (1, 7)]
    moves.load(back)
    for block, host_block in back:
        assert same(pool[:, :, block], host[host_block])
    untouched = [i for i in range(BLOCKS) if i not in {b for b, _ in back}]
    assert same(pool[:, :, untouched], old_pool[:, :, untouched])


def test_wrong_ids_are_refused_before_anything_moves(arrays: tuple[Tensor, Tensor]) -> None:
    pool, host = arrays
    old = pool.clone(), host.clone()
    moves = StagedMoves(TorchOps(), pool, host, 2)
    for wrong in ((-1, 0), (0, -1), (BLOCKS, 0), (0, HOST_BLOCKS)):
        for call in (moves.save, moves.load):
            with pytest.raises(IndexError):
                call([(1, 1), (2, 2), wrong])
    moves.save([])
    assert same(pool, old[0])
    assert same(host, old[1])


def test_runs() -> None:
    assert list(runs([])) == []
    assert list(runs([4])) == [(0, 4, 1)]
    assert list(runs([0, 1, 2, 5, 7, 8])) == [(0, 0, 3), (3, 5, 1), (4, 7, 2)]
