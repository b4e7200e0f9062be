"""Transient blocks: where each layer finds them, and that streamed ones are there when a layer reads them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from support.checkpoints import write_checkpoint
from torch import Tensor

from ellm.kernels.ops import AttentionMeta
from ellm.worker.engine.plan import StreamedBlock
from ellm.worker.model.architecture import Architecture
from ellm.worker.model.host_pool import MemoryHostPool
from ellm.worker.model.inspect import read_architecture
from ellm.worker.model.kv_cache import KVCache, block_bytes, transient_bytes
from ellm.worker.model.transient import ThreadLoads, layer_steps

N, T, BLOCK, LAYERS = 5, 3, 4, 5
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def arch(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    folder: Path = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, "llama", num_hidden_layers=LAYERS)
    return read_architecture(folder)


@pytest.fixture
def cache(arch: Architecture) -> KVCache:
    return KVCache(arch, N, BLOCK, torch.bfloat16, CPU, T)


def meta_of(tables: list[list[int]], slots: list[int]) -> AttentionMeta:
    rows = torch.arange(len(slots))
    return AttentionMeta(
        cu_seqlens_q=torch.tensor([0, len(slots)], dtype=torch.int32),
        kv_lens=torch.tensor([len(slots)], dtype=torch.int32),
        block_tables=torch.tensor(tables, dtype=torch.int32),
        positions=rows,
        slot_mapping=torch.tensor(slots),
        num_decode=0,
        max_kv_len=len(slots),
        row_entry=torch.zeros_like(rows, dtype=torch.int32),
    )


def test_own_blocks_and_banks_are_apart_and_fill_the_pool(cache: KVCache, arch: Architecture) -> None:
    parts = [cache.resident, cache.bank(0), cache.bank(1)]
    for i, part in enumerate(parts):
        part.fill_(i + 1)
    assert [int((cache.pool == i + 1).sum()) for i in range(3)] == [part.numel() for part in parts]
    one = block_bytes(arch, BLOCK, torch.bfloat16)
    assert cache.num_bytes == N * one + T * transient_bytes(arch, BLOCK, torch.bfloat16)
    for layer in range(LAYERS):
        assert torch.equal(cache.bank(layer), parts[1 + layer % 2])


def test_each_layer_is_handed_its_own_blocks_and_its_bank(cache: KVCache) -> None:
    cache.pool.copy_(torch.arange(cache.pool.shape[1])[None, :, None, None, None].expand_as(cache.pool))
    ids = [4, N + 2, 0, N, N + 1]
    slots = [i * BLOCK + offset for i in ids for offset in (0, 3)]
    meta = meta_of([ids], slots)
    steps = list(layer_steps(cache, meta, None))
    assert len(steps) == LAYERS
    for layer, (moved, (keys, values)) in enumerate(steps):
        for half, pool in enumerate((keys, values)):
            got = pool[moved.block_tables[0].long(), 0, 0, 0]
            want = [
                cache.resident[half, layer, i, 0, 0, 0] if i < N else cache.bank(layer)[half, i - N, 0, 0, 0]
                for i in ids
            ]
            assert torch.equal(got, torch.stack(want))
        assert torch.equal(moved.slot_mapping // BLOCK, moved.block_tables[0].long().repeat_interleave(2))
        assert (moved.slot_mapping % BLOCK).tolist() == [0, 3] * len(ids)
        assert moved.block_tables.dtype == torch.int32
        assert moved.slot_mapping.dtype == torch.int64
        assert moved.positions is meta.positions


class SlowPool(MemoryHostPool):
    """Counts the layers that it has streamed; each takes a while."""

    delay_s = 0.02

    def __init__(self, cache: KVCache, num_blocks: int) -> None:
        super().__init__(cache, num_blocks)
        self.streamed = threading.Semaphore(0)

    def stream(self, streams: Sequence[StreamedBlock], layer: int) -> None:
        time.sleep(self.delay_s)
        super().stream(streams, layer)
        self.streamed.release()


@pytest.fixture
def pool(cache: KVCache) -> Iterator[SlowPool]:
    """Host blocks 0 and 1 hold numbers that tell block, layer, half."""
    pool = SlowPool(cache, 3)
    generator = torch.Generator().manual_seed(1)
    for block in (0, 1):
        content = torch.randn(cache.resident[:, :, 0].shape, generator=generator)
        cache.resident[:, :, block].copy_(content)
        pool.save(block, block + 1)
    yield pool
    pool.close()


def streamed(cache: KVCache, layer: int) -> tuple[Tensor, Tensor]:
    """What host blocks 2 and 1 hold of a layer, which the test streams to transient blocks 0 and 2."""
    return cache.resident[:, layer, 1], cache.resident[:, layer, 0]


def test_a_layers_blocks_are_there_before_it_and_stay_while_it_computes(
    cache: KVCache, pool: SlowPool
) -> None:
    """Blocks go to places of their own, the next layer's arrive meanwhile, and no later layer's."""
    loads = ThreadLoads(pool, LAYERS)
    streams = [StreamedBlock(2, N), StreamedBlock(1, N + 2)]
    for _ in range(2):  # a second step finds the banks used
        loads.begin(streams)
        cache.bank(0)[:, 1] = cache.bank(1)[:, 1] = 7.0  # another sequence's rows
        meta = meta_of([[N, N + 2]], [0])
        for layer, _step in enumerate(layer_steps(cache, meta, loads)):
            num_loaded = min(layer + 2, LAYERS) - layer
            for ahead in range(2):
                if ahead:  # all that may run ahead has run
                    for _ in range(num_loaded if layer == 0 else num_loaded - 1):
                        assert pool.streamed.acquire(timeout=60)
                for place, want in zip((0, 2), streamed(cache, layer), strict=True):
                    assert torch.equal(cache.bank(layer)[:, place], want)
                if ahead and layer + 1 < LAYERS:
                    for place, want in zip((0, 2), streamed(cache, layer + 1), strict=True):
                        assert torch.equal(cache.bank(layer + 1)[:, place], want)
            assert not pool.streamed.acquire(timeout=2 * pool.delay_s), "a bank in use was overwritten"
        assert torch.all(cache.bank(0)[:, 1] == 7.0)
        assert torch.all(cache.bank(1)[:, 1] == 7.0)
    loads.close()


def test_a_step_without_streams_loads_nothing(cache: KVCache, pool: SlowPool) -> None:
    loads = ThreadLoads(pool, LAYERS)
    loads.begin([StreamedBlock(1, N)])
    assert len(list(layer_steps(cache, meta_of([[N]], [0]), loads))) == LAYERS
    loads.close()
    assert sum(pool.streamed.acquire(blocking=False) for _ in range(2 * LAYERS)) == LAYERS
    before = cache.pool.clone()
    assert len(list(layer_steps(cache, meta_of([[N]], [0]), None))) == LAYERS
    assert torch.equal(cache.pool, before)


@pytest.mark.parametrize("wrong", [StreamedBlock(3, N), StreamedBlock(0, N + T)])
def test_a_stream_outside_its_pool_ends_the_step(
    cache: KVCache, pool: SlowPool, wrong: StreamedBlock
) -> None:
    loads = ThreadLoads(pool, LAYERS)
    loads.begin([wrong])
    with pytest.raises(IndexError):
        next(layer_steps(cache, meta_of([[N]], [0]), loads))
    loads.close()


def test_whole_blocks_move_bit_for_bit(cache: KVCache) -> None:
    """NaN and negative zero too."""
    pool = MemoryHostPool(cache, 2)
    generator = torch.Generator().manual_seed(3)
    bits = cache.pool.view(torch.int16)
    bits.copy_(torch.randint(-(1 << 15), 1 << 15, bits.shape, generator=generator))
    before = bits.clone()
    pool.save(3, 1)
    cache.resident[:, :, 3] = 0.0
    pool.load(1, 0)
    want = cache.resident.view(torch.int16)
    old = before[:, : LAYERS * N].view_as(want)
    assert torch.equal(want[:, :, 0], old[:, :, 3])
    assert torch.equal(want[:, :, 1:3], old[:, :, 1:3])
    assert not want[:, :, 3].any()
    with pytest.raises(IndexError):
        pool.save(0, 2)
    with pytest.raises(IndexError):
        pool.load(0, N)
