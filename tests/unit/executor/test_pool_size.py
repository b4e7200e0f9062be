"""The pool's arithmetic: what is taken, what is refused, and in which words."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ellm.worker.api.config import CacheConfig
from ellm.worker.api.errors import ConfigError
from ellm.worker.executor.pool_size import CPU_DEFAULT_POOL_BYTES, MemoryBudget, check_transient, size_pool

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


def test_transient_blocks_and_copy_buffers_come_out_of_the_pool() -> None:
    cache = CacheConfig(memory_fraction=0.9)
    less = replace(GPU, transient=64 * MIB, host_buffers=4 * MIB)
    size = size_pool(cache, less, 8192, may_shorten=False)
    assert size.num_blocks == size_pool(cache, GPU, 8192, may_shorten=False).num_blocks - 34
    assert dict(size.memory)["transient KV blocks"] == 64 * MIB
    with pytest.raises(ConfigError, match="16166 MiB are left"):
        size_pool(CacheConfig(num_blocks=1_000_000), replace(CPU, transient=68 * MIB), 160, may_shorten=True)


def test_the_host_tier_takes_whole_blocks_of_the_hosts_memory() -> None:
    cache = CacheConfig(host_bytes=33 * GIB + 1)
    size = size_pool(cache, replace(GPU, host_available=34 * GIB), 8192, may_shorten=False)
    assert size.num_host_blocks == 33 * GIB // (2 * MIB)
    assert dict(size.memory)["host KV pool"] == 33 * GIB
    assert size_pool(CacheConfig(), GPU, 8192, may_shorten=False).num_host_blocks == 0


def test_a_host_tier_on_a_cpu_is_more_of_the_pool_unless_copied() -> None:
    cpu = replace(CPU, host_available=16 * GIB)
    cache = CacheConfig(num_blocks=10, host_bytes=7 * CPU.block + 1)
    size = size_pool(cache, cpu, 17 * 16, may_shorten=False)  # a context that the sum holds
    assert (size.num_blocks, size.num_host_blocks, size.max_model_len) == (17, 0, 272)
    assert dict(size.memory)["KV pool"] == 17 * CPU.block
    assert "host KV pool" not in dict(size.memory)
    copied = size_pool(replace(cache, host_tier="copied"), cpu, 160, may_shorten=False)
    assert (copied.num_blocks, copied.num_host_blocks) == (10, 7)
    assert dict(copied.memory)["host KV pool"] == 7 * CPU.block
    gpu = replace(GPU, host_available=16 * GIB)
    assert size_pool(replace(cache, host_bytes=GIB), gpu, 160, may_shorten=False).num_host_blocks == 512


@pytest.mark.parametrize(
    ("host_bytes", "budget", "message"),
    [
        (33 * GIB, replace(GPU, host_available=32 * GIB), "33792 MiB and 32768 MiB are left on the host"),
        # On a CPU weights, activations and the pool of 1 GiB are taken from the same memory.
        (15 * GIB, replace(CPU, host_available=16 * GIB), "15360 MiB and 15210 MiB are left on the host"),
        (1 * MIB, replace(GPU, host_available=32 * GIB), "1048576 holds no KV block, which takes 2097152"),
    ],
)
def test_a_host_tier_that_does_not_fit_is_refused(
    host_bytes: int, budget: MemoryBudget, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        size_pool(CacheConfig(host_bytes=host_bytes), budget, 1024, may_shorten=True)
    assert caught.value.param == "cache.host_bytes"


def test_transient_blocks_that_do_not_fit_are_refused() -> None:
    cache = CacheConfig(transient_blocks=7)
    check_transient(cache, replace(GPU, transient=62 * GIB))
    with pytest.raises(ConfigError, match="transient_blocks = 7 takes 63489 MiB and 63488 MiB") as caught:
        check_transient(cache, replace(GPU, transient=62 * GIB + MIB))
    assert caught.value.param == "cache.transient_blocks"
