"""Which rows a plan holds: order, budget, admission, preemption, prefix hits, and two plans at once."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.engine_driver import LIMITS, EngineDriver, plain, request

from ellm.worker.engine.plan import BatchPlan


def driver_of(num_blocks: int = 64, *, prefix_caching: bool = True, **scheduler: object) -> EngineDriver:
    """One plan at a time unless said otherwise."""
    config = replace(plain(pipeline_depth=1), **scheduler)  # type: ignore[arg-type]
    return EngineDriver(
        replace(LIMITS, num_blocks=num_blocks), scheduler=config, prefix_caching=prefix_caching
    )


def endless(name: str, num_prompt: int = 4, **fields: object) -> object:
    """Decodes until `max_tokens`, 40 unless given."""
    return request(name, num_prompt, **{"max_tokens": 40, "ignore_eos": True, **fields})


def rows(plan: BatchPlan) -> list[int]:
    return [entry.num_tokens for entry in plan.entries]


def test_a_long_prompt_stalls_no_decode_row() -> None:
    driver = driver_of(max_step_tokens=16)
    for i in range(4):
        driver.add(endless(f"d{i}", seed=i))
    driver.turn()
    driver.add(endless("long", 90, seed=9, max_tokens=5))
    while len(driver.streams["long"]) == 0:
        before = {name: len(driver.streams[name]) for name in ("d0", "d1", "d2", "d3")}
        driver.turn()
        assert {name: len(driver.streams[name]) - 1 for name in before} == before
        plan = driver.plans[-1]
        assert rows(plan)[:4] == [1] * 4
        assert plan.num_rows == sum(rows(plan)) <= 16
    assert driver.plans[-1].entries[4].num_tokens == 90 - 7 * 12  # seven full chunks came before


def test_prompts_are_cut_to_the_budget_first_come_first_served() -> None:
    driver = driver_of(max_step_tokens=20)
    for i in range(3):
        driver.add(endless(f"r{i}", 15, seed=i))
    plans = [driver.begin() for _ in range(1)]
    driver.finish()
    plans.append(driver.begin())
    assert [rows(plan) for plan in plans if plan] == [[15, 5], [1, 10, 9]]


def test_more_sequences_than_rows_are_not_let_in() -> None:
    driver = driver_of(max_step_tokens=3, max_num_seqs=10)
    for i in range(5):
        driver.add(endless(f"r{i}", 1, seed=i))
    driver.turn()
    assert driver.core.report(0.0).num_running == 3


def test_nobody_passes_the_front_of_the_queue() -> None:
    driver = driver_of(num_blocks=12, watermark=0.0)
    driver.add(endless("first", 24, max_tokens=8))
    driver.turn()
    driver.add(endless("big", 30, seed=1, max_tokens=8))
    driver.add(endless("small", 1, seed=2, max_tokens=8))
    for _ in range(6):
        driver.turn()
        assert driver.core.report(0.0).num_running == 1
    driver.run()
    starts = [new.prompt_ids for plan in driver.plans for new in plan.new]
    assert [len(prompt) for prompt in starts] == [24, 30, 1]


def test_a_better_priority_goes_first() -> None:
    driver = driver_of(max_num_seqs=1)
    for name, priority in (("low", 5), ("mid", 1), ("high", -1)):
        driver.add(endless(name, priority=priority, max_tokens=2))
    driver.run()
    assert list(driver.reasons) == ["high", "mid", "low"]


def test_the_watermark_stays_free_for_those_who_run() -> None:
    driver = driver_of(num_blocks=20, watermark=0.2, prefix_caching=False)
    driver.add(endless("first", 40))  # 10 blocks
    driver.turn()
    driver.add(endless("fits", 4, seed=1))
    driver.add(endless("not", 24, seed=2))  # 6 more would leave 3 of 4
    driver.turn()
    report = driver.core.report(0.0)
    assert (report.num_running, report.num_waiting) == (2, 1)


def test_an_empty_engine_takes_anyone_who_fits() -> None:
    driver = driver_of(num_blocks=20, watermark=0.5)
    driver.add(endless("r", 72, max_tokens=8))
    driver.run()
    assert len(driver.streams["r"]) == 8


def test_the_last_of_the_lowest_priority_gives_way_and_comes_back_first() -> None:
    driver = driver_of(num_blocks=13, watermark=0.0, prefix_caching=False)
    for name, priority in (("a", 0), ("b", 1), ("c", 0), ("d", 1)):
        driver.add(endless(name, 12, seed=ord(name), priority=priority, max_tokens=9))
    driver.turn()
    assert driver.core.report(0.0).num_running == 4
    seq_ids = {len(plan.new): [new.seq_id for new in plan.new] for plan in driver.plans}[4]
    driver.add(endless("e", 1, priority=1))
    gone: list[int] = []
    while len(gone) < 2:
        driver.turn()
        gone += driver.plans[-1].released
    # Admitted a, c, b, d; d goes first, then b.
    assert gone == [seq_ids[3], seq_ids[2]]
    driver.run()
    order = [new.prompt_ids for plan in driver.plans[1:] for new in plan.new]
    prompts = {name: request("", 12, seed=ord(name)).prompt_ids for name in "bd"}
    assert order[:2] == [prompts["b"], prompts["d"]]  # and only then e, who has never run
    assert len(order[2]) == 1


def test_a_preempted_sequence_finds_what_nobody_took() -> None:
    """Of a victim's blocks only those that were needed are computed again."""
    found = {}
    for caching in (False, True):
        driver = driver_of(num_blocks=16, watermark=0.0, prefix_caching=caching)
        driver.add(endless("old", 28, max_tokens=12))
        driver.add(endless("young", 28, seed=1, max_tokens=12))
        driver.run()
        found[caching] = driver.core.report(0.0)
    assert found[False].num_preemptions == found[True].num_preemptions == 1
    assert found[True].recomputed_tokens < found[False].recomputed_tokens
    assert found[False].recomputed_tokens >= 28
    assert found[True].prefix_hits == 0  # none of it was another request's work


