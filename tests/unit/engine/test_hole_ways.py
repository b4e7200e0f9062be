"""The way in which rows of holes run is chosen by measured time, per size, and not left for a small gain."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random

from support.engine_driver import LIMITS, EngineDriver, plain, request
from support.random_residency import RandomResidency

from ellm.worker.engine.hole_ways import KEPT, MARGIN, RETRY, TRIALS, HoleWays, bucket_of
from ellm.worker.engine.plan import BatchPlan, HoleWay, PlanEntry
from ellm.worker.executor.simulated_link import LinkSpeed

WAYS: tuple[HoleWay, ...] = ("apart", "fused", "ahead")


def holed(decode: int, rows: int, context: int = 100) -> BatchPlan:
    entries = [PlanEntry(i, context - 1, 1, (0,), [], True) for i in range(decode)]
    entries.append(PlanEntry(0, 0, rows, (0,) * rows, [], False, recompute=True))
    return BatchPlan(0, tuple(entries), (), (), decode + rows, decode)


def steps(ways: HoleWays, plan: BatchPlan, times: dict[HoleWay, float], count: int) -> Counter[HoleWay]:
    """Of `count` steps of one size, how many ran in which way."""
    taken: Counter[HoleWay] = Counter()
    random = Random(0)
    for _ in range(count):
        way = ways.choose(plan)
        taken[way] += 1
        noise = 1.0 + 0.005 * random.random()
        ways.measured(replace(plan, way=way), noise * times[way], 1.0)
    return taken


def test_every_way_is_tried_and_the_fastest_taken() -> None:
    ways, plan = HoleWays(WAYS), holed(8, 64)
    taken = steps(ways, plan, {"apart": 1.0, "fused": 0.8, "ahead": 0.9}, 3 * TRIALS)
    assert taken == dict.fromkeys(WAYS, TRIALS)
    assert ways.chosen(plan) == "fused"
    taken = steps(ways, plan, {"apart": 1.0, "fused": 0.8, "ahead": 0.9}, 10 * RETRY)
    assert taken["fused"] == 10 * RETRY - 10


def test_a_small_gain_changes_nothing() -> None:
    ways, plan = HoleWays(("apart", "fused")), holed(8, 64)
    steps(ways, plan, {"apart": 1.0, "fused": 1.0 - MARGIN / 2}, 3 * RETRY)
    assert ways.chosen(plan) == "apart"


def test_each_size_has_its_own_answer() -> None:
    ways, small, large = HoleWays(("apart", "fused")), holed(2, 16), holed(64, 512, 4000)
    assert bucket_of(small) != bucket_of(large)
    steps(ways, small, {"apart": 1.0, "fused": 1.5}, 20)
    steps(ways, large, {"apart": 1.0, "fused": 0.7}, 20)
    assert (ways.chosen(small), ways.chosen(large)) == ("apart", "fused")


def test_what_has_become_slower_is_left_again() -> None:
    ways, plan = HoleWays(("apart", "fused")), holed(8, 64)
    steps(ways, plan, {"apart": 1.0, "fused": 0.7}, 20)
    assert ways.chosen(plan) == "fused"
    steps(ways, plan, {"apart": 1.0, "fused": 1.4}, KEPT * RETRY)
    assert ways.chosen(plan) == "apart"


def test_a_switch_after_long_is_taken_back_as_soon() -> None:
    """A moment's disturbance after thousands of steps: the way that was left is tried again, and not the one
    that is chosen."""
    ways, plan = HoleWays(WAYS), holed(8, 64)
    steps(ways, plan, {"apart": 1.0, "fused": 1.2, "ahead": 1.4}, 100 * RETRY)
    steps(ways, plan, {"apart": 1.5, "fused": 1.2, "ahead": 1.4}, KEPT)
    assert ways.chosen(plan) == "fused"
    steps(ways, plan, {"apart": 1.0, "fused": 1.2, "ahead": 1.4}, 2 * KEPT * RETRY)
    assert ways.chosen(plan) == "apart"


def test_steps_of_different_length_are_compared_by_what_was_expected() -> None:
    """The one way happens to meet the long steps."""
    ways, plan = HoleWays(("apart", "fused")), holed(8, 64)
    for _ in range(20):
        way = ways.choose(plan)
        predicted = 3.0 if way == "fused" else 1.0
        ways.measured(replace(plan, way=way), predicted * (0.8 if way == "fused" else 1.0), predicted)
    assert ways.chosen(plan) == "fused"
    ways.measured(replace(plan, way="fused"), 9.0, 0.0)  # nothing is known of this step: nothing learnt
    assert ways.chosen(plan) == "fused"


def ways_planned(ways: tuple[HoleWay, ...], *, holes: bool) -> list[tuple[bool, HoleWay | None]]:
    """Of an engine's plans: whether they have rows of holes, and their way."""
    limits = replace(LIMITS, num_blocks=200, hole_ways=ways)
    if holes:
        limits = replace(limits, num_blocks=24, num_transient_blocks=20, num_host_blocks=40, block_bytes=1000)
    driver = EngineDriver(
        limits,
        scheduler=plain(max_num_seqs=6, max_step_tokens=24),
        policy=RandomResidency(3) if holes else None,
        link=LinkSpeed(1e6, 1e6),
    )
    for i in range(8):
        driver.add(request(f"r{i}", 6 + i, seed=i, max_tokens=20))
        driver.turn()
    driver.run(max_turns=20_000)
    return [(bool(plan.entries and plan.entries[-1].recompute), plan.way) for plan in driver.plans]


def test_steps_without_holes_ask_nothing() -> None:
    seen = ways_planned(WAYS, holes=True)
    assert {way for again, way in seen if again} == set(WAYS)
    assert {way for again, way in seen if not again} == {None}
    assert {way for _, way in ways_planned(WAYS, holes=False)} == {None}
    assert {way for _, way in ways_planned(("ahead",), holes=True)} == {None}
