"""Rows for prompts where somebody has little slack: what a step as short as a token may take has room for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from ellm.worker.api.cost_model import CostModel
from ellm.worker.engine.planner.admission import TIMELY
from ellm.worker.engine.planner.slack import AIM
from ellm.worker.engine.policies.forecast import Forecast
from ellm.worker.engine.policies.step_rows import free_rows, timely_rows
from ellm.worker.engine.state import EngineState

COST = CostModel.known(overhead_s=20e-3, knee_rows=100, row_s=20e-6, pair_s=5e-9)
SLO_S = 50e-3
DECODE = 10


def sequence(num_planned: int, known: int, started: bool) -> Any:
    first = 0.0 if started else None
    return SimpleNamespace(
        num_planned=num_planned, tokens=[0] * known, first_token_at=first, gap=None, tpot_slo_s=SLO_S
    )


def state(*prompts: int, missing: int = 4096) -> EngineState:
    """Ten that decode, and some that are at these places of their prompts and lack as much."""
    running = [sequence(500, 501, True)] * DECODE + [sequence(n, n + missing, False) for n in prompts]
    return cast(EngineState, SimpleNamespace(running=running, config=SimpleNamespace(max_step_tokens=4096)))


def test_prompts_take_what_a_timely_step_has_room_for() -> None:
    forecast = Forecast(COST)
    assert free_rows(state(), forecast, DECODE) < 150
    rows = timely_rows(state(), forecast, DECODE)
    allowed = TIMELY * AIM * SLO_S
    took = 20e-3 + (rows + DECODE - 100) * 20e-6 + rows * rows / 2 * 5e-9
    assert took == pytest.approx(allowed, rel=0.03)
    assert took <= allowed + 1e-6


def test_a_chunk_far_into_its_prompt_counts_with_its_attention() -> None:
    forecast = Forecast(COST)
    near, far = (timely_rows(state(n), forecast, DECODE) for n in (0, 16_000))
    assert far < near / 2
    assert 20e-3 + (far + DECODE - 100) * 20e-6 + far * 16_000 * 5e-9 <= SLO_S


def test_each_row_counts_by_its_own_place() -> None:
    """The end of a long prompt, then a short one: the short one's rows do not see the long one's keys."""
    forecast = Forecast(COST)
    nearly_done = timely_rows(state(16_000, 0, missing=20), forecast, DECODE)
    assert nearly_done > 0.9 * timely_rows(state(0, 0), forecast, DECODE)
    assert timely_rows(state(0, 16_000, missing=300), forecast, DECODE) > 300
    assert timely_rows(state(16_000, 0, missing=300), forecast, DECODE) < 300


def test_who_came_back_counts_too() -> None:
    """It has put out tokens, and computes them again."""
    again = state()
    again.running.append(sequence(16_000, 18_000, True))
    forecast = Forecast(COST)
    assert free_rows(again, forecast, DECODE) == 64
    assert timely_rows(again, forecast, DECODE) < timely_rows(state(), forecast, DECODE) / 2


def test_a_prompt_gets_on_even_where_a_step_has_no_room() -> None:
    slow = CostModel.known(overhead_s=60e-3, row_s=1e-3)
    assert timely_rows(state(), Forecast(slow), DECODE) == 64