def test_a_shared_prefix_is_computed_once_and_its_last_token_again() -> None:
    driver = driver_of()
    driver.add(endless("first", 32, max_tokens=1))
    driver.run()
    driver.add(endless("same", 32, max_tokens=1))
    driver.run()
    assert rows(driver.plans[-1]) == [4]  # the last block holds the last token
    assert driver.outputs["same"][0].num_cached_tokens == 28
    assert driver.streams["same"] == driver.streams["first"]
    report = driver.core.report(0.0)
    assert (report.prefix_queries, report.prefix_hits, report.prompt_tokens) == (64, 28, 64)


def test_running_sequences_share_blocks() -> None:
    driver = driver_of()
    driver.add(endless("first", 33))
    driver.turn()
    for i in range(3):
        driver.add(endless(f"r{i}", 33, choice_index=i + 1))
    driver.turn()
    report = driver.core.report(0.0)
    assert report.num_blocks - report.free_blocks - report.cached_blocks == 9 + 3 * 1


@pytest.mark.parametrize(("salts", "hits"), [(("a", "a"), 28), (("a", "b"), 0), (("a", ""), 0)])
def test_tenants_do_not_share(salts: tuple[str, str], hits: int) -> None:
    driver = driver_of()
    for i, salt in enumerate(salts):
        driver.add(endless(f"r{i}", 32, salt=salt, max_tokens=1))
        driver.run()
    assert driver.core.report(0.0).prefix_hits == hits


def test_without_the_prefix_cache_nothing_is_kept() -> None:
    driver = driver_of(prefix_caching=False)
    for i in range(2):
        driver.add(endless(f"r{i}", 32, max_tokens=1))
        driver.run()
    report = driver.core.report(0.0)
    assert (report.prefix_queries, report.prefix_hits, report.cached_blocks) == (0, 0, 0)


def test_blocks_are_hittable_only_when_their_step_has_come_back() -> None:
    driver = driver_of(pipeline_depth=2)
    driver.add(endless("first", 32))
    driver.begin()
    driver.add(endless("same", 32))
    plan = driver.begin()
    assert plan is not None
    assert rows(plan) == [1, 32]  # the first one's blocks are still being written
    driver.finish()
    driver.add(endless("third", 32))
    plan = driver.begin()
    assert plan is not None
    assert rows(plan) == [1, 1, 4]


