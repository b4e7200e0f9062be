"""What a step costs with the prompts that come with it, and how many rows it takes along for nothing."""

from __future__ import annotations

import pytest

from ellm.worker.api.cost_model import CostModel
from ellm.worker.engine.planner.spare_rows import WITHIN
from ellm.worker.engine.planner.step_cost import StepCost


def flat_up_to(knee_rows: int) -> CostModel:
    """10 ms, and 0.1 ms for each row beyond the knee."""
    return CostModel.known(overhead_s=0.010, row_s=1e-4, knee_rows=knee_rows)


def test_rows_below_the_knee_are_spare() -> None:
    rate = StepCost(flat_up_to(100)).spare_rate(40, 1_000, 2_048)
    assert rate == pytest.approx(60 / 0.010, abs=(WITHIN + 3) / 0.010)


def test_where_every_row_costs_none_is_spare() -> None:
    assert StepCost(flat_up_to(0)).spare_rate(40, 1_000, 2_048) == 0.0


def test_prompts_take_spare_rows_first() -> None:
    cost = StepCost(flat_up_to(100))
    before = cost.spare_rate(40, 1_000, 2_048)
    for _ in range(500):
        cost.finished(num_prompt=1_000, num_cached=0, num_output=1_000)
    assert cost.prefill_per_decode > 0.9
    assert before - cost.spare_rate(40, 1_000, 2_048) == pytest.approx(40 * cost.prefill_per_decode / 0.010)
    for _ in range(500):
        cost.finished(num_prompt=9_000, num_cached=0, num_output=1_000)
    assert cost.spare_rate(40, 1_000, 2_048) == 0.0


def test_a_step_takes_no_more_than_its_budget() -> None:
    assert StepCost(flat_up_to(10_000)).spare_rate(40, 1_000, 48) == pytest.approx(8 / 0.010)
