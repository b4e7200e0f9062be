"""The blocking swap of vLLM's first engine: what is copied, when somebody comes back, who may not start."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.engine_driver import LIMITS, EngineDriver, request

from ellm.worker.api.config import SchedulerConfig
from ellm.worker.engine.sequence import Sequence

SIZE = LIMITS.block_size


def drive(depth: int = 1, num_host_blocks: int = 200, watermark: float = 0.05) -> EngineDriver:
    """Fourteen requests at once; a third of them fit, and at their ends half of those."""
    limits = replace(LIMITS, num_blocks=30, num_host_blocks=num_host_blocks, block_bytes=1000)
    config = SchedulerConfig(
        policy="full-swap", max_step_tokens=64, pipeline_depth=depth, watermark=watermark
    )
    driver = EngineDriver(limits, scheduler=config, prefix_caching=False)
    for i in range(14):
        driver.add(request(str(i), 9 + i, seed=i, max_tokens=40, ignore_eos=True))
    return driver


@pytest.mark.parametrize("depth", [1, 2])
def test_a_victim_moves_whole_every_time(depth: int) -> None:
    """Its copies on the host are gone when it is back, and the device has not kept what it gave up."""
    driver = drive(depth)
    driver.run()
    report = driver.core.report(driver.now)
    assert report.num_preemptions > len(driver.streams), "nobody moved twice"
    assert report.saved_tokens == report.loaded_tokens > 0
    assert report.recomputed_tokens < SIZE * report.num_preemptions  # the last block of each, if not full
    host = driver.core._state.host
    assert host is not None
    assert host.num_free == host.num_blocks


def test_who_is_back_takes_no_copy_from_those_who_are_out() -> None:
    """Requests in 4 families, each with four blocks in common. What one that comes back lets go of on the
    host is still there for others of its family; they computed it again, five tokens per victim."""
    limits = replace(LIMITS, num_blocks=30, num_host_blocks=400, block_bytes=1000)
    config = SchedulerConfig(policy="full-swap", max_step_tokens=64, pipeline_depth=1, watermark=0.05)
    driver = EngineDriver(limits, scheduler=config, prefix_caching=True)
    lengths = [(1, 48), (2, 47), (4, 40), (6, 48), (5, 52), (3, 53), (5, 21), (5, 41), (6, 32), (2, 35)]
    for i, (prompt, output) in enumerate(lengths):
        common = request("", 4 * SIZE, seed=i % 4).prompt_ids
        own = request(str(i), prompt, seed=50 + i, max_tokens=output, ignore_eos=True)
        driver.add(replace(own, prompt_ids=common + own.prompt_ids))
    driver.run()
    report = driver.core.report(driver.now)
    assert report.num_restores > len(lengths), "nobody moved twice"
    assert report.recomputed_tokens < SIZE * report.num_preemptions / 2  # of the last block, if not full


@pytest.mark.parametrize("depth", [1, 2])
def test_copies_hold_up_the_step_and_go_one_way(depth: int) -> None:
    driver = drive(depth)
    driver.run()
    moving = [plan for plan in driver.plans if plan.saves or plan.loads]
    assert all(plan.waits for plan in moving)
    assert not any(plan.saves and plan.loads for plan in moving)


@pytest.mark.parametrize("watermark", [0.0, 0.05, 0.2])
def test_who_comes_back_leaves_the_watermark_free(watermark: float) -> None:
    """A block more than it had, and the watermark; and nobody who has not started yet overtakes it."""
    driver = drive(watermark=watermark)
    state = driver.core._state
    num_resumed = 0
    out: list[Sequence] = []
    while driver.core.has_work:
        waiting = len(state.waiting)
        while driver.begin() is not None:
            back = [seq for seq in out if seq.seq_id >= 0]
            if back and len(state.running) > len(back):
                num_resumed += len(back)
                assert state.pool.num_available >= state.watermark_blocks
            assert not out or len(state.waiting) >= waiting
            out = [seq for seq in state.parked if seq.seq_id < 0]
        driver.finish()
        out = [seq for seq in state.parked if seq.seq_id < 0]
    assert num_resumed > 3


def test_a_full_host_makes_it_full_recompute() -> None:
    driver = drive(num_host_blocks=3)
    driver.run()
    report = driver.core.report(driver.now)
    assert report.recomputed_tokens > 10 * SIZE
    assert all(reason == "length" for reason in driver.reasons.values())
