"""`full-recompute`: prompts before decodes, whole, and the latest dropped whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.engine_driver import LIMITS, EngineDriver, request

from ellm.worker.api.config import SchedulerConfig
from ellm.worker.engine.plan import BatchPlan


def driver_of(num_blocks: int = 64, *, prefix_caching: bool = False, **scheduler: object) -> EngineDriver:
    config = replace(SchedulerConfig(policy="full-recompute", pipeline_depth=1), **scheduler)  # type: ignore[arg-type]
    return EngineDriver(
        replace(LIMITS, num_blocks=num_blocks), scheduler=config, prefix_caching=prefix_caching
    )


def endless(name: str, num_prompt: int = 4, **fields: object) -> object:
    return request(name, num_prompt, **{"max_tokens": 40, "ignore_eos": True, **fields})


def rows(plan: BatchPlan) -> list[int]:
    return [entry.num_tokens for entry in plan.entries]


def test_prompts_go_alone_and_decodes_wait() -> None:
    driver = driver_of()
    driver.add(endless("a", 12))
    driver.turn()
    driver.turn()
    driver.add(endless("b", 8, seed=1))
    for _ in range(3):
        driver.turn()
    assert [rows(plan) for plan in driver.plans] == [[12], [1], [8], [1, 1], [1, 1]]


def test_a_prompt_that_does_not_fit_whole_waits_for_the_next_step() -> None:
    driver = driver_of(max_step_tokens=20)
    for i, num_prompt in enumerate((8, 8, 8, 12, 20)):
        driver.add(endless(f"r{i}", num_prompt, seed=i))
    for _ in range(5):
        driver.turn()
    assert [rows(plan) for plan in driver.plans] == [[8, 8], [8, 12], [20], [1] * 5, [1] * 5]


def test_only_a_prompt_longer_than_a_step_is_cut() -> None:
    driver = driver_of(max_step_tokens=16)
    driver.add(endless("short", 4))
    driver.add(endless("long", 40, seed=1))
    driver.add(endless("next", 8, seed=2))
    for _ in range(6):
        driver.turn()
    assert [rows(plan) for plan in driver.plans] == [[4], [16], [16], [8, 8], [1] * 3, [1] * 3]


def test_what_the_cache_has_takes_no_room_in_a_step() -> None:
    driver = driver_of(max_step_tokens=20, prefix_caching=True)
    driver.add(endless("first", 16, max_tokens=1))
    driver.run()
    driver.add(endless("other", 16, seed=1))
    driver.add(endless("same", 16))
    driver.turn()
    assert rows(driver.plans[-1]) == [16, 4]


def test_the_latest_is_dropped_whole_and_computed_again_as_one_prompt() -> None:
    driver = driver_of(num_blocks=16, watermark=0.0)
    driver.add(endless("old", 28, max_tokens=12))
    driver.add(endless("young", 28, seed=1, max_tokens=12))
    driver.run()
    report = driver.core.report(driver.now)
    assert report.num_preemptions == 1
    again = [plan for plan in driver.plans if plan.new][-1]
    assert [(e.start, e.num_tokens) for e in again.entries] == [(0, 28 + len(again.new[0].output_ids))]
    assert report.recomputed_tokens == 28 + len(again.new[0].output_ids) - 1  # its newest token is not old
    assert {name: len(stream) for name, stream in driver.streams.items()} == {"old": 12, "young": 12}


def test_the_watermark_and_the_places_hold_newcomers_back() -> None:
    driver = driver_of(num_blocks=20, watermark=0.2)
    for i, num_prompt in enumerate((40, 4, 24)):  # 10, 1, 6 blocks: 4 are to stay free
        driver.add(endless(f"r{i}", num_prompt, seed=i))
    driver.turn()
    driver.turn()
    assert [rows(plan) for plan in driver.plans] == [[40, 4], [1, 1]]
    driver = driver_of(max_num_seqs=2)
    for i in range(4):
        driver.add(endless(f"r{i}", seed=i))
    driver.turn()
    driver.turn()
    assert [rows(plan) for plan in driver.plans] == [[4, 4], [1, 1]]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("prefix_caching", [False, True])
def test_it_comes_to_an_end_under_pressure(depth: int, prefix_caching: bool) -> None:
    """Few blocks, short steps, scored prompts and prompts without an answer: there is always a way on, and no
    request that has put out a token has a row beside a prompt."""
    driver = driver_of(
        14, prefix_caching=prefix_caching, pipeline_depth=depth, max_step_tokens=7, watermark=0.1
    )
    kinds = (
        {"max_tokens": 30},
        {"max_tokens": 0, "prompt_logprobs": 1},
        {"max_tokens": 1},
        {"prompt_logprobs": 0, "max_tokens": 20},
    )
    for i in range(24):
        driver.add(endless(f"r{i}", 1 + 5 * i % 23, seed=i // 2, **kinds[i % 4]))
        if i % 3 == 0:
            driver.turn()
    driver.run(4000)
    assert len(driver.reasons) == 24
    assert driver.core.report(driver.now).num_preemptions > 0
    answering: set[int] = set()
    for plan in driver.plans:
        newcomers = {new.seq_id for new in plan.new}
        if any(entry.num_tokens > 1 or entry.seq_id in newcomers for entry in plan.entries):
            assert not [entry for entry in plan.entries if entry.seq_id in answering]
        answering.update(entry.seq_id for entry in plan.entries if entry.samples)
