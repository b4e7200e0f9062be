"""Our half of the comparison with vLLM's scheduler, and how two schedules are compared."""

from __future__ import annotations

from typing import Any

from ellm.loadtest.schedule_agreement import Schedule, compared, ours

SETTING: dict[str, Any] = {
    "arrivals": [0, 0, 2],
    "prompts": [8, 8, 4],
    "outputs": [3, 3, 2],
    "num_blocks": 64,
    "block_size": 4,
    "max_num_seqs": 8,
    "max_step_tokens": 12,
    "max_model_len": 64,
}


def test_a_step_is_a_unit_of_time_and_prompts_come_in_chunks() -> None:
    # Step 1: all of the first prompt and half of the second; step 2: its rest beside a decode row. The third
    # comes when two steps have ended.
    assert ours(SETTING) == Schedule([[1, 2, 3], [2, 3, 4], [3, 4]], 0)


def test_a_pool_that_is_too_small_preempts() -> None:
    starved = {**SETTING, "outputs": [16] * 3, "num_blocks": 9, "arrivals": [0] * 3, "max_model_len": 32}
    schedule = ours(starved)
    assert schedule.preempted > 0
    assert [len(times) for times in schedule.times] == [16, 16, 16]


def test_schedules_are_compared_token_by_token() -> None:
    row = compared(Schedule([[1, 2, 3, 4]], 2), Schedule([[1, 2, 3, 7]], 3))
    assert (row["same tokens"], row["step apart"]) == (0.75, 3)
    assert (row["preempted, full-chunked"], row["preempted, vLLM"]) == (2, 3)
    assert (row["steps, full-chunked"], row["steps, vLLM"]) == (4, 7)
