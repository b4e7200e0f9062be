"""An executor with a host tier and transient blocks: its limits, and what its results say of copies."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.checkpoints import write_checkpoint
from support.holes import HoleDriver

from ellm.worker.api.config import CacheConfig, ModelConfig, SchedulerConfig, WorkerConfig
from ellm.worker.api.errors import ConfigError
from ellm.worker.engine.plan import BatchPlan, BlockCopy
from ellm.worker.executor.local import LocalExecutor

BLOCK_BYTES = 2 * 2 * 2 * 8 * 16 * 4  # layers, k and v, heads, dim, tokens, bytes
NUM_HOST = 6


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> WorkerConfig:
    folder: Path = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, "llama")
    return WorkerConfig(
        model=ModelConfig(path=str(folder), device="cpu", jit=False, deterministic=False),
        cache=CacheConfig(
            num_blocks=40,
            host_bytes=(NUM_HOST + 1) * BLOCK_BYTES - 1,
            host_tier="copied",
            transient_blocks=5,
        ),
        scheduler=SchedulerConfig(max_num_seqs=4, max_step_tokens=64),
        num_threads=1,
    )


@pytest.fixture
def executor(config: WorkerConfig) -> Iterator[LocalExecutor]:
    made = LocalExecutor.load(config)
    yield made
    made.close()


def test_the_limits_tell_the_brain_what_there_is(executor: LocalExecutor) -> None:
    limits = executor.limits
    assert (limits.num_blocks, limits.num_transient_blocks, limits.num_host_blocks) == (40, 5, NUM_HOST)
    assert limits.block_bytes == BLOCK_BYTES
    memory = dict(limits.memory)
    assert memory["host KV pool"] == NUM_HOST * BLOCK_BYTES
    # Two banks, each of one layer out of two.
    assert memory["transient KV blocks"] == 5 * BLOCK_BYTES
    assert memory["KV pool"] + memory["transient KV blocks"] == executor.runner.cache.num_bytes


def test_without_a_host_tier_there_is_nothing_of_it(config: WorkerConfig) -> None:
    executor = LocalExecutor.load(replace(config, cache=CacheConfig(num_blocks=40)))
    limits = executor.limits
    assert (limits.num_host_blocks, limits.num_transient_blocks, limits.block_bytes) == (0, 0, 0)
    assert not {"host KV pool", "transient KV blocks"} & set(dict(limits.memory))
    executor.close()


def test_a_host_tier_of_the_cpu_is_more_of_the_pool(config: WorkerConfig) -> None:
    executor = LocalExecutor.load(replace(config, cache=replace(config.cache, host_tier="auto")))
    limits = executor.limits
    assert (limits.num_blocks, limits.num_host_blocks, limits.block_bytes) == (40 + NUM_HOST, 0, 0)
    assert executor.runner.cache.num_blocks == 40 + NUM_HOST
    memory = dict(limits.memory)
    assert memory["KV pool"] == (40 + NUM_HOST) * BLOCK_BYTES
    assert "host KV pool" not in memory
    executor.close()


@pytest.mark.parametrize(
    ("host_bytes", "message"), [(1 << 50, "MiB are left on the host"), (9, "no KV block")]
)
def test_a_host_tier_that_cannot_be_had(config: WorkerConfig, host_bytes: int, message: str) -> None:
    cache = replace(config.cache, host_bytes=host_bytes)
    with pytest.raises(ConfigError, match=message) as caught:
        LocalExecutor.load(replace(config, cache=cache))
    assert caught.value.param == "cache.host_bytes"


def empty(step: int, *, saves: tuple[BlockCopy, ...] = (), waits: bool = False) -> BatchPlan:
    return BatchPlan(step, (), (), (), 0, 0, saves=saves, waits=waits)


def test_a_plan_without_entries_waits_for_a_copy_and_returns_at_once_without_one(
    executor: LocalExecutor,
) -> None:
    result = executor.execute(empty(0, saves=(BlockCopy(0, 3, 0),)))
    assert (result.copies_done, result.copies_failed) == ((0,), ())
    assert result.copy_times is not None
    assert result.copy_times.saved_bytes == BLOCK_BYTES
    assert 0 < result.copy_times.saved_s < result.elapsed_s
    result = executor.execute(empty(1))
    assert (result.copies_done, result.copy_times) == ((), None)


def test_a_plan_that_waits_has_all_its_copies_behind_it(executor: LocalExecutor) -> None:
    saves = tuple(BlockCopy(i, i, i) for i in range(NUM_HOST))
    assert executor.execute(empty(0, saves=saves, waits=True)).copies_done == tuple(range(NUM_HOST))
    driver = HoleDriver(executor)
    driver.add(1, list(range(30)))
    loads = [BlockCopy(NUM_HOST, 20, 0), BlockCopy(NUM_HOST + 1, 21, 1)]
    result = driver.step({1: 30}, loads=loads, waits=True)
    assert set(result.copies_done) == {NUM_HOST, NUM_HOST + 1}
    assert len(result.token_ids) == 1


def test_a_copy_that_fails_ends_nothing(executor: LocalExecutor) -> None:
    """The worker lives on, the other copies arrive, and the next step computes what it should."""
    driver = HoleDriver(executor)
    track = driver.add(1, list(range(40)))
    driver.step({1: 40})
    cache = executor.runner.cache
    kept = cache.resident[:, :, track.block_ids[0]].clone()
    good, wrong = driver.copy(track.block_ids[0], 0), driver.copy(track.block_ids[1], NUM_HOST)
    result = driver.step({1: 1}, saves=[wrong, good])
    driver.settle(result, [good, wrong])
    assert driver.failed == {wrong.copy_id}
    assert driver.moved == [BLOCK_BYTES, 0]
    spare = driver._free[-1]
    back = driver.copy(spare, 0)
    driver.settle(driver.step({1: 1}, loads=[back]), [back])
    assert torch.equal(cache.resident[:, :, spare], kept)
    driver.generate(1, 5)
    alone = HoleDriver(executor)
    alone.add(2, list(range(40)))
    assert alone.generate(2, 5) == track.outputs


def test_closing_frees_the_host_tier(config: WorkerConfig) -> None:
    executor = LocalExecutor.load(config)
    executor.execute(empty(0, saves=(BlockCopy(0, 0, 0),)))
    tier = executor._tier
    assert tier is not None
    pools = weakref.ref(tier.pool), weakref.ref(executor.runner.cache)
    del tier
    executor.close()
    gc.collect()
    assert [pool() for pool in pools] == [None, None]
