"""The pool's arithmetic: what is taken, what is refused, and in which words."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ellm.worker.api.config import CacheConfig
from ellm.worker.api.errors import ConfigError
from ellm.worker.executor.pool_size import CPU_DEFAULT_POOL_BYTES, MemoryBudget, size_pool

MIB = 1 << 20
GIB = 1 << 30
CPU = MemoryBudget(available=16 * GIB, weights=100 * MIB, activations=50 * MIB, block=128 * 1024, on_cpu=True)
GPU = replace(CPU, available=80 * GIB, weights=16 * GIB, activations=2 * GIB, block=2 * MIB, on_cpu=False)


def test_a_gpu_gives_its_fraction_less_weights_and_activations() -> None:
    size = size_pool(CacheConfig(memory_fraction=0.9), GPU, 8192, may_shorten=False)
    assert size.num_blocks == (int(80 * GIB * 0.9) - 18 * GIB) // (2 * MIB)
    assert size.max_model_len == 8192
    assert dict(size.memory)["KV pool"] == size.num_blocks * 2 * MIB


def test_a_cpu_gives_half_at_most_and_a_gibibyte_unless_told() -> None:
    assert size_pool(CacheConfig(), CPU, 1024, may_shorten=True).num_blocks == (
        CPU_DEFAULT_POOL_BYTES // CPU.block
    )
    more = size_pool(CacheConfig(max_pool_bytes=4 * GIB), CPU, 1024, may_shorten=True)
    assert more.num_blocks == 4 * GIB // CPU.block
    tight = replace(CPU, available=1 * GIB)
    small = size_pool(CacheConfig(memory_fraction=0.5), tight, 1024, may_shorten=True)
    assert small.num_blocks == (256 * MIB - 150 * MIB) // CPU.block


def test_the_bytes_add_up_for_the_reader() -> None:
    size = size_pool(CacheConfig(), CPU, 1024, may_shorten=True)
    assert dict(size.memory) == {
        "available at start": 16 * GIB,
        "weights": 100 * MIB,
        "activations of the largest step": 50 * MIB,
        "KV pool": size.num_blocks * CPU.block,
        "KV block": CPU.block,
    }


def test_an_explicit_number_of_blocks_is_kept() -> None:
    size = size_pool(CacheConfig(num_blocks=10), CPU, 160, may_shorten=False)
    assert (size.num_blocks, size.max_model_len) == (10, 160)


def test_more_blocks_than_memory_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"num_blocks = 1000000 takes 125000 MiB and 16234 MiB are left"):
        size_pool(CacheConfig(num_blocks=1_000_000), CPU, 160, may_shorten=True)
    with pytest.raises(ConfigError, match="num_blocks = 0"):
        size_pool(CacheConfig(num_blocks=0), CPU, 160, may_shorten=True)


def test_a_small_pool_shortens_the_context_only_if_none_was_asked_for() -> None:
    cache = CacheConfig(num_blocks=10)
    assert size_pool(cache, CPU, 4096, may_shorten=True).max_model_len == 160
    with pytest.raises(ConfigError, match=r"holds 160 tokens \(1 MiB\), not one sequence of 4096") as caught:
        size_pool(cache, CPU, 4096, may_shorten=False)
    assert caught.value.param == "model.max_model_len"


def test_no_room_at_all_is_refused_even_if_the_context_may_shrink() -> None:
    with pytest.raises(ConfigError, match="holds 0 tokens"):
        size_pool(CacheConfig(), replace(CPU, weights=9 * GIB), 4096, may_shorten=True)
