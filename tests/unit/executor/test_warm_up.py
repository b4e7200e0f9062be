"""The plans run at start are admissible ones, and the largest of them."""

from __future__ import annotations

import pytest

from ellm.worker.api.config import CacheConfig, SchedulerConfig, WorkerConfig
from ellm.worker.engine.plan import BatchPlan
from ellm.worker.executor.warm_up import largest_plan, largest_plans, step_kinds

BLOCK = 16
SIZES = [
    (256, 2048, 2048),
    (256, 2048, 64),
    (8, 128, 512),
    (1, 2048, 512),
    (2, 2048, 512),
    (4, 2, 100),
    (1, 1, 4),
    (512, 256, 100),
]


def check(plan: BatchPlan, seqs: int, rows: int, max_len: int) -> None:
    own = [e for e in plan.entries if not e.recompute]
    assert len(own) <= seqs
    assert plan.num_rows == sum(e.num_tokens for e in plan.entries) <= rows
    counts = [e.num_tokens for e in own]
    assert list(plan.entries[: len(own)]) == own
    assert [c == 1 for c in counts] == sorted((c == 1 for c in counts), reverse=True)
    for entry in plan.entries:
        assert entry.start + entry.num_tokens <= max_len
        assert len(entry.token_ids) == entry.num_tokens
        assert len(entry.block_ids) * BLOCK >= entry.start + entry.num_tokens


@pytest.mark.parametrize(("seqs", "rows", "max_len"), SIZES)
def test_the_largest_plan_is_as_large_as_admitted(seqs: int, rows: int, max_len: int) -> None:
    config = SchedulerConfig(max_num_seqs=seqs, max_step_tokens=rows)
    plan, num_blocks = largest_plan(config, BLOCK, max_len)
    check(plan, seqs, rows, max_len)
    assert plan.num_rows == min(rows, seqs * max_len)
    assert len(plan.entries) == min(seqs, rows)
    assert all(e.samples for e in plan.entries)
    assert max(e.start + e.num_tokens for e in plan.entries) == max_len
    slots = [
        (e.block_ids[p // BLOCK], p % BLOCK)
        for e in plan.entries
        for p in range(e.start, e.start + e.num_tokens)
    ]
    assert len(set(slots)) == len(slots), "two rows would store to one slot"
    assert {block for block, _ in slots} == set(range(num_blocks))


@pytest.mark.parametrize(("seqs", "rows", "max_len"), SIZES)
def test_every_kind_of_step_is_admissible_and_cleans_up(seqs: int, rows: int, max_len: int) -> None:
    config = SchedulerConfig(max_num_seqs=seqs, max_step_tokens=rows)
    resident: set[int] = set()
    for plan in step_kinds(config, BLOCK, max_len):
        check(plan, seqs, rows, max_len)
        resident -= set(plan.released)
        resident |= {n.seq_id for n in plan.new}
        assert {e.seq_id for e in plan.entries} <= resident
    assert not resident


@pytest.mark.parametrize(("seqs", "rows", "max_len"), SIZES)
@pytest.mark.parametrize("num_transient", [1, 3, 200])
def test_the_largest_plan_with_a_hole(seqs: int, rows: int, max_len: int, num_transient: int) -> None:
    scheduler = SchedulerConfig(max_num_seqs=seqs, max_step_tokens=rows)
    config = WorkerConfig(
        scheduler=scheduler, cache=CacheConfig(block_size=BLOCK, transient_blocks=num_transient)
    )
    plans, num_blocks = largest_plans(config, max_len)
    assert plans[0] == largest_plan(scheduler, BLOCK, max_len)[0]
    if min(rows, max_len) <= BLOCK:
        assert len(plans) == 1, "a hole of one block leaves no row for its sequence"
        return
    (plan,) = plans[1:]
    check(plan, seqs, rows, max_len)
    hole = plan.entries[-1]
    assert hole.recompute
    assert not hole.samples
    length = min(num_transient, (min(rows, max_len) - 1) // BLOCK) * BLOCK
    assert (hole.start, hole.num_tokens) == (0, length)
    first = plan.entries[0]
    assert (first.seq_id, first.start, first.num_tokens) == (hole.seq_id, length, 1)
    assert plan.num_rows == min(rows, length + 1 + (seqs - 1) * max_len)
    transient = first.block_ids[: length // BLOCK]
    assert transient == hole.block_ids[: length // BLOCK]
    assert set(transient) <= set(range(num_blocks, num_blocks + num_transient))
    own = [(e.block_ids[-1], (e.start + e.num_tokens - 1) % BLOCK) for e in plan.entries if not e.recompute]
    assert len(set(own)) == len(own), "two rows would store to one slot"
    assert all(0 <= block < num_blocks for block, _ in own)
    assert len({n.seq_id for n in plan.new}) == len(plan.new) == len(own)