def test_at_most_two_plans_and_a_row_whose_token_is_not_known() -> None:
    driver = driver_of(pipeline_depth=2)
    driver.add(endless("r", 4, max_tokens=3))
    first, second, third = driver.begin(), driver.begin(), driver.begin()
    assert first is not None
    assert second is not None
    assert third is None
    assert first.entries[0].token_ids == request("r", 4).prompt_ids
    assert second.entries[0].token_ids == ()
    assert (second.entries[0].start, second.entries[0].output_index) == (4, 1)
    driver.finish()
    third = driver.begin()
    assert third is not None
    assert driver.begin() is None
    driver.finish()
    assert driver.begin() is None  # its last token is being sampled: there is nothing to plan
    driver.finish()
    assert driver.reasons == {"r": "length"}
    assert not driver.core.has_work


def test_blocks_go_back_with_the_last_plan_that_names_them() -> None:
    driver = driver_of(pipeline_depth=2, prefix_caching=False)
    driver.add(endless("r", 12))
    driver.begin()
    driver.begin()
    driver.abort("r")
    free = [driver.core.report(0.0).free_blocks]
    for _ in range(2):
        driver.finish()
        free.append(driver.core.report(0.0).free_blocks)
    assert free == [60, 60, 64]


def test_a_pending_block_is_waited_for_before_anyone_is_preempted() -> None:
    driver = driver_of(num_blocks=8, pipeline_depth=2, watermark=0.0, prefix_caching=False)
    driver.add(endless("a", 15, max_tokens=8))
    driver.add(endless("b", 15, seed=1, max_tokens=8))
    driver.begin()
    driver.finish()
    driver.begin()
    driver.abort("b")  # its plan is still out, and a needs a block for its next row
    assert driver.begin() is None
    driver.run()
    assert driver.core.report(0.0).num_preemptions == 0
    assert len(driver.streams["a"]) == 8


@pytest.mark.parametrize("depth", [1, 2])
def test_every_residence_is_announced_once_and_released_once(depth: int) -> None:
    driver = driver_of(num_blocks=14, pipeline_depth=depth, watermark=0.0)
    for i in range(8):
        driver.add(endless(f"r{i}", 9, seed=i, max_tokens=20))
    driver.run()
    driver.add(endless("last", 1, max_tokens=1))  # carries the last of the news
    driver.run()
    assert driver.core.report(0.0).num_preemptions > 0
    new = [entry.seq_id for plan in driver.plans for entry in plan.new]
    released = [seq_id for plan in driver.plans for seq_id in plan.released]
    assert new == sorted(set(new))
    assert sorted(released) == new[:-1]
    assert driver.executor.num_residents == 1
    last_named = {e.seq_id: plan.step for plan in driver.plans for e in plan.entries}
    for plan in driver.plans:
        assert all(last_named[seq_id] < plan.step for seq_id in plan.released)


def test_the_report_says_what_is_there() -> None:
    driver = driver_of(num_blocks=64, watermark=0.05, max_num_seqs=2, prefix_caching=False)
    for i in range(3):
        driver.add(endless(f"r{i}", 10, seed=i))
    driver.turn()
    report = driver.core.report(driver.now + 2.0)
    assert (report.num_running, report.num_waiting, report.waiting_tokens) == (2, 1, 10)
    assert (report.running_tokens, report.free_blocks, report.num_blocks) == (22, 58, 64)
    assert report.headroom_tokens == 4 * (58 - 2 - 4)
    assert report.since_last_step_s == pytest.approx(2.0)
    assert (report.num_steps, report.generation_tokens) == (1, 2)
    assert report.step_time_s == report.busy_s == driver.now
    assert driver.core.report(0.0).seq == report.seq + 1
    driver.run()
    assert driver.core.report(driver.now + 9.0).since_last_step_s == 0.0
    driver.now += 100.0
    driver.add(endless("late"))
    assert driver.core.report(driver.now + 1.0).since_last_step_s == pytest.approx(1.0)
